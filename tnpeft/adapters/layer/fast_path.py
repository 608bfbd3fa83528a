"""Remembered state of a linear's active adapter: its factors' places, and in inference its two matrices.

The checks of a call (active adapter, hooks, dtype, modes) cost as much as the linear of one token, so their outcome
is remembered and revalidated by identity and version counters. Factors are fetched at every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.layer.merging import DenseLinear, wide
from tnpeft.adapters.layer.weight_cache import VersionStamp, is_cacheable, is_plain_inference
from tnpeft.nn.executor.eligibility import why_not_fused


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
    tables: tuple[tuple[dict[str, Tensor | None], str], ...]

    @staticmethod
    def of(layer: DenseLinear, compiling: bool = False) -> ActiveAdapter:
        """Return that of a linear; a compiler looks up factors itself."""
        active, given = layer.active_here, layer._active_adapter
        noted = given if isinstance(given, str) else [*given]
        if not active:
            return ActiveAdapter(noted, "", None, "", ())  # type: ignore[arg-type]
        item = layer.updates[active[0]][0]
        if len(active) > 1:
            apart = "several adapters are active"
        elif item.side:
            apart = "the update is of slices of the layer"
        else:
            apart = "DoRA rescales the output" if active[0] in layer.tnpeft_magnitude else ""
        tables: Any = ()
        if not (compiling or item.stack or any(operand.source == "base" for operand in item.operands)):
            owners = [layer.owner(operand).tnpeft_factors[active[0]] for operand in item.operands]
            tables = tuple((own.table(o.key), o.key) for own, o in zip(owners, item.operands, strict=True))
        return ActiveAdapter(noted, active[0], item, apart, tables)

    def arrays(self) -> list[Any]:
        """Return what is in the factors' places now, perhaps None: tensors of a module's own."""
        return [table.get(key) for table, key in self.tables]


@dataclass(frozen=True, eq=False)
class InferenceFastPath:
    """The two matrices of an adapter's update, and all that has to be unchanged for them to hold.

    ``first`` is ``[inp, narrow]``, ``last`` ``[narrow, out]``: the update through its smallest cut, computed in fp32
    or wider, in the dtype of the factors, which may be wider than ``dtype``, that of the input.
    """

    known: ActiveAdapter
    dtype: torch.dtype
    arrays: list[Tensor]
    stamp: VersionStamp
    first: Tensor
    last: Tensor
    scale: float

    @staticmethod
    def of(layer: Any, known: ActiveAdapter, x: Tensor) -> InferenceFastPath | None:
        """Return the path of a linear's active adapter; None where nothing may be kept, or it is not that simple."""
        item, arrays = known.item, known.arrays()
        if known.apart or not arrays or item.thin is None or _computed(layer.base_layer):
            return None
        if not is_cacheable(arrays, x.device.type) or any(a.device != x.device for a in arrays):
            return None
        if {a.dtype for a in arrays} not in ({x.dtype}, {torch.promote_types(x.dtype, arrays[0].dtype)}):
            return None
        last, first = (side.to(arrays[0].dtype).t() for side in item.thin([wide(array) for array in arrays]))
        return InferenceFastPath(known, x.dtype, arrays, VersionStamp(arrays), first, last, item.scale)

    def __call__(self, layer: DenseLinear, x: Tensor) -> Tensor | None:
        """Return the linear's output with the update, ``[..., out]``; None if anything has changed."""
        base: nn.Linear = layer._modules["base_layer"]  # type: ignore[assignment]
        if (
            layer.training
            or layer._disable_adapters
            or layer.merged
            or layer.bank.watching
            or layer._active_adapter != self.known.active
            or x.dtype != self.dtype
            or _computed(base)
            or not is_plain_inference(x.device.type)
        ):
            return None
        for (table, key), array in zip(self.known.tables, self.arrays, strict=True):
            if table.get(key) is not array:
                return None
        if not self.stamp.holds(self.arrays):
            return None
        own = base._parameters
        result = linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
        rows, last, flat = x.reshape(-1, x.shape[-1]), self.last, result.view(-1, self.last.shape[1])
        if result.dtype == last.dtype:
            flat.addmm_(rows.mm(self.first), last, alpha=self.scale)
        else:  # rounded once, on the way into the result
            flat.add_(rows.to(last.dtype).mm(self.first).mm(last), alpha=self.scale)
        return result


def _computed(base: nn.Module) -> bool:
    """Return True if the module is more than the product with a weight of its own."""
    return bool(why_not_fused(base)) or type(base._parameters.get("weight")) is not nn.Parameter
