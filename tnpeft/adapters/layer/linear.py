"""The linear that adds a tensor-network update to its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.layer.checkpointing import backward_task, check_recomputation, refuse_reentrant, saving_hooks
from tnpeft.adapters.layer.merging import DenseLinear, Route, rescaled
from tnpeft.adapters.layer.mixed_batch import adapters_of_rows, block_rows, group_by_network, update_blocks
from tnpeft.adapters.layer.weight_cache import is_cacheable, kept, observed
from tnpeft.adapters.sites.selection import check_rows
from tnpeft.nn.executor.eligibility import NO_GRADIENTS, added, can_use_custom_backward, why_not_fused
from tnpeft.nn.executor.program import Program

FUSED = Route("fused", "")
_THIN = Route("cached", NO_GRADIENTS)


@dataclass(frozen=True, eq=False)
class ActiveAdapter:
    """The active adapter of a linear, the first if there are several; ``""`` if none has an update of it.

    ``apart`` says why its update is never one operation with the linear, ``tables`` where its factors are kept; there
    are none if some are chosen or computed at each call. What it depends on besides ``active`` is fixed once an
    adapter is attached: to ask for it takes as long as one token's product.
    """

    active: str | list[str]
    adapter: str
    item: SiteUpdate
    apart: str
    tables: tuple[tuple[dict[str, Tensor | None], str], ...]

    @staticmethod
    def of(layer: DenseLinear, compiling: bool) -> ActiveAdapter:
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

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the linear asks again


class TensorNetworkLinear(DenseLinear):
    """A linear with the updates of its adapters.

    The forward is a pure function of its input and of Parameters that are fetched at every call.
    """

    def __init__(self, base_layer: nn.Module, bank: FactorBank, **kwargs: Any) -> None:
        super().__init__(base_layer, bank, **kwargs)
        self._known: ActiveAdapter | None = None

    def _run(self, adapter: str, item: SiteUpdate, x: Tensor, result: Tensor | None) -> Tensor:
        """``result`` plus one site's update of ``x``; the update alone in the wider dtype of ``x`` and factors."""
        operands = partial(self.operands, adapter, item, x, self._compute_dtype(adapter, x))
        return item.run(self._program(item, x), x, result, operands, self._sources(adapter, item, x))

    def _sources(self, adapter: str, item: SiteUpdate, x: Tensor) -> list[Tensor] | None:
        """The factors of a site's update from which something is computed that may be kept; None if nothing is."""
        if self.training or item.stack or not item.keeps or torch.compiler.is_compiling():
            return None
        sources = self._arrays(adapter, item)
        return sources if is_cacheable(sources, x.device.type) else None

    def _program(self, item: SiteUpdate, x: Tensor) -> Program:
        """The program of a call with ``x``: of one value of each named stack index, or of one for each row."""
        rows, count = item.rows(self.bank.selected)
        if rows:
            check_rows(x.shape, count)
        return item.by_rows(rows, count)

    def prepare(self, adapter: str) -> None:
        """Ask again which adapter is active: it may be this one."""
        self._known = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget what inference has kept."""
        for item in (item for items in self.updates.values() for item in items):
            item.kept.clear()
        return super().train(mode)

    def _update(self, adapter: str, x: Tensor, result: Tensor | None) -> Tensor:
        """``result`` plus the adapter's update of ``x``; for None the update alone, in the wider dtype of both."""
        items, dtype = self.updates[adapter], self._compute_dtype(adapter, x)
        if x.dtype != dtype and not can_use_custom_backward(x):  # such a pass casts, and keeps what it was given
            x = x.to(dtype)
        if items[0].side != "out":
            for item in items:
                result = self._run(adapter, item, self.site_input(item, x), result)
            return result  # type: ignore[return-value]  # there is at least one site
        if result is None:
            result = x.new_zeros((*x.shape[:-1], self.out_features), dtype=dtype)
        parts = [*result.tensor_split([edge for it in items for edge in (it.start, it.start + it.length)], -1)]
        for k, item in enumerate(items):
            parts[2 * k + 1] = self._run(adapter, item, x, parts[2 * k + 1])
        return torch.cat([part for part in parts if part.shape[-1]], -1)

    def _adapted(self, adapter: str, x: Tensor, result: Tensor, base: Tensor) -> Tensor:
        """``result`` with the update of one adapter added; ``base`` is the output of the base linear alone."""
        drop = self.dropouts[adapter] if self.training else 0.0
        if drop:
            x = nn.functional.dropout(x, drop)
        dora = adapter in self.tnpeft_magnitude
        if not dora and x.dtype == result.dtype == self._compute_dtype(adapter, x):
            return self._update(adapter, x, result)
        update = self._update(adapter, x, None)
        if dora:
            ratio = self._ratio(adapter, x.dtype)
            product = nn.functional.linear(x.to(ratio.dtype), self.base_matrix().to(ratio.dtype)) if drop else None
            update = rescaled(ratio, base, self.get_base_layer().bias, update, product)
        return added(result, update)

    # ---- which path a call takes

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base linear's output plus the updates of the active adapters, or of each row's own adapter."""
        if not torch.compiler.is_compiling():
            reentrant = self.training and not torch.is_grad_enabled()
            inside = reentrant or saving_hooks(True) is not None or backward_task() != -1  # a checkpoint, perhaps
            if inside and (seen := check_recomputation(self)) is not None:
                with self.bank.selecting(seen):
                    return self.forward(x, *args, adapter_names=adapter_names, **kwargs)
        route, known, factors = self.path(x, adapter_names, plain=not args and not kwargs)
        if route is FUSED:
            item = known.item
            if factors is None:
                factors, base = self.operands(known.adapter, item, x), self.base_layer
                return self._program(item, x).with_linear(x, factors, base.weight, base.bias, item.scale)
            group = self.input_groups.get(known.adapter)
            if group is not None and (shared := group.forward(self, item, x, factors)) is not None:
                return shared
            own = self._modules["base_layer"]._parameters
            operands = item.normalized(factors) if item.norms else factors
            return item.program.with_linear(x, operands, own["weight"], own["bias"], item.scale)
        if factors is not None and not self._bank[0].watching:
            return self._thin(known.item, x, factors)
        if route.kind in ("base", "merged"):
            return self.base_layer(x, *args, **kwargs)
        refuse_reentrant(self.bank)
        result = base = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, base, adapter_names)
        for adapter in self.active_here:
            result = self._adapted(adapter, x, result, base)
        return result

    def _thin(self, item: SiteUpdate, x: Tensor, factors: list[Tensor]) -> Tensor:
        """The linear's output with an update through its two thin matrices, which are kept."""
        last, first = kept(item.kept, "thin", factors, lambda: item.thin(factors))  # type: ignore[misc]
        own = self._modules["base_layer"]._parameters
        result = nn.functional.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
        rows, flat = x.reshape(-1, x.shape[-1]), result.view(-1, last.shape[1])
        if result.dtype == last.dtype:
            flat.addmm_(rows.mm(first), last, alpha=item.scale)
        else:  # rounded once, on the way into the result
            flat.add_(rows.to(last.dtype).mm(first).mm(last), alpha=item.scale)
        return result

    def route(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Route:
        """The path of a call with ``x``, see :class:`Route`; shared if other layers take their first product too."""
        route, known, factors = self.path(x, adapter_names)
        group = self.input_groups.get(known.adapter) if route is FUSED and factors else None
        if group is not None and group.worthwhile(x) and len(ready := group.ready(x)) > 1 and self in ready:
            return Route("shared", "")
        return route

    def path(
        self, x: Tensor, adapter_names: Sequence[str] | None = None, plain: bool = True
    ) -> tuple[Route, ActiveAdapter, list[Tensor] | None]:
        """Return the path of a call, what is known of its active adapter, and factors that are at hand as they are.

        ``plain``: the base layer is called with ``x`` alone. Factors are those of one operation with the linear in
        eager mode, fused or through thin matrices; None if they are to be cast, moved, selected, gathered or
        computed, or the weight of the base layer is.
        """
        compiling = torch.compiler.is_compiling()
        known = None if compiling else self._known
        if known is None or known.active != self._active_adapter:
            known = ActiveAdapter.of(self, compiling)
            if not compiling:
                self._known = known
        merged = self.merged_adapters or self._bank[0].merged_adapters
        if adapter_names is not None or self._disable_adapters or merged or not known.adapter:
            return self.route_by_state(adapter_names), known, None  # type: ignore[return-value]
        own, item = self._modules["base_layer"], known.item
        if known.apart:
            reason = known.apart
        elif not plain:
            reason = "the base layer is called with further arguments"
        elif self.training and self.dropouts[known.adapter]:
            reason = "dropout in training"
        else:
            reason = why_not_fused(own, x)  # type: ignore[arg-type]
        if not reason or (reason == NO_GRADIENTS and not self.training):
            factors: list[Any] = [table.get(key) for table, key in known.tables]
            dtype, device = x.dtype, x.device
            if reason and factors and factors[0] is not None:
                dtype = torch.promote_types(dtype, factors[0].dtype)
            for array in factors:
                if type(array) not in (nn.Parameter, Tensor) or array.dtype != dtype or array.device != device:
                    break
                if reason and array.is_inference():  # it has no version
                    break
            else:
                if factors and own._parameters.get("weight") is not None:  # type: ignore[union-attr]
                    if not reason:
                        return FUSED, known, factors
                    if item.thin is not None and not observed():
                        return _THIN, known, factors
            if not reason:
                if x.dtype == self._compute_dtype(known.adapter, x):
                    return FUSED, known, None
                reason = "the factors are wider than the input"
        return Route("plain" if self._sources(known.adapter, item, x) is None else "cached", reason), known, None

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
