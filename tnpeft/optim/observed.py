"""What a batch shows of every site: the size of its inputs and outputs, and how far each factor's signs move them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.experts.weight import ExpertWeight
from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.sites.convolution import TensorNetworkConvolution
from tnpeft.adapters.sites.embedding import TensorNetworkEmbedding
from tnpeft.adapters.sites.parameter import TensorNetworkParameter
from tnpeft.adapters.sites.selection import choose, one_value
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.layout import ParameterSpec
from tnpeft.networks import NetworkError, Site
from tnpeft.nn.dense import dense
from tnpeft.nn.executor.groups import Groups

_TOKENS = 1024  # rows of activations that are measured at a layer

_Rows = tuple[Tensor, Groups | None]  # inputs, and their experts or groups of channels


@dataclass
class Seen:
    """Sums of squares at a site over the rows of its inputs: of these, of outputs, and of changes by factor."""

    rows: int = 0
    entries: int = 0
    inputs: float = 0.0
    outputs: float = 0.0
    changes: dict[str, float] = field(default_factory=dict)

    @property
    def length(self) -> float:
        """The RMS length of an input."""
        return sqrt(self.inputs / max(self.rows, 1))

    @property
    def output(self) -> float:
        """The RMS of an entry of the base weight's outputs."""
        return sqrt(self.outputs / max(self.entries, 1))

    def change(self, label: str) -> float:
        """The RMS change of an entry of the outputs along the signs of a factor's gradient."""
        return sqrt(self.changes[label] / max(self.entries, 1))


def observe(model: nn.Module, batch: Any, adapter: str) -> dict[Site, Seen]:
    """Return what a batch shows of every site that it reaches.

    A raw Parameter is read by its module, which nobody sees multiply: its inputs are the unit vectors. Those of a
    convolution are the patches under its kernel, those of an embedding tokens, as vectors of length one.

    Raises:
        NetworkError: the model has no such adapter, it is merged, several updates or inactive, or the batch reaches
            no site.
    """
    bank = bank_of(model, adapter)
    if bank.merged:
        raise NetworkError("a merged adapter cannot be measured", remedy="call unmerge_adapter() first")
    inputs: dict[nn.Module, _Rows] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module not in inputs:
            inputs[module] = _rows(module, *args)

    layers = [module for module in adapted_weights(model) if adapter in module.updates]
    hooks = [module.register_forward_pre_hook(keep) for module in layers]
    try:
        grads = gradients(model, batch, arrays(model, bank, adapter, kinds=("trainable",)))
    finally:
        for hook in hooks:
            hook.remove()
    held = arrays(model, bank, adapter)
    found: dict[Site, Seen] = {}
    for module in layers:
        module._refuse_several(adapter)
        if isinstance(module, TensorNetworkParameter):
            inputs[module] = torch.eye(module.in_features, device=module.home_device())[:_TOKENS], None
        for item in module.updates[adapter] if module in inputs else ():
            _add(found.setdefault(item.site_layout.site, Seen()), module, item, inputs[module], held, grads)
    if not any(change > 0 for seen in found.values() for change in seen.changes.values()):
        raise NetworkError(
            f"the batch moves no factor of {adapter!r} at any of {len(bank.layouts[adapter].site_layouts)} sites",
            remedy="activate the adapter, and pass a batch that reaches its sites",
        )
    return found


def adapted_weights(model: nn.Module) -> Iterator[DenseLinear]:
    """Return the adapted weights of a model."""
    return (module for module in model.modules() if isinstance(module, DenseLinear))


def _rows(module: nn.Module, *args: Any) -> _Rows:
    """Some of the rows that a layer's matrix is multiplied with."""
    if isinstance(module, ExpertWeight):
        return module.seen(_TOKENS, *args)
    x = args[0].detach()
    if isinstance(module, TensorNetworkConvolution):
        return module.patches(x, _TOKENS)
    return (x.reshape(-1) if isinstance(module, TensorNetworkEmbedding) else x.reshape(-1, x.shape[-1]))[
        :_TOKENS
    ], None


