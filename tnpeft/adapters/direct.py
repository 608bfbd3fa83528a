"""Inference with one adapter: two narrow products into the linear's own output, and little else to do per call.

A token takes tens of microseconds in a linear, and as long again if every call asks anew which adapters there are and
where their factors lie. What those questions were answered with is kept and compared instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import linear

from tnpeft.adapters.prepared import Stamps, may_keep, quiet
from tnpeft.nn.modes import hooked

if TYPE_CHECKING:
    from tnpeft.adapters.layer import TensorNetworkLinear


@dataclass(frozen=True, eq=False)
class Direct:
    """The two matrices of an adapter's update, and all that has to be as it was for them to hold.

    ``first`` is ``[inp, narrow]``, ``last`` ``[narrow, out]``: views of the factors wherever they are factors.
    """

    active: str | list[str]
    sources: tuple[tuple[dict[str, Tensor | None], str, Tensor], ...]
    arrays: tuple[Tensor, ...]
    stamps: Stamps
    first: Tensor
    last: Tensor
    scale: float

    @staticmethod
    def of(layer: TensorNetworkLinear, adapter: str, x: Tensor) -> Direct | None:
        """What is kept for an adapter of a linear; None where nothing may be, or it is not that simple."""
        items = layer.updates[adapter]
        item = items[0]
        if not item.run.direct or item.side or adapter in layer.tnpeft_magnitude or not _plain(layer.base_layer):
            return None
        if any(operand.source == "base" for operand in item.operands):
            return None
        sources = []
        for operand in item.operands:
            table = layer.owner(operand).tnpeft_factors[adapter].table(operand.key)
            sources.append((table, operand.key, table.get(operand.key)))
        arrays = tuple(array for _, _, array in sources)
        if not may_keep(arrays, x.device.type) or any(a.dtype != x.dtype or a.device != x.device for a in arrays):
            return None
        first, last, sign = item.run.matrices(layer.values(adapter, item, x))
        active, scale = layer._active_adapter, sign * item.scale
        active = active if isinstance(active, str) else [*active]
        return Direct(active, tuple(sources), arrays, Stamps(arrays), first.t(), last.t(), scale)

    def __call__(self, layer: TensorNetworkLinear, x: Tensor) -> Tensor | None:
        """The linear's output with the update, ``[..., out]``; None if anything is not as it was."""
        base: nn.Linear = layer._modules["base_layer"]  # type: ignore[assignment]
        if (
            layer.training
            or layer._disable_adapters
            or layer.merged_adapters
            or layer._active_adapter != self.active
            or x.dtype != self.first.dtype
            or not _plain(base)
            or not quiet(x.device.type)
        ):
            return None
        for table, key, source in self.sources:
            if table.get(key) is not source:
                return None
        if not self.stamps.hold(self.arrays):
            return None
        own = base._parameters
        result = linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
        last = self.last
        result.view(-1, last.shape[1]).addmm_(x.reshape(-1, x.shape[-1]).mm(self.first), last, alpha=self.scale)
        return result


def _plain(base: nn.Module) -> bool:
    """Whether the module is torch's own linear and nothing looks on when it is called."""
    return (
        type(base) is nn.Linear
        and not base._forward_hooks
        and not base._forward_pre_hooks
        and "forward" not in base.__dict__
        and type(base._parameters.get("weight")) is nn.Parameter
        and not hooked()
    )
