"""Linears that read one input, such as q, k and v: the first products of their updates are one product.

The first layer of the group to run computes the projection for all; the others reuse it if they receive the same
tensor object and nothing has changed. The pending result is weakly referenced and freed with the autograd graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tnpeft.adapters.layer.fast_path import ActiveAdapter
from tnpeft.adapters.layer.weight_cache import steps_taken
from tnpeft.nn.executor.shared_projection import Link, ProjectionGroup

if TYPE_CHECKING:
    from tnpeft.adapters.layer.binding import SiteUpdate
    from tnpeft.adapters.layer.protocol import AdaptedLinear

MIN_ELEMENTS = 2**17  # of an input, from which on reading it once takes less time than arranging for that


def can_share(item: SiteUpdate) -> bool:
    """Return True if the first product of an update can be shared.

    >>> from tnpeft.adapters.layer.binding import update
    >>> from tnpeft.layout import layout
    >>> from tnpeft.networks import Factorization, Site
    >>> f = Factorization.of("B[layer proj out r] A[r inp] -> layer proj out inp", ranks={"r": 2})
    >>> can_share(update(layout(f, [Site(0, "q_proj", 8, 9, module="q")]).site_layouts[0], (), (), 1.0, 4))
    True
    """
    return (
        item.program.can_share
        and not item.side
        and not item.stack
        and all(operand.source != "base" for operand in item.operands)
    )


def join(adapter: str, linears: Iterable[Any]) -> None:
    """Make a group of the linears, which read one input, for the updates of an adapter that can share.

    >>> join("default", [])
    """
    able = [linear for linear in linears if can_share(linear.updates[adapter][0])]
    group = SharedInputGroup(adapter, able)
    for linear in able if len(able) > 1 else ():
        linear.input_groups[adapter] = group


_Mark = tuple[Any, ...]


def _input_mark(x: Tensor) -> _Mark:
    """Return what shows any change of an input: edits, place in the graph, gradients that it takes, memory."""
    return x._version, x.requires_grad, x.grad_fn, x.data_ptr(), x.dtype, x.shape, steps_taken()


def _factor_marks(factors: Sequence[Tensor]) -> list[_Mark]:
    """Return what shows any change of factors: which they are, version, memory, and gradients that they take."""
    return [(id(factor), factor._version, factor.data_ptr(), factor.requires_grad) for factor in factors]


class PendingProjection:
    """The results on one input for the linears that have not run yet."""

    def __init__(self, x: Tensor, rows: Tensor) -> None:
        self.x: Tensor | None = x
        self.rows: Tensor | None = rows
        self.mark = _input_mark(x)
        self.waiting: dict[AdaptedLinear, tuple[Tensor, Link, list[_Mark], Sequence[Tensor]]] = {}

    def take(self, linear: AdaptedLinear, x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Link] | None:
        """Return the narrow result that waits for the linear, and its link; None if input or factors have changed."""
        if self.x is not x or self.mark != _input_mark(x) or linear not in self.waiting:
            return None
        narrow, link, marks, _ = self.waiting[linear]
        if marks != _factor_marks(factors):
            return None
        del self.waiting[linear]
        return narrow, link


class SharedInputGroup:
    """Linears with one adapter that read one input. Copies have nothing pending."""

    def __init__(self, adapter: str, linears: Iterable[AdaptedLinear]) -> None:
        self.adapter, self.linears = adapter, tuple(linears)
        self._pending: weakref.ref[PendingProjection] | None = None
        self._projection: tuple[Any, ProjectionGroup] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None, "_projection": None}

    @staticmethod
    def worthwhile(x: Tensor) -> bool:
        """Return True if an input is large enough to be read once for all."""
        return x.numel() >= MIN_ELEMENTS and type(x) is Tensor

    def forward(
        self, linear: AdaptedLinear, path: ActiveAdapter, x: Tensor, factors: Sequence[Tensor]
    ) -> Tensor | None:
        """Return the linear's output with its update; None if no other one can share its first product.

        ``path`` is that of the linear's own adapter, ``factors`` are its factors.
        """
        if not (self.worthwhile(x) and all(factor.is_leaf for factor in factors)):
            return None  # FSDP1's views: a recomputation does not find them there, and would take another path
        pending = None if self._pending is None else self._pending()
        taken = None if pending is None else pending.take(linear, x, factors)
        if taken is None:
            pending = self._begin(linear, path, x, factors)
            taken = None if pending is None else pending.take(linear, x, factors)
        if pending is None or taken is None:
            return None
        (narrow, link), rows = taken, pending.rows
        assert rows is not None  # something still waited
        if pending.waiting:
            link.keep_alive = pending
        else:
            pending.x = pending.rows = None
        own, item = linear._modules["base_layer"]._parameters, path.item  # type: ignore[union-attr]
        weight, bias = own["weight"], own["bias"]
        assert weight is not None  # the path holds
        result = item.program.after_prefix(narrow, factors, rows, weight, bias, item.scale, link)
        return result.reshape(*x.shape[:-1], item.program.rows)

    def ready(self, x: Tensor) -> dict[AdaptedLinear, tuple[ActiveAdapter, Sequence[Tensor]]]:
        """Return the linears that could share their first products on ``x``, with their factors."""
        found = {}
        for linear in self.linears:
            _, known, factors = linear.path(x)
            if factors is not None and known.adapter == self.adapter and _whole(factors, known.item):
                found[linear] = known, factors
        return found

    def _begin(
        self, linear: AdaptedLinear, path: ActiveAdapter, x: Tensor, factors: Sequence[Tensor]
    ) -> PendingProjection | None:
        """Compute the first products of all linears that are ready."""
        ready = self.ready(x)
        if len(ready) < 2 or linear not in ready:
            return None
        if not x.requires_grad and not any(factor.requires_grad for _, own in ready.values() for factor in own):
            return None  # no graph would keep it
        rows = x.reshape(-1, x.shape[-1])
        rows, narrow, links = self._group(ready)([own for _, own in ready.values()], rows)
        pending = PendingProjection(x, rows)
        for (one, (_, own)), part, link in zip(ready.items(), narrow, links, strict=True):
            pending.waiting[one] = part, link, _factor_marks(own), own
        self._pending = weakref.ref(pending)
        return pending

    def _group(self, ready: dict[AdaptedLinear, tuple[ActiveAdapter, Sequence[Tensor]]]) -> ProjectionGroup:
        """Return their projection; two matrices are the same if they are made of the same arrays in the same way."""
        key = [(path, [id(factor) for factor in own]) for path, own in ready.values()]
        if self._projection is None or self._projection[0] != key:
            prefixes, same = [], []
            for path, own in ready.values():
                item, prefix = path.item, path.item.program.prefix
                assert prefix is not None  # it can share
                prefixes.append(prefix)
                same.append((prefix, tuple((id(own[k]), item.operands[k].norm) for k in prefix.factors)))
            self._projection = key, ProjectionGroup(prefixes, same)
        return self._projection[1]


def _whole(factors: Sequence[Tensor], item: SiteUpdate) -> bool:
    """Return True if no factor is sharded just now."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    return all(
        factor.shape == item.site_layout.parameters[label].shape and factor.untyped_storage().nbytes() > 0
        for label, factor in zip(item.program.labels, factors, strict=True)
    )
