"""All or nothing: a model as it was before an attachment, a load or a merge that failed.

What is kept are references, never copies of the base model's tensors. Adapters that were there before are not
visited, so that the cost of attaching does not grow with their number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tnpeft.adapters.experts.module import TensorNetworkExperts
from tnpeft.adapters.layer.bank import FactorBank, TensorNetworkLayer
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.layer.snapshot import WeightSnapshot

_CONTAINERS = (dict, OrderedDict, list, set)


def walk(
    root: nn.Module, adapters: Collection[str] | None = (), *, inside: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model, each once.

    Of the adapters' own modules those of ``adapters``, None for all; without ``inside`` nothing of adapted modules.
    """
    seen: set[int] = set()
    stores: set[int] = set()
    waiting = [("", root)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if not inside and isinstance(module, BaseTunerLayer | TensorNetworkExperts):
            seen.update(map(id, module.modules()))
            continue
        children = module._modules.items()
        if adapters is not None and id(module) in stores:
            children = [(key, child) for key in adapters if (child := module._modules.get(key)) is not None]
        elif isinstance(module, TensorNetworkLayer):
            stores.update(id(getattr(module, held)) for held in module.adapter_layer_names)
        waiting += [
            (f"{name}.{key}" if name else key, child) for key, child in reversed([*children]) if child is not None
        ]


def outside(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of a model, but for the bank and what lies inside adapted modules, in the model's order."""
    return [its for its in walk(root, inside=False) if not isinstance(its[1], FactorBank)]


def layers(root: nn.Module) -> Iterator[TensorNetworkLayer]:
    """The adapted linears of a model, and the bank."""
    return (module for _, module in walk(root) if isinstance(module, TensorNetworkLayer))


class _Snapshot:
    """Everything about the modules of a model but the numbers: submodules, Parameters, buffers, hooks, flags."""

    def __init__(self, root: nn.Module, adapters: Collection[str] | None, values: str | None) -> None:
        self._states: list[tuple[nn.Module, type, dict[str, Any], dict[str, Any]]] = []
        self._flags: list[tuple[Tensor, bool, Tensor]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        self._quantised: list[WeightSnapshot] = []
        for name, module in walk(root, adapters):
            state = dict(module.__dict__)
            held = {k: v.copy() for k, v in state.items() if type(v) in _CONTAINERS}
            self._states.append((module, type(module), state, held))
            if isinstance(module, DenseLinear) and module.quantization_backend is not None:
                self._quantised.append(WeightSnapshot.of(module.get_base_layer()))
            own = [*module._parameters.items()]
            self._flags += [(array, array.requires_grad, array.data) for _, array in own if array is not None]
            for key, array in own if values is not None else ():
                if array is not None and (
                    values in (*name.split("."), key) or (key == "bias" and array.requires_grad)
                ):
                    self._values.append((array, array.detach().clone()))

    def restore(self) -> None:
        """Put all of it back, in place wherever it is a container."""
        for module, cls, state, contents in self._states:
            if type(module) is not cls:
                module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
            for key, content in contents.items():
                _refill(state[key], content)
        for array, flag, data in self._flags:
            # PEFT gives an embedding whose tokens it merges other data
            if not is_lazy(array) and array.data_ptr() != data.data_ptr():
                array.data = data
            if array.requires_grad != flag:
                array.requires_grad_(flag)
        with torch.no_grad():
            for array, value in self._values:
                array.copy_(value)
        for base in self._quantised:
            base.restore()


@contextmanager
def or_as_before(
    root: nn.Module,
    adapters: Collection[str] | None = (),
    values: str | None = None,
    *,
    undone: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Run something that changes a model, and undo what it has done if it fails.

    Args:
        root: the model.
        adapters: those that are already there and may be touched, None for all.
        values: one of them whose numbers may be touched as well, and are copied.
        undone: asked after a failure; False leaves the model as it is then.
    """
    before = _Snapshot(root, adapters, values)
    try:
        yield
    except BaseException:
        if undone():
            before.restore()
        raise


@contextmanager
def parked(root: nn.Module) -> Iterator[None]:
    """Take the modules of a model's adapters out of it for a while: walks over it do not meet them."""
    held: list[tuple[nn.Module, str, dict[str, Any]]] = []
    trained: list[tuple[TensorNetworkLayer, set[str]]] = []
    try:
        for layer in layers(root):
            trained.append((layer, set(layer._trained)))
            for container in (getattr(layer, name) for name in layer.adapter_layer_names):
                for slot in ("_modules", "_parameters", "_keys"):
                    if (items := container.__dict__.get(slot)) is not None:
                        held.append((container, slot, items))
                        container.__dict__[slot] = {}
        yield
    finally:  # beside those that have come since
        for container, slot, items in held:
            items.update(container.__dict__[slot])
            container.__dict__[slot] = items
        for layer, names in trained:  # what stayed away was not frozen, whatever was set meanwhile
            layer._trained = layer._trained | names


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)
