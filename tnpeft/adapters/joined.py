"""Training with one adapter: the base linear and the update as one operation, and little else to do per call.

A linear is asked anew at every call which adapters there are, where their factors lie and whether anything looks on.
What that was answered with is kept and compared instead; the factors themselves are fetched every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tnpeft.adapters.update import Update
from tnpeft.nn.together import may_join

if TYPE_CHECKING:
    from tnpeft.adapters.layer import TensorNetworkLinear


@dataclass(frozen=True, eq=False)
class Joined:
    """One adapter of a linear that can be one operation with it, and where its factors are kept."""

    adapter: str
    active: str | list[str]
    item: Update
    tables: tuple[tuple[dict[str, Tensor | None], str], ...]

    @staticmethod
    def of(layer: TensorNetworkLinear) -> Joined | None:
        """What is kept for a linear's one active adapter; None if there are several, or it is not that simple."""
        active = [adapter for adapter in layer.active_adapters if adapter in layer.updates]
        if len(active) != 1 or active[0] in layer.tnpeft_magnitude:
            return None
        item = layer.updates[active[0]][0]
        if item.side or any(operand.source == "base" for operand in item.operands):
            return None
        tables = tuple(
            (layer.owner(operand).tnpeft_factors[active[0]].table(operand.key), operand.key)
            for operand in item.operands
        )
        now = layer._active_adapter
        return Joined(active[0], now if isinstance(now, str) else [*now], item, tables)

    def holds(self, layer: TensorNetworkLinear) -> bool:
        """Whether this is still the adapter to use, if any is."""
        return layer._active_adapter == self.active

    def factors(self, layer: TensorNetworkLinear, x: Tensor) -> list[Tensor] | None:
        """The factors, raw; None if the linear, called with ``x``, would not be one operation with its update."""
        if (
            layer._disable_adapters
            or layer.merged_adapters
            or (layer.training and layer.dropouts[self.adapter])
            or not may_join(layer._modules["base_layer"], x)  # type: ignore[arg-type]
        ):
            return None
        if layer._modules["base_layer"]._parameters.get("weight") is None:  # type: ignore[union-attr]
            return None  # it is computed, or kept elsewhere
        found = [table.get(key) for table, key in self.tables]
        dtype, device = x.dtype, x.device
        for array in found:
            if type(array) not in (nn.Parameter, Tensor) or array.dtype != dtype or array.device != device:  # type: ignore[union-attr]
                return None
        return found  # type: ignore[return-value]

    def __call__(self, layer: TensorNetworkLinear, x: Tensor) -> Tensor | None:
        """The linear's output with the update, ``[..., out]``; None where that takes more than one operation."""
        factors = self.factors(layer, x)
        if factors is None:
            return None
        siblings = layer.siblings.get(self.adapter)
        if siblings is not None and (shared := siblings.forward(layer, self, x, factors)) is not None:
            return shared
        own, item = layer._modules["base_layer"]._parameters, self.item  # type: ignore[union-attr]
        weight, bias = own["weight"], own["bias"]
        assert weight is not None  # it may join
        return item.run.with_linear(x, factors, weight, bias, item.scale, item.norms)