def _add(
    seen: Seen,
    module: DenseLinear,
    item: SiteUpdate,
    inputs: _Rows,
    held: Mapping[ParameterSpec, Tensor],
    grads: Mapping[ParameterSpec, Tensor],
) -> None:
    """Add the rows that one layer saw to what is seen of a site."""
    x, groups = inputs
    looked = isinstance(module, TensorNetworkEmbedding)
    weight = module.site_matrix(item).detach().double()
    if looked:
        output = (module.base_matrix().double() if item.side == "inp" else weight).mT[x]
    else:
        x = module.site_input(item, x.double())
        output = groups.matmul(x, weight.mT) if weight.dim() > 2 and groups else _own(x @ weight.mT, groups, item)
    seen.rows += len(x)
    seen.entries += output.numel()
    seen.inputs += len(x) if looked else float(x.square().sum())
    seen.outputs += float(output.square().sum())
    place = item.site_layout
    its = item.chosen(module.bank.selected)
    operands = dict(zip(item.program.labels, item.operands, strict=True))
    net, sizes, _ = one_value(place.network, place.sizes, item.fixed)
    values = {
        label: module.constant(item, label).double()
        if label in item.constants
        else choose(held[param].detach().double(), operands[label].stack, its)
        for label, param in place.parameters.items()
    }
    if not looked:
        net, x = net.apply("activations", "row"), x.reshape(len(x), *(sizes[index] for index in net.cols))

    def moved(label: str, array: Tensor) -> Tensor:
        now = {**values, label: array}
        for name, operand in operands.items():
            if operand.norm:
                now[name] = now[name] / torch.linalg.vector_norm(now[name], dim=operand.norm, keepdim=True)
        if looked:
            found = module.applied(item)[1](module.get_base_layer(), x, now)
            return found.narrow(-1, item.start, item.length) if item.side == "out" else found
        return _own(dense(net, {**now, "activations": x}), groups, item)

    for label, param in place.parameters.items():
        if param not in grads:
            continue
        sign = choose(grads[param].sign().double(), operands[label].stack, its)
        _, change = torch.func.jvp(lambda array, label=label: moved(label, array), (values[label],), (sign,))
        square = item.scale**2 * float(change.square().mean())
        seen.changes[label] = seen.changes.get(label, 0.0) + square * output.numel()


def _own(result: Tensor, groups: Groups | None, item: SiteUpdate) -> Tensor:
    """Of the outputs that every expert, or group of channels, makes of a row those of the row's own."""
    rows = torch.arange(result.shape[-2], device=result.device)
    if groups is not None and result.dim() > 2:
        return result[groups.ids, rows]
    if groups is None or item.side or item.site_layout.site.experts:
        return result
    return result.unflatten(1, (groups.count, -1))[rows, groups.ids]


# ---- gradients


def gradients(model: nn.Module, batch: Any, held: Mapping[ParameterSpec, Tensor]) -> dict[ParameterSpec, Tensor]:
    """The gradients of the model's loss on a batch, without a trace in the model."""
    trained = {param: array for param, array in held.items() if array.requires_grad}
    with _evaluating(model), torch.enable_grad():
        if callable(batch):
            out = batch(model)
        elif isinstance(batch, Mapping):
            out = model(**batch)
        else:
            out = model(*batch) if isinstance(batch, tuple | list) else model(batch)
        loss = getattr(out, "loss", None)
        if loss is None:
            value = out if isinstance(out, Tensor) else next(v for v in _tensors(out) if v.is_floating_point())
            loss = value.float().square().mean() if value.ndim else value
        if not (trained and loss.requires_grad):
            return {param: torch.zeros_like(array) for param, array in trained.items()}
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        param: torch.zeros_like(array) if grad is None else grad
        for (param, array), grad in zip(trained.items(), grads, strict=True)
    }


def _tensors(out: Any) -> Iterator[Tensor]:
    values = out.values() if isinstance(out, Mapping) else out
    return (value for value in values if isinstance(value, Tensor))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            if module.training != training:
                module.training = training
