"""The operations of a program on blocks of rows, in two stages: from the factors alone, and on the activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tnpeft.nn.operations import View

Function = Callable[[Tensor, Tensor], Tensor]
Accumulate = Callable[[Tensor | None, Tensor, Tensor, float], Tensor]
Views = tuple[View | None, View | None]  # of the left and the right operand; None: it is matrices as it is
Body = tuple[tuple[Function, int, int], ...]  # a function and the places of its two operands
Tail = tuple[tuple[Accumulate, int, int, int], ...]  # the same with a sign: what is added to the output


@dataclass(frozen=True)
class Lowered:
    """The operations of a plan: the body computes intermediate results, the tail adds to ``[replica, rows, out]``.

    ``views`` holds, by the place of its result, how a product of matrices in the body sees its operands, and under
    -1 how the tail's does, if all of it is one product as wide as the output.
    """

    body: Body
    tail: Tail
    views: Mapping[int, Views]


@dataclass(frozen=True)
class Pair:
    """The two matrices between which all activations pass, ``x @ first.T @ last.T``, by place and view."""

    first: int
    first_view: View | None
    last: int
    last_view: View | None
    sign: int

    def matrices(self, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """``first [narrow, inp]`` and ``last [out, narrow]`` among a program's values."""
        first, last = values[self.first], values[self.last]
        return (
            first if self.first_view is None else self.first_view(first),
            last if self.last_view is None else self.last_view(last),
        )


@dataclass(frozen=True)
class Stages:
    """Operations in order: ``weights`` appends to the factors, then come the activations, ``through``, the ``tail``.

    ``pair`` is there if the activations meet two matrices and nothing else.
    """

    weights: Body
    through: Body
    tail: Tail
    pair: Pair | None


def stages(lowered: Lowered, factors: int) -> Stages:
    """The operations on so many factors, those that do not need the activations first."""
    early, late = [*range(factors)], [factors]
    for place, (_, a, b) in enumerate(lowered.body, start=factors + 1):
        (late if a in late or b in late else early).append(place)
    new = {old: place for place, old in enumerate([*early, *late])}
    moved = {old: (function, new[a], new[b]) for old, (function, a, b) in enumerate(lowered.body, start=factors + 1)}
    through = tuple(moved[old] for old in late[1:])
    tail = tuple((function, new[a], new[b], sign) for function, a, b, sign in lowered.tail)
    return Stages(tuple(moved[old] for old in early[factors:]), through, tail, _pair(lowered, late, through, tail))


def _pair(lowered: Lowered, late: list[int], through: Body, tail: Tail) -> Pair | None:
    into, out = lowered.views.get(late[-1]), lowered.views.get(-1)
    if len(through) != 1 or len(tail) != 1 or into is None or out is None:
        return None
    (_, x, first), (_, narrow, last, sign) = through[0], tail[0]
    chained = narrow == x + 1 and first < x and last < x
    return Pair(first, into[1], last, out[1], sign) if chained and into[0] is None is out[0] else None
