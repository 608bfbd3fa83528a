"""Linears of a model that read one input: their updates take their first steps together.

The first of them to be called begins for all, the others find what was begun if they are called with the very same
input and everything is as it was. It belongs to the operation that began it and is only looked at from here, so it
goes with that operation's result if it has not gone with the last linear.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.prepared import Stamps
from tnpeft.nn.first import Link, Source, start
from tnpeft.nn.together import rest

if TYPE_CHECKING:
    from tnpeft.adapters.layer import TensorNetworkLinear
    from tnpeft.adapters.update import Update


def may_share(item: Update) -> bool:
    """Whether an update has a first step that can be taken elsewhere.

    >>> from tnpeft.adapters.update import update
    >>> from tnpeft.counting.layout import layout
    >>> from tnpeft.networks import Factorization, Site
    >>> f = Factorization.of("B[layer proj out r] A[r inp] -> layer proj out inp", ranks={"r": 2})
    >>> may_share(update(layout(f, [Site(0, "q_proj", 8, 9, module="q")]).placements[0], (), (), 1.0, 64))
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


@dataclass(frozen=True, eq=False)
class Waiting:
    """What is begun for one linear, and what its factors were like then."""

    narrow: Tensor
    link: Link
    operands: Sequence[Tensor]
    stamps: Stamps
    trained: list[bool]


class Begun:
    """What is begun on one input for the linears that have not come yet."""

    def __init__(self, x: Tensor, rows: Tensor, waiting: Mapping[TensorNetworkLinear, Waiting]) -> None:
        self.x: Tensor | None = x
        self.rows: Tensor | None = rows
        self.version = x._version
        self.waiting = dict(waiting)

    def waits(self, linear: TensorNetworkLinear, adapter: str, x: Tensor) -> bool:
        """Whether it waits for the linear with this input and with its factors as they are."""
        its = self.waiting.get(linear)
        if its is None or self.x is not x or self.version != x._version:
            return False
        arrays = linear._arrays(adapter, linear.updates[adapter][0])
        return its.stamps.hold(arrays) and its.trained == [array.requires_grad for array in arrays]

    def take(self, linear: TensorNetworkLinear) -> tuple[Tensor, Waiting]:
        """The input ``[tokens, inp]`` and what was begun for the linear; after the last one nothing is left."""
        rows, its = self.rows, self.waiting.pop(linear)
        assert rows is not None  # it still waited
        if not self.waiting:
            self.x = self.rows = None
        return rows, its


class Siblings:
    """Linears with one adapter that read one input. Copies have begun nothing."""

    def __init__(self, adapter: str, linears: Iterable[TensorNetworkLinear]) -> None:
        self.adapter, self.linears = adapter, tuple(linears)
        self._begun: weakref.ref[Begun] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_begun": None}

    def forward(self, linear: TensorNetworkLinear, x: Tensor) -> Tensor | None:
        """The linear's output with its update; None if no other one can share its first step."""
        begun = None if self._begun is None else self._begun()
        if begun is None or not begun.waits(linear, self.adapter, x):
            begun = self._begin(linear, x)
        if begun is None:
            return None
        rows, its = begun.take(linear)
        its.link.holder = begun if begun.waiting else None
        base, item = linear.base_layer, linear.updates[self.adapter][0]
        result = rest(its.link, its.narrow, item.scale, rows, base.weight, base.bias, its.operands, item.norms)
        return result.reshape(*x.shape[:-1], item.run.rows)

    def _begin(self, linear: TensorNetworkLinear, x: Tensor) -> Begun | None:
        """Take the first steps of all linears that are ready to."""
        if type(x) not in (Tensor, nn.Parameter):
            return None
        arrays = {
            one: one._arrays(self.adapter, one.updates[self.adapter][0])
            for one in self.linears
            if one is linear or one.shares(self.adapter, x)
        }
        ready = {one: its for one, its in arrays.items() if _here(its, one.updates[self.adapter][0], x)}
        if len(ready) < 2 or linear not in ready:
            return None
        sources = [self._source(one, its, x) for one, its in ready.items()]
        started = start(sources, x.reshape(-1, x.shape[-1]))
        every = zip(ready.items(), sources, started.narrow, started.links, strict=True)
        waiting = {
            one: Waiting(narrow, link, source.factors, Stamps(its), [array.requires_grad for array in its])
            for (one, its), source, narrow, link in every
        }
        begun = Begun(x, started.x, waiting)
        self._begun = weakref.ref(begun)
        return begun

    def _source(self, linear: TensorNetworkLinear, arrays: Sequence[Tensor], x: Tensor) -> Source:
        """What a linear's first step is made of; one matrix is another's if it is made of the same arrays alike."""
        item = linear.updates[self.adapter][0]
        first = item.run.first
        assert first is not None  # it may share
        made = tuple((id(arrays[place]), item.operands[place].norm) for place in first.reads)
        return Source(first, linear.operands(self.adapter, item, x, raw=True), item.norms, (first, made))


def _here(arrays: Sequence[Tensor], item: Update, x: Tensor) -> bool:
    """Whether the factors are whole tensors beside the input: none is sharded just now, or on another device."""
    pieces = item.placement.pieces
    return all(
        type(array) in (Tensor, nn.Parameter)
        and array.device == x.device
        and array.shape == pieces[label].shape
        and (not _distributed() or array.untyped_storage().nbytes() > 0)
        for label, array in zip(item.run.labels, arrays, strict=True)
    )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
