"""Remembered state of a linear's active adapter: its factors' places, and in inference its two matrices.

The checks of a call (active adapter, hooks, dtype, modes) cost as much as the linear of one token, so their outcome
is remembered and revalidated by identity and version counters. Factors are fetched at every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import linear

from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.layer.weight_cache import VersionStamp, is_cacheable, is_plain_inference
from tnpeft.nn.executor.eligibility import why_not_fused

if TYPE_CHECKING:
    from tnpeft.adapters.layer.protocol import AdaptedLinear


_Tables = tuple[tuple[dict[str, Tensor | None], str], ...]


def _tables(layer: AdaptedLinear, adapter: str, item: SiteUpdate) -> _Tables | None:
    """Return where the factors are kept; None if some are computed from the base weight."""
    if any(operand.source == "base" for operand in item.operands):
        return None
    return tuple(
        (layer.owner(operand).tnpeft_factors[adapter].table(operand.key), operand.key) for operand in item.operands
    )


def _noted(active: str | list[str]) -> str | list[str]:
    return active if isinstance(active, str) else [*active]


@dataclass(frozen=True, eq=False)
class ActiveAdapter:
    """The active adapter of a linear, the first if there are several; ``""`` if none has an update of it.

    ``apart`` says why its update is never one operation with the linear, ``tables`` where its factors are kept; there
    are none if some are chosen or computed at each call. What it depends on besides ``active`` is fixed.
    """

    active: str | list[str]
    adapter: str
    item: SiteUpdate
    apart: str
    tables: _Tables

    @staticmethod
    def of(layer: AdaptedLinear, compiling: bool = False) -> ActiveAdapter:
        """Return that of a linear; a compiler looks up factors itself."""
        active, noted = layer.active_here, _noted(layer._active_adapter)
        if not active:
            return ActiveAdapter(noted, "", None, "", ())  # type: ignore[arg-type]
        item = layer.updates[active[0]][0]
        if len(active) > 1:
            apart = "several adapters are active"
        elif item.side:
            apart = "the update is of slices of the layer"
        else:
            apart = "DoRA rescales the output" if active[0] in layer.tnpeft_magnitude else ""
        tables = None if compiling or item.stack else _tables(layer, active[0], item)
        return ActiveAdapter(noted, active[0], item, apart, tables or ())


@dataclass(frozen=True, eq=False)
class InferenceFastPath:
    """The two matrices of an adapter's update, and all that has to be unchanged for them to hold.

    ``first`` is ``[inp, narrow]``, ``last`` ``[narrow, out]``: views of the factors wherever they are factors.
    """

    active: str | list[str]
    tables: _Tables
    arrays: tuple[Tensor, ...]
    stamp: VersionStamp
    first: Tensor
    last: Tensor
    scale: float

    @staticmethod
    def of(layer: AdaptedLinear, adapter: str, x: Tensor) -> InferenceFastPath | None:
        """Return the path of an adapter of a linear; None where nothing may be kept, or it is not that simple."""
        item = layer.updates[adapter][0]
        if (
            not item.program.is_low_rank
            or item.side
            or adapter in layer.tnpeft_magnitude
            or _computed(layer.base_layer)
        ):
            return None
        tables = _tables(layer, adapter, item)
        if tables is None:
            return None
        arrays = [table.get(key) for table, key in tables]
        if not is_cacheable(arrays, x.device.type) or any(a.dtype != x.dtype or a.device != x.device for a in arrays):  # type: ignore[arg-type, union-attr]
            return None
        first, last, sign = item.program.matrices(layer.values(adapter, item, x))
        found: tuple[Tensor, ...] = tuple(arrays)  # type: ignore[arg-type]
        active, scale = _noted(layer._active_adapter), sign * item.scale
        return InferenceFastPath(active, tables, found, VersionStamp(found), first.t(), last.t(), scale)

    def __call__(self, layer: AdaptedLinear, x: Tensor) -> Tensor | None:
        """Return the linear's output with the update, ``[..., out]``; None if anything has changed."""
        base: nn.Linear = layer._modules["base_layer"]  # type: ignore[assignment]
        if (
            layer.training
            or layer._disable_adapters
            or layer.merged
            or layer._active_adapter != self.active
            or x.dtype != self.first.dtype
            or _computed(base)
            or not is_plain_inference(x.device.type)
        ):
            return None
        for (table, key), source in zip(self.tables, self.arrays, strict=True):
            if table.get(key) is not source:
                return None
        if not self.stamp.holds(self.arrays):
            return None
        own = base._parameters
        result = linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
        last = self.last
        result.view(-1, last.shape[1]).addmm_(x.reshape(-1, x.shape[-1]).mm(self.first), last, alpha=self.scale)
        return result


def _computed(base: nn.Module) -> bool:
    """Return True if the module is more than the product with a weight of its own."""
    return bool(why_not_fused(base)) or type(base._parameters.get("weight")) is not nn.Parameter
