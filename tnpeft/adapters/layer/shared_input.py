"""Linears that read one input, such as q, k and v: the first products of their updates are one product.

The first layer of the group to run computes the projection for all; the others reuse it if they receive the same
tensor object and nothing has changed. The pending result is weakly referenced and freed with the autograd graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.layer.weight_cache import versions
from tnpeft.nn.executor.shared_projection import project

MIN_ELEMENTS = 2**17  # of an input, from which on reading it once takes less time than arranging for that


def join(adapter: str, linears: Iterable[Any]) -> None:
    """Make a group of the linears, which read one input, for an adapter's updates that can share a first product."""
    group = SharedInputGroup(adapter, [one for one in linears if one.updates[adapter][0].program.prefix])
    for linear in group.linears if len(group.linears) > 1 else ():
        linear.input_groups[adapter] = group


def _state(x: Tensor, factors: Sequence[Tensor]) -> list[Any]:
    """Return what shows any change of an input, of its place in the graph, or of which the factors are."""
    return [x.shape, x.grad_fn, *map(id, factors), *versions([x, *factors])]


class PendingProjection:
    """The results on one input for the linears that have not run yet."""

    def __init__(self, x: Tensor, rows: Tensor) -> None:
        self.x: Tensor | None = x
        self.rows: Tensor | None = rows
        self.waiting: dict[DenseLinear, tuple[Tensor, list[Any], Sequence[Tensor]]] = {}

    def holds(self, linear: DenseLinear, x: Tensor, factors: Sequence[Tensor]) -> bool:
        """Return True if a result waits for the linear, and neither input nor factors have changed."""
        return self.x is x and linear in self.waiting and self.waiting[linear][1] == _state(x, factors)


class SharedInputGroup:
    """Linears with one adapter that read one input. Copies have nothing pending."""

    def __init__(self, adapter: str, linears: Iterable[DenseLinear]) -> None:
        self.adapter, self.linears = adapter, tuple(linears)
        self._pending: weakref.ref[PendingProjection] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None}

    @staticmethod
    def worthwhile(x: Tensor) -> bool:
        """Return True if an input is large enough to be read once for all."""
        return x.numel() >= MIN_ELEMENTS and type(x) is Tensor

    def forward(self, linear: DenseLinear, item: SiteUpdate, x: Tensor, factors: Sequence[Tensor]) -> Tensor | None:
        """Return the linear's output with its update; None if no other one can share its first product.

        ``item`` is the linear's own update, ``factors`` are its factors.
        """
        if not (self.worthwhile(x) and all(factor.is_leaf for factor in factors)):
            return None  # FSDP1's views: a recomputation does not find them there, and would take another path
        pending = None if self._pending is None else self._pending()
        if pending is None or not pending.holds(linear, x, factors):
            pending = self._begin(linear, x)
        if pending is None:
            return None
        (narrow, _, operands), rows = pending.waiting.pop(linear), pending.rows
        assert rows is not None  # something still waited
        own = linear._modules["base_layer"]._parameters  # type: ignore[union-attr]
        weight, bias = own["weight"], own["bias"]
        assert weight is not None  # the path holds
        result = item.program.with_linear(rows, operands, weight, bias, item.scale, narrow)
        if not pending.waiting:
            pending.x = pending.rows = None
        elif result.grad_fn is not None:
            result.grad_fn.pending = pending  # type: ignore[attr-defined]
        return result.reshape(*x.shape[:-1], item.program.rows)

    def ready(self, x: Tensor) -> dict[DenseLinear, tuple[SiteUpdate, list[Tensor]]]:
        """Return the linears that could share their first products on ``x``, with their updates and factors."""
        found = {}
        for linear in self.linears:
            _, known, factors = linear.path(x)
            if factors is not None and known.adapter == self.adapter and _whole(factors, known.item):
                found[linear] = known.item, factors
        return found

    def _begin(self, linear: DenseLinear, x: Tensor) -> PendingProjection | None:
        """Compute the first products of all linears that are ready, if this one is and another.

        Two matrices are the same, and one result, if they are made of the same arrays in the same way.
        """
        ready = self.ready(x)
        if len(ready) < 2 or linear not in ready:
            return None
        if not x.requires_grad and not any(factor.requires_grad for _, own in ready.values() for factor in own):
            return None  # no graph would keep it
        prefixes, same = [], []
        for item, own in ready.values():
            prefix = item.program.prefix
            assert prefix is not None  # it can share
            prefixes.append(prefix)
            same.append((prefix, tuple((id(own[k]), item.operands[k].norm) for k in prefix.factors)))
        operands = [item.normalized(own) for item, own in ready.values()]
        rows, narrow = project(prefixes, operands, x.reshape(-1, x.shape[-1]), same)
        pending = PendingProjection(x, rows)
        for (one, (_, own)), result, factors in zip(ready.items(), narrow, operands, strict=True):
            pending.waiting[one] = result, _state(x, own), factors
        self._pending = weakref.ref(pending)
        return pending


def _whole(factors: Sequence[Tensor], item: SiteUpdate) -> bool:
    """Return True if no factor is sharded just now."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    return all(
        factor.shape == item.site_layout.parameters[label].shape and factor.untyped_storage().nbytes() > 0
        for label, factor in zip(item.program.labels, factors, strict=True)
    )
