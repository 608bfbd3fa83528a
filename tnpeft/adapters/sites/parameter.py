"""Raw Parameters that a module reads itself, such as the in-projection of torch's attention, with their updates.

The module's class gets a property in the Parameter's place, so that whoever reads it, torch's fused kernels among
them, finds the adapted weight. The Parameter stays where it is, under its own name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.layer.checkpointing import check_recomputation, refuse_reentrant
from tnpeft.adapters.layer.merging import DenseLinear, Route, wide
from tnpeft.adapters.sites.weight import Weight
from tnpeft.networks import NetworkError

_FORMED = "the module reads the weight itself: it is formed at every call"


class HeldWeight(DenseLinear):
    """A weight that stays a Parameter of the module that reads it, under its own name, without a bias.

    The Parameter is fetched at every use.
    """

    bias = None

    def __init__(self, weight: Weight, bank: FactorBank) -> None:
        nn.Module.__init__(self)
        self.stored, self.weight_name, self.quantization_backend = weight, weight.name, None
        self.begin(bank)
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.experts, self.transposed = weight.experts, weight.transposed

    def get_base_layer(self) -> nn.Module:
        """The module that holds the Parameter."""
        return self.stored.module

    @property
    def weight(self) -> Tensor:
        """The Parameter."""
        return self.stored.parameter()

    def base_dtype(self) -> torch.dtype | None:
        """The dtype of the Parameter."""
        return self.weight.dtype

    def get_base_weight(self) -> Tensor:
        """The Parameter's numbers."""
        return self.weight.data

    def _stored(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix


class TensorNetworkParameter(HeldWeight):
    """One raw Parameter and the factors of its adapters: who reads the Parameter gets the adapted weight."""

    _call: dict[bool, Tensor] | None = None  # weights formed in a call of the module, without and with gradients

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's conversion makes LoRAs of linears alone."""
        return False

    # ---- what the module reads

    def adapted(self) -> Tensor:
        """The weight with the updates of the active adapters: what merging them would give, with its gradients."""
        if self.route(self.weight).kind != "plain":
            return self.weight
        call = {} if self._call is None or torch.compiler.is_compiling() else self._call
        grads = torch.is_grad_enabled()
        if grads not in call:
            call[grads] = self._formed()
        return call[grads]

    def _formed(self) -> Tensor:
        if (seen := check_recomputation(self)) is not None:
            with self.bank.selecting(seen):
                return self._formed()
        refuse_reentrant(self.bank)
        total = wide(self.weight)
        for adapter in self.active_here:
            total = total + self._stored(self._change(adapter, self._matrix(wide(self.weight))))
        return total.to(self.weight.dtype)

    def route_of_update(self, x: Tensor) -> Route:
        """The path of a read with updates, which forms the adapted weight."""
        return Route("plain", _FORMED)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: Sequence[str] | None
    ) -> None:
        """Merge if asked for, and give the module its own class back; there is nothing to put in this one's place."""
        if merge:
            self.merge(safe_merge, adapter_names)
        _with_properties(self.get_base_layer(), self.weight_name, None)


# ---- the module's class


def read_through(weight: Weight, layer: TensorNetworkParameter) -> None:
    """Let the module of a Parameter read it through the layer that adapts it."""
    if weight.module._modules.get(weight.child) is not layer:
        weight.module.add_module(weight.child, layer.train(weight.module.training))
        _with_properties(weight.module, weight.name, weight.child)


def _with_properties(module: nn.Module, name: str, child: str | None) -> None:
    """Let a module's class read a Parameter through a child, or no longer."""
    cls = type(module)
    own, names = getattr(cls, "_tnpeft_class", (cls, ()))
    names = tuple(pair for pair in names if pair[0] != name) + (((name, child),) if child else ())
    if not hasattr(cls, "_tnpeft_class"):
        module.register_forward_pre_hook(_begin)
        module.register_forward_hook(_end, always_call=True)
    if not names:
        remove_hooks(module, (_begin, _end))
    module.__class__ = _class(own, names) if names else own


def remove_hooks(module: nn.Module, functions: Collection[Any]) -> None:
    """Take functions out of the hooks of a module's forward."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in functions]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


@lru_cache(maxsize=256)
def _class(own: type[nn.Module], names: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    """A class like a module's own, in which some Parameters are read through children."""

    def read(child: str) -> property:
        return property(lambda module: module._modules[child].adapted())

    def reduce(module: nn.Module, protocol: Any) -> Any:
        return _made, (own, names), module.__getstate__()  # type: ignore[attr-defined]

    fields = {name: read(child) for name, child in names}
    extra = {"_tnpeft_class": (own, names), "__reduce_ex__": reduce, "__module__": own.__module__}
    return type(own.__name__, (own,), {**fields, **extra})


def _made(own: type[nn.Module], names: tuple[tuple[str, str], ...]) -> nn.Module:
    cls = _class(own, names)
    return cls.__new__(cls)


def _begin(module: nn.Module, args: Any) -> None:
    """Form each weight once in a call, however often the module reads it: a forward pre-hook."""
    for layer in _read_through(module):
        layer._call = {}


def _end(module: nn.Module, args: Any, output: Any) -> None:
    for layer in _read_through(module):
        layer._call = None


def _read_through(module: nn.Module) -> list[TensorNetworkParameter]:
    if torch.compiler.is_compiling():
        return []
    return [layer for layer in module._modules.values() if isinstance(layer, TensorNetworkParameter)]


def check_parameter(name: str, config: Any) -> None:
    """Raise if a configuration asks of a raw Parameter what needs the module's input."""
    for what, asked in (("dropout", config.dropout), ("replicas", config.replicas > 1)):
        if asked:
            raise NetworkError(
                f"{name} is read by its module itself, and {what} needs the input",
                remedy=f"adapt it with an adapter of its own, without {what}",
            )


def check_one_for_all(model: nn.Module, names: Sequence[str]) -> None:
    """Raise in a batch of several adapters if a layer that does not see the batch's rows has an update."""
    for path, layer in model.named_modules():
        if not isinstance(layer, DenseLinear) or not {*names, *layer.active_adapters} & {*layer.updates}:
            continue
        problem = "is read by its module itself, once for all rows of a batch"
        if any(item.site_layout.site.listed for items in layer.updates.values() for item in items):
            problem = "is given the tokens of one expert, not the rows of a batch"
        elif not isinstance(layer, TensorNetworkParameter):
            continue
        raise NetworkError(f"{path} {problem}", remedy="use set_adapter with one adapter at a time")
