"""A fused weight of experts with the updates of its adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.experts.fused import is_eager
from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.layer.merging import Route, rescaled, rescaling
from tnpeft.adapters.layer.mixed_batch import BASE
from tnpeft.adapters.sites.parameter import HeldWeight
from tnpeft.nn.executor.eligibility import added, autocast_active, can_use_custom_backward
from tnpeft.nn.executor.grouped import Part, grouped_linear
from tnpeft.nn.executor.groups import Groups

Prepare = Callable[[Tensor], Tensor]


class ExpertWeight(HeldWeight):
    """One fused Parameter of a module of experts, ``[expert, out, inp]``, and the factors of its adapters.

    It stands where the Parameter stood, which stays in the module of experts.
    """

    def region(self, item: SiteUpdate) -> tuple[slice, slice]:
        """The output and input features of a site."""
        return self.stored.region(item.site_layout.site)

    # ---- forward

    def forward(
        self, source: Tensor, groups: Groups, prepare: Prepare | None = None, names: Sequence[str] | None = None
    ) -> Tensor:
        """The product of each row with its expert's matrix, with the updates: ``[rows, out]`` for sorted rows.

        Args:
            source: the rows ``[rows, inp]``, or what ``prepare`` makes them from.
            groups: the expert of each row.
            prepare: a cheap function, in whose place the source is kept for the backward pass.
            names: the adapter of each row, for a batch of several.
        """
        weight, own = self._oriented(), self._bias()
        active = self.active_here if self.route_by_state(names) is None else []
        inside = [adapter for adapter in active if not self._why_apart(adapter, source)]
        if prepare is not None and len(inside) < len(active):
            source, prepare = prepare(source), None
        parts = [part for adapter in inside for part in self._parts(adapter, source)]
        if names is not None or self._why_not_one(source):
            source = source if prepare is None else prepare(source)
            result = self._base(source, groups, weight, own)
        else:
            result = grouped_linear(source, groups, parts, weight, own, prepare)
        base = result
        for adapter in active:
            if adapter not in inside:
                result = added(result, self._apart(adapter, source, base, groups))
        return result if names is None else self._mixed(source, base, groups, names)

    def _oriented(self) -> Tensor:
        """The weight as it stands right of the rows, ``[expert, inp, out]``."""
        return self.weight if self.transposed else self.weight.mT

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.get_base_layer(), f"{self.weight_name}_bias", None)
        return bias

    def _base(self, x: Tensor, groups: Groups, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output without updates, by operations that autograd sees; autocast acts where the experts let it."""
        kind = x.device.type
        cast = autocast_active(kind) and is_eager(self.get_base_layer())
        dtype = torch.get_autocast_dtype(kind) if cast else weight.dtype
        with torch.autocast(kind, enabled=False):
            result = groups.matmul(x.to(dtype), weight.to(dtype))
        return result if bias is None else result + groups.gather(bias)

    def idle(self) -> bool:
        """True if no update is to be added: the adapters are switched off or merged."""
        return self.disable_adapters or self.merged

    def _parts(self, adapter: str, x: Tensor) -> list[Part]:
        self._refuse_several(adapter)  # rows of experts are tokens, in an order of their own
        items = self.updates[adapter]
        return [Part(it.program, tuple(self.operands(adapter, it, x)), it.scale, *self.region(it)) for it in items]

    def _why_apart(self, adapter: str, x: Tensor) -> str:
        """Why an update is not one operation with the product with the weight; empty if it is."""
        if adapter in self.tnpeft_magnitude:
            return "DoRA rescales the output"
        if self.training and self.dropouts[adapter]:
            return "dropout in training"
        if x.dtype != self._compute_dtype(adapter, x):
            return "the factors are wider than the input"
        return self._why_not_one(x)

    def _why_not_one(self, x: Tensor) -> str:
        if autocast_active(x.device.type):
            return "autocast is active"
        if x.dtype != self.weight.dtype:
            return "the input's dtype is not the base weight's"
        bias = self._bias()
        trained = self.weight.requires_grad or (bias is not None and bias.requires_grad)
        return "the base weight is trained" if trained else ""

    def _compute_dtype(self, adapter: str, x: Tensor) -> torch.dtype:
        own = self.updates[adapter][0].trained
        held = x if own is None else self.owner(own).tnpeft_factors[adapter].get(own.key)
        return torch.promote_types(x.dtype, held.dtype)

    def _apart(self, adapter: str, x: Tensor, base: Tensor, groups: Groups) -> Tensor:
        """Return what one adapter adds to ``base``, the output of the weight alone, computed apart."""
        drop = self.dropouts[adapter] if self.training else 0.0
        rows = x.to(self._compute_dtype(adapter, x))
        if drop:
            rows = nn.functional.dropout(rows, drop)
        with torch.autocast(x.device.type, enabled=False):
            change = grouped_linear(rows, groups, self._parts(adapter, rows), width=self.out_features)
            if adapter in self.tnpeft_magnitude:
                change = self._rescaled(adapter, rows, base, change, groups, bool(drop))
        return change

    def _rescaled(
        self, adapter: str, x: Tensor, base: Tensor, update: Tensor, groups: Groups, dropped: bool
    ) -> Tensor:
        """Return what rescaling each used expert's rows to the learned magnitudes adds (arXiv 2402.09353)."""
        magnitude = self.tnpeft_magnitude[adapter].to(x.dtype)
        ratio = groups.gather(rescaling(magnitude, self._lengths(adapter, groups).to(x.dtype)))
        product = groups.matmul(x, self._oriented().to(x.dtype)) if dropped else None
        bias = None if dropped or (own := self._bias()) is None else groups.gather(own)
        return rescaled(ratio, base, bias, update, product)

    @torch.no_grad()
    def _lengths(self, adapter: str, groups: Groups) -> Tensor:
        """The lengths of the updated matrices' rows, ``[expert, out]``; one used expert's matrix at a time."""
        base = self.base_matrix()
        found = base.new_ones((self.experts, self.out_features))
        items = self.updates[adapter]
        arrays = [self.operands(adapter, item) for item in items]
        for expert, _, _ in groups.used():
            matrix = base[expert].clone()
            for item, operands in zip(items, arrays, strict=True):
                matrix[self.region(item)] += item.program.delta_of(expert, operands, item.scale)
            found[expert] = matrix.norm(dim=-1)
        return found

    def _mixed(self, x: Tensor, base: Tensor, groups: Groups, names: Sequence[str]) -> Tensor:
        """``base`` with the update of every row's own adapter added."""
        result = base
        for adapter in dict.fromkeys(names):
            if adapter == BASE or adapter not in self.updates:
                continue
            rows = torch.tensor([k for k, name in enumerate(names) if name == adapter], device=x.device)
            change = self._apart(adapter, x[rows], base[rows], groups.subset(rows))
            result = result.index_add(0, rows, change.to(base.dtype))
        return result

    # ---- what is asked about it

    @torch.no_grad()
    def seen(
        self, most: int, source: Tensor, groups: Groups, prepare: Prepare | None = None, names: Any = None
    ) -> tuple[Tensor, Groups]:
        """Some of the rows that a call of :meth:`forward` sees, evenly from all experts, and their experts."""
        x = source.detach() if prepare is None else prepare(source.detach())
        rows = torch.arange(0, len(x), -(-len(x) // most), device=x.device)
        return x[rows], groups.subset(rows)

    def route_of_update(self, x: Tensor) -> Route:
        """The path of a call with rows such as ``x`` and updates: fused or plain, and why."""
        reason = self._why_apart(self.active_here[0], x)
        if not reason and not can_use_custom_backward(x):
            reason = "gradients are disabled" if not torch.is_grad_enabled() else "a transform sees every operation"
        return Route("plain", reason) if reason else Route("fused", "rows are grouped by expert")
