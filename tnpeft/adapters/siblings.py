"""Linears of a model that read one input: their updates take their first steps together.

The first of them to be called begins for all, the others find what was begun if they are called with the very same
input and everything is as it was. It belongs to the operation that began it and is only looked at from here, so it
goes with that operation's result if it has not gone with the last linear.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tnpeft.adapters.joined import Joined
from tnpeft.adapters.prepared import steps_taken
from tnpeft.nn.first import Joint, Link, Source
from tnpeft.nn.together import rest

if TYPE_CHECKING:
    from tnpeft.adapters.layer import TensorNetworkLinear
    from tnpeft.adapters.update import Update

_WORTH = 2**17  # elements of an input from which on reading it once takes less time than arranging for that


def may_share(item: Update) -> bool:
    """Whether an update has a first step that can be taken elsewhere.

    >>> from tnpeft.adapters.update import update
    >>> from tnpeft.layout import layout
    >>> from tnpeft.networks import Factorization, Site
    >>> f = Factorization.of("B[layer proj out r] A[r inp] -> layer proj out inp", ranks={"r": 2})
    >>> may_share(update(layout(f, [Site(0, "q_proj", 8, 9, module="q")]).site_layouts[0], (), (), 1.0, 4))
    True
    """
    return item.run.first is not None and not item.side and all(operand.source != "base" for operand in item.operands)


def join(adapter: str, linears: Iterable[Any]) -> None:
    """Let the linears, which read one input, take the first steps of an adapter together, as many as can.

    >>> join("default", [])
    """
    able = [linear for linear in linears if may_share(linear.updates[adapter][0])]
    siblings = Siblings(adapter, able)
    for linear in able if len(able) > 1 else ():
        linear.siblings[adapter] = siblings


class Begun:
    """What is begun on one input for the linears that have not come yet."""

    def __init__(self, x: Tensor, rows: Tensor) -> None:
        self.x: Tensor | None = x
        self.rows: Tensor | None = rows
        self.version, self.taken = x._version, steps_taken()
        self.waiting: dict[TensorNetworkLinear, tuple[Tensor, Link, _Marks, Sequence[Tensor]]] = {}

    def take(self, linear: TensorNetworkLinear, x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Link] | None:
        """The narrow result that waits for the linear, and its link; None if input or factors have changed."""
        if self.x is not x or self.version != x._version or self.taken != steps_taken():
            return None
        if linear not in self.waiting:
            return None
        narrow, link, marks, _ = self.waiting[linear]
        if marks != _marked(factors):
            return None
        del self.waiting[linear]
        return narrow, link


_Marks = list[tuple[int, int, int, bool]]


def _marked(factors: Sequence[Tensor]) -> _Marks:
    """What shows any change of the factors: which they are, their version, their memory, what gradients they take."""
    return [(id(factor), factor._version, factor.data_ptr(), factor.requires_grad) for factor in factors]


class Siblings:
    """Linears with one adapter that read one input. Copies have begun nothing."""

    def __init__(self, adapter: str, linears: Iterable[TensorNetworkLinear]) -> None:
        self.adapter, self.linears = adapter, tuple(linears)
        self._begun: weakref.ref[Begun] | None = None
        self._joint: tuple[Any, Joint] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_begun": None, "_joint": None}

    def forward(
        self, linear: TensorNetworkLinear, joined: Joined, x: Tensor, factors: Sequence[Tensor]
    ) -> Tensor | None:
        """The linear's output with its update; None if no other one can share its first step, or it is not worth it.

        ``joined`` is the linear's own adapter, ``factors`` are its factors.
        """
        if x.numel() < _WORTH or type(x) is not Tensor:
            return None
        if not all(factor.is_leaf for factor in factors):
            return None  # FSDP1's views: a recomputation does not find them there, and would take another path
        begun = None if self._begun is None else self._begun()
        taken = None if begun is None else begun.take(linear, x, factors)
        if taken is None:
            begun = self._begin(linear, joined, x, factors)
            taken = None if begun is None else begun.take(linear, x, factors)
        if begun is None or taken is None:
            return None
        (narrow, link), rows = taken, begun.rows
        assert rows is not None  # something still waited
        if begun.waiting:
            link.holder = begun
        else:
            begun.x = begun.rows = None
        own, item = linear._modules["base_layer"]._parameters, joined.item  # type: ignore[union-attr]
        weight, bias = own["weight"], own["bias"]
        assert weight is not None  # it may join
        result = rest(link, narrow, item.scale, rows, weight, bias, factors, item.norms)
        return result.reshape(*x.shape[:-1], item.run.rows)

    def _begin(
        self, linear: TensorNetworkLinear, joined: Joined, x: Tensor, factors: Sequence[Tensor]
    ) -> Begun | None:
        """Take the first steps of all linears that are ready to."""
        ready = {}
        for one in self.linears:
            its = joined if one is linear else one.joined()
            if its is None or its.adapter != self.adapter:
                continue
            own = factors if one is linear else its.factors(one, x)
            if own is not None and _whole(own, its.item):
                ready[one] = its, own
        if len(ready) < 2 or linear not in ready:
            return None
        if not x.requires_grad and not any(factor.requires_grad for _, own in ready.values() for factor in own):
            return None  # nothing would keep what is begun
        rows = x.reshape(-1, x.shape[-1])
        started = self._joined(ready)([own for _, own in ready.values()], rows)
        begun = Begun(x, started.x)
        for (one, (_, own)), narrow, link in zip(ready.items(), started.narrow, started.links, strict=True):
            begun.waiting[one] = narrow, link, _marked(own), own
        self._begun = weakref.ref(begun)
        return begun

    def _joined(self, ready: dict[TensorNetworkLinear, tuple[Joined, Sequence[Tensor]]]) -> Joint:
        """Their first steps as one; two matrices are the same if they are made of the same arrays in the same way."""
        key = [(joined, [id(factor) for factor in own]) for joined, own in ready.values()]
        if self._joint is None or self._joint[0] != key:
            sources = []
            for joined, own in ready.values():
                item, first = joined.item, joined.item.run.first
                assert first is not None  # it may share
                made = tuple((id(own[place]), item.operands[place].norm) for place in first.reads)
                sources.append(Source(first, item.norms, (first, made)))
            self._joint = key, Joint(sources)
        return self._joint[1]


def _whole(factors: Sequence[Tensor], item: Update) -> bool:
    """Whether the factors are there as a whole: none is sharded just now."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    return all(
        factor.shape == item.site_layout.parameters[label].shape and factor.untyped_storage().nbytes() > 0
        for label, factor in zip(item.run.labels, factors, strict=True)
    )
