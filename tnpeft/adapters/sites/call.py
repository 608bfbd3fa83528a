"""A layer of another kind than a linear that is called with an input: its output plus the updates of its adapters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.layer.checkpointing import check_recomputation, refuse_reentrant
from tnpeft.adapters.layer.merging import DenseLinear, Route
from tnpeft.adapters.layer.mixed_batch import adapters_of_rows
from tnpeft.networks import REPLICA, Network, NetworkError
from tnpeft.nn.executor.eligibility import added

Apply = Callable[[Any, Tensor, Mapping[str, Tensor]], Tensor]  # of the base layer, its input, and factors by label


class CalledLayer(DenseLinear):
    """The base of embeddings and convolutions. A kind says how it applies one site's update to an input.

    Adapters of several values (replicas, or values of a named stack by row) meet a batch block by block.
    """

    @abstractmethod
    def compiled(self, item: SiteUpdate) -> tuple[str, Apply]:
        """How one site's update is applied, in words, and the function that does: the layer's update, not scaled."""

    @abstractmethod
    def change(self, adapter: str, x: Tensor, base: Tensor) -> Tensor:
        """Return what an adapter adds to ``base``, the output of the base layer alone."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's conversion makes LoRAs of linears alone."""
        return False

    def applied(self, item: SiteUpdate) -> tuple[str, Apply]:
        """Return what :meth:`compiled` gives, once for every update."""
        return item.cached("applied", partial(self.compiled, item))  # type: ignore[no-any-return]

    def prepare(self, adapter: str) -> None:
        """Compute what depends on the networks alone, so that a forward only looks it up."""
        for item in self.updates[adapter]:
            self.applied(item)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters, or of each row's own adapter."""
        if (seen := check_recomputation(self)) is not None:
            with self.bank.selecting(seen):
                return self.forward(x, *args, adapter_names=adapter_names, **kwargs)
        base: Tensor = self.base_layer(x, *args, **kwargs)
        if self.route(x, adapter_names).kind in ("base", "merged"):
            return base
        refuse_reentrant(self.bank)
        if adapter_names is not None:
            return self._mixed(x, base, adapter_names)
        result = base
        for adapter in self.active_here:
            result = added(result, self.change(adapter, x, base))
        return result

    def route_of_update(self, x: Tensor) -> Route:
        """The path of a call with updates, and how they are applied."""
        return Route("plain", self.applied(self.updates[self.active_here[0]][0])[0])

    def update_of(self, adapter: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The adapter's scaled update of ``x``, of factors in a dtype."""
        first, *rest = (self._by_block(adapter, item, x, dtype) * item.scale for item in self.updates[adapter])
        return sum(rest, first)

    def _by_block(self, adapter: str, item: SiteUpdate, x: Tensor, dtype: torch.dtype) -> Tensor:
        apply, base, params = self.applied(item)[1], self.get_base_layer(), item.site_layout.parameters
        arrays = dict(zip(item.program.labels, self.operands(adapter, item, x, dtype), strict=True))
        rows, count = item.rows(self.bank.selected) if item.stack else ((REPLICA,), item.program.replicas)
        own = {label for label in arrays if any(index in rows for index in params[label].indices)}
        if not own:
            return apply(base, x, arrays)
        if len(x) % count:
            what = "values, one for each row" if item.stack else "replicas"
            raise NetworkError(
                f"batch size {len(x)} is not divisible by {count} {what}",
                remedy="let the batch be one block of equally many rows for each, in their order",
            )
        parts = []
        for k, block in enumerate(x.chunk(count)):
            values = {label: array[k] if label in own else array for label, array in arrays.items()}
            parts.append(apply(base, block, values))
        return torch.cat(parts)

    def _mixed(self, x: Tensor, base: Tensor, names: Sequence[str]) -> Tensor:
        """``base`` with the update of every row's own adapter added."""
        result = base.clone()
        for adapter in adapters_of_rows(self, names, x):
            rows = torch.tensor([k for k, name in enumerate(names) if name == adapter], device=x.device)
            result[rows] = added(base[rows], self.change(adapter, x[rows], base[rows]))
        return result


def network_of(item: SiteUpdate) -> Network:
    """The network of one update: of one replica, and of one value of each named stack index."""
    net = item.program.plan.network
    return net.select(REPLICA) if REPLICA in net.stack else net
