"""Factors with columns of length one, which a forward of the model computes for all sites at once."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tnpeft.nn.executor.eligibility import autocast_active, under_transform

if TYPE_CHECKING:
    from tnpeft.adapters.layer.bank import FactorBank

_forward = threading.local()  # ``units``: what the forward on its way in this thread has computed


def unit_columns(arrays: Sequence[Tensor], axes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return a site's factors with columns, along their axes, of length one; zero columns stay zero.

    A factor without axes is returned as it is.
    """
    apart = not torch.compiler.is_compiling() and _apart()
    units = getattr(_forward, "units", {}) if apart else {}
    autocast = bool(units) and autocast_active(arrays[0].device.type)
    found = []
    for array, along in zip(arrays, axes, strict=True):
        known = units.get((id(array), array._version, along, autocast)) if units and along else None
        if known is not None:
            array = known[1]
        elif along:
            array = (UnitColumns.apply(along, array) if apart else _divided(array, along))[0]
        found.append(array)
    return found


def share(model: nn.Module) -> None:
    """Have every forward of a model, which owns the bank, compute them at once."""
    if _begin not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin)
        model.register_forward_hook(_end, always_call=True)


def _begin(model: nn.Module, inputs: Any) -> None:
    bank: FactorBank = model.factor_bank  # type: ignore[assignment]
    if torch.compiler.is_compiling() or not _apart() or bank.disable_adapters or bank.merged_adapters:
        return
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and DistributedDataParallel._get_active_ddp_module() is None:
        return  # under FSDP or ZeRO, perhaps, where factors are parts
    found: dict[Hashable, list[Tensor]] = {}
    for store, key, axes in (item for name in bank.active_adapters for item in bank.unit_norm.get(name, ())):
        array = store._parameters.get(key)
        if type(array) is nn.Parameter:
            found.setdefault((axes, array.shape, array.dtype, array.device), []).append(array)
    _forward.units = {}
    for (axes, _, _, device), arrays in found.items():  # type: ignore[misc]
        autocast = autocast_active(device.type)
        for array, unit in zip(arrays, UnitColumns.apply(axes, *arrays), strict=True):
            _forward.units[id(array), array._version, axes, autocast] = array, unit  # so that its id stays its own


def _end(model: nn.Module, inputs: Any, result: Any) -> None:
    if not torch.compiler.is_compiling():
        _forward.units = {}


HOOKS = (_begin, _end)


class UnitColumns(torch.autograd.Function):
    """Factors of one shape divided by the lengths of their columns.

    Nothing is saved as autograd does: sites may run backward each on its own, and what reads a result computes it
    again (see :mod:`tnpeft.nn.executor.saving`).
    """

    @staticmethod
    def forward(ctx: Any, axes: tuple[int, ...], *arrays: Tensor) -> tuple[Tensor, ...]:
        ctx.batch = _Batch(axes, arrays)
        ctx.tnpeft_again = lambda k, batch=ctx.batch: batch.repeated((k,))[0][k]
        ctx.set_materialize_grads(False)
        return ctx.batch.divided()[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [k for k, grad in enumerate(grads) if grad is not None]
        if not wanted:
            return None, *grads
        _, unit, length = ctx.batch.repeated(wanted)
        ctx.batch.known = None  # this pass has read all that it reads
        if len(wanted) < len(grads):
            unit, length = unit[wanted], length[wanted]
        grad = torch.stack([grads[k] for k in wanted])  # type: ignore[misc]
        found = grad.addcmul(unit, (grad * unit).sum(ctx.batch.axes, keepdim=True), value=-1) / length
        given = dict(zip(wanted, found.unbind(), strict=True))
        return None, *(given.get(k) for k in range(len(grads)))


class _Batch:
    """Factors of one shape, and what a backward pass on its way has computed from them, once for all."""

    def __init__(self, axes: tuple[int, ...], arrays: tuple[Tensor, ...]) -> None:
        self.axes, self.arrays, self.versions = axes, arrays, [array._version for array in arrays]
        device = arrays[0].device.type
        self.autocast = device if autocast_active(device) else ""
        self.known: tuple[tuple[Tensor, ...], Tensor, Tensor] | None = None

    def divided(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The units apart and stacked, and the lengths of their columns."""
        unit, length = _divided(torch.stack(self.arrays), self.axes)
        return unit.unbind(), unit, length

    def repeated(self, wanted: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The same in a backward pass, differentiable if that is itself differentiated."""
        for k in wanted:
            if self.arrays[k]._version != self.versions[k]:
                raise RuntimeError("a factor was changed in place between the forward pass and its backward pass")
        known = self.known
        if known is None or known[1].requires_grad != torch.is_grad_enabled():
            with torch.autocast(self.autocast) if self.autocast else nullcontext():
                known = self.known = self.divided()
        return known


def _divided(array: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    length = torch.linalg.vector_norm(array, dim=axes, keepdim=True)
    length = length.clamp_min(torch.finfo(length.dtype).tiny)
    return array / length, length


def _apart() -> bool:
    """True if a backward pass of our own may be used."""
    return torch.is_grad_enabled() and not under_transform()
