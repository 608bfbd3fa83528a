"""The linear that adds a tensor-network update to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.layer.checkpointing import backward_task, check_recomputation, refuse_reentrant, saving_hooks
from tnpeft.adapters.layer.fast_path import ActiveAdapter, InferenceFastPath
from tnpeft.adapters.layer.merging import DenseLinear, Route
from tnpeft.adapters.layer.mixed_batch import adapters_of_rows, block_rows, group_by_network, update_blocks
from tnpeft.adapters.layer.weight_cache import WeightCache, is_cacheable
from tnpeft.adapters.sites.selection import check_rows
from tnpeft.layout import ParameterSpec
from tnpeft.nn.executor.eligibility import added, can_use_custom_backward, why_not_fused
from tnpeft.nn.executor.program import Program

FUSED = Route("fused", "")


class TensorNetworkLinear(DenseLinear):
    """A linear (``nn.Linear``, ``Conv1D`` or quantised) with the updates of its adapters.

    The forward is a pure function of its input and of Parameters fetched at every call: the linear's own ones and,
    through an unregistered reference, those of the bank.
    """

    def __init__(self, base_layer: nn.Module, bank: FactorBank, **kwargs: Any) -> None:
        super().__init__(base_layer, bank, **kwargs)
        self._cache = WeightCache()

    def prepared(self, adapter: str, item: SiteUpdate, x: Tensor) -> list[Tensor] | None:
        """Return what one site's update computes from factors alone; None where it may not be kept."""
        if self.training or not item.keeps or item.stack:
            return None
        sources = self._arrays(adapter, item)
        return self._cache.get(
            (adapter, item.start), sources, x, lambda: item.program.prepare(self.operands(adapter, item, x))
        )

    def _run(self, adapter: str, item: SiteUpdate, x: Tensor, result: Tensor | None) -> Tensor:
        """``result`` plus one site's update of ``x``; the update alone in the wider dtype of ``x`` and factors."""
        kept = self.prepared(adapter, item, x)
        if kept is None:
            dtype = self._compute_dtype(adapter, x)
            return self._program(item, x)(x, self.operands(adapter, item, x, dtype), result, item.scale)
        return item.program.apply(x, kept, result, item.scale)

    def _program(self, item: SiteUpdate, x: Tensor) -> Program:
        """The program of a call with ``x``: of one value of each named stack index, or of one for each row."""
        if not item.stack:
            return item.program
        rows, count = item.rows(self.bank.selected)
        if rows:
            check_rows(x.shape, count)
        return item.by_rows(rows, count)

    def register_factors(self, adapter: str, pieces: Mapping[ParameterSpec, Tensor], kept: bool) -> None:
        """Own the arrays of an adapter, and forget what inference has kept of one of that name."""
        self._cache.clear()
        super().register_factors(adapter, pieces, kept)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and what inference has kept of it."""
        self._cache.clear()
        super().delete_adapter(adapter_name)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget what inference has kept."""
        self._cache.clear()
        return super().train(mode)

    def refresh(self) -> None:
        """Forget what inference has kept."""
        self._cache.clear()

    def _update(self, adapter: str, x: Tensor, result: Tensor | None) -> Tensor:
        """``result`` plus the adapter's update of ``x``; for None the update alone, in the wider dtype of both."""
        items, dtype = self.updates[adapter], self._compute_dtype(adapter, x)
        if x.dtype != dtype and not can_use_custom_backward(x):  # such a pass casts, and keeps what it was given
            x = x.to(dtype)
        if not items[0].side:
            return self._run(adapter, items[0], x, result)
        if result is None:
            result = x.new_zeros((*x.shape[:-1], self.out_features), dtype=dtype)
        parts, at = [], 0
        for item in items:
            if item.side == "inp":
                result = self._run(adapter, item, x.narrow(-1, item.start, item.length), result)
            else:
                before, rows = result.narrow(-1, at, item.start - at), result.narrow(-1, item.start, item.length)
                parts += [before, self._run(adapter, item, x, rows)]
                at = item.start + item.length
        if not parts:
            return result
        parts.append(result.narrow(-1, at, self.out_features - at))
        return torch.cat([part for part in parts if part.shape[-1]], dim=-1)

    def _adapted(self, adapter: str, x: Tensor, result: Tensor, base: Tensor) -> Tensor:
        """``result`` with the update of one adapter added; ``base`` is the output of the base linear alone."""
        drop = self.dropouts[adapter]
        if drop and self.training:
            x = nn.functional.dropout(x, drop)
        if adapter in self.tnpeft_magnitude:
            return added(result, self._dora(adapter, x, base, dropped=bool(drop) and self.training))
        dtype = self._compute_dtype(adapter, x)
        if x.dtype == dtype == result.dtype:
            return self._update(adapter, x, result)
        return added(result, self._update(adapter, x, None))

    def _dora(self, adapter: str, x: Tensor, base: Tensor, dropped: bool) -> Tensor:
        """Return what rescaling the rows to the learned magnitudes adds to ``base`` (arXiv 2402.09353, 4.3)."""
        ratio, bias = self._ratio(adapter, x.dtype), self.get_base_layer().bias
        dtype = ratio.dtype
        if dropped:
            plain = nn.functional.linear(x.to(dtype), self.base_matrix().to(dtype))
        else:
            plain = base.to(dtype) if bias is None else base.to(dtype) - bias.to(dtype)
        return (ratio - 1) * plain + ratio * self._update(adapter, x, None)

    # ---- which path a call takes

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base linear's output plus the updates of the active adapters, or of each row's own adapter."""
        plain = not args and not kwargs
        if plain and adapter_names is None and not torch.compiler.is_compiling():
            grads = torch.is_grad_enabled()
            inside = saving_hooks(True) is not None or backward_task() != -1 or (self.training and not grads)
            if inside and (seen := check_recomputation(self)) is not None:  # inside a checkpoint, perhaps
                with self.bank.selecting(seen):
                    return self.forward(x)
            if not grads and (path := self._cache.inference) is not None and (result := path(self, x)) is not None:
                return result  # type: ignore[no-any-return]
        route, known, factors = self.path(x, adapter_names, plain)
        if route is FUSED:
            item = known.item
            if factors is None:
                factors, base = self.operands(known.adapter, item, x), self.base_layer
                return self._program(item, x).with_linear(x, factors, base.weight, base.bias, item.scale)
            group = self.input_groups.get(known.adapter)
            if group is not None and (shared := group.forward(self, known, x, factors)) is not None:
                return shared
            own = self._modules["base_layer"]._parameters
            operands = item.normalized(factors) if item.norms else factors
            return item.program.with_linear(x, operands, own["weight"], own["bias"], item.scale)
        if route.kind in ("base", "merged"):
            return self.base_layer(x, *args, **kwargs)
        refuse_reentrant(self.bank)
        if route.kind == "cached" and plain:
            self._cache.inference = path = InferenceFastPath.of(self, known, x)
            if path is not None and (result := path(self, x)) is not None:
                return result
        result = base = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, base, adapter_names)
        for adapter in self.active_here:
            result = self._adapted(adapter, x, result, base)
        return result

    def route(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Route:
        """The path of a call with ``x``, see :class:`Route`; shared if other layers take their first product too."""
        route, known, factors = self.path(x, adapter_names)
        group = None if factors is None else self.input_groups.get(known.adapter)
        if group is not None and group.worthwhile(x) and len(ready := group.ready(x)) > 1 and self in ready:
            return Route("shared", "")
        return route

    def path(
        self, x: Tensor, adapter_names: Sequence[str] | None = None, plain: bool = True
    ) -> tuple[Route, ActiveAdapter, list[Tensor] | None]:
        """Return the path of a call, what is known of its active adapter, and factors that are at hand as they are.

        ``plain``: the base layer is called with ``x`` alone. Factors are those of a fused path in eager mode; None if
        they are to be cast, moved, selected, gathered or computed, or the weight of the base layer is.
        """
        compiling = torch.compiler.is_compiling()
        known: ActiveAdapter | None = None if compiling else self._cache.active
        if known is None or known.active != self._active_adapter:
            known = ActiveAdapter.of(self, compiling)
            if not compiling:
                self._cache.active = known
        merged = self.merged_adapters or self._bank[0].merged_adapters
        if adapter_names is not None or self._disable_adapters or merged or not known.adapter:
            return self.route_by_state(adapter_names), known, None  # type: ignore[return-value]
        own: Any = self._modules["base_layer"]
        if known.apart:
            reason = known.apart
        elif not plain:
            reason = "the base layer is called with further arguments"
        elif self.training and self.dropouts[known.adapter]:
            reason = "dropout in training"
        else:
            reason = why_not_fused(own, x)
        if not reason:
            factors: list[Any] = [table.get(key) for table, key in known.tables]
            dtype, device = x.dtype, x.device
            for array in factors:
                if type(array) not in (nn.Parameter, Tensor) or array.dtype != dtype or array.device != device:
                    break
            else:
                if factors and own._parameters.get("weight") is not None:  # else it is computed, or kept elsewhere
                    return FUSED, known, factors
            if dtype == self._compute_dtype(known.adapter, x):
                return FUSED, known, None
            reason = "the factors are wider than the input"
        return Route("cached" if self._cacheable(known, x) else "plain", reason), known, None

    def _cacheable(self, known: ActiveAdapter, x: Tensor) -> bool:
        """Return True if results computed from factors alone, or which these are, may be kept from call to call."""
        item = known.item
        if self.training or item.stack or torch.compiler.is_compiling() or (not item.keeps and item.thin is None):
            return False
        return is_cacheable(self._arrays(known.adapter, item), x.device.type)

    def _mixed(self, x: Tensor, base: Tensor, names: Sequence[str]) -> Tensor:
        """``base`` with the update of every row's own adapter added."""
        result = base.clone()
        for group in group_by_network(self, adapters_of_rows(self, names, x), x):
            rows, own = (torch.tensor(places, device=x.device) for places in block_rows(group, names))
            given = base[rows]
            if len(group) == 1:
                adapted = self._adapted(group[0], x[rows], given, given)
            else:
                adapted = update_blocks(self, group, x[rows], given)
            result[rows[own]] = adapted[own]
        return result
