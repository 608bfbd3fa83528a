"""A program in stages, what needs the factors only and what carries the activations, and what it keeps.

Activations that enter through a frozen factor alone are not kept: no gradient reads them. Of the results that a
gradient reads, the backward pass computes again, instead of keeping them,

- from factors alone: elementwise products, and those larger than the trainable factors that they are computed from;
- on the activations, if those are kept: those as wide as they are, and those whose elements take no more
  multiply-adds than the planner pays for keeping one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tnpeft.nn.lower import Body, Fact, Lowered, Tail
from tnpeft.nn.operations import Elementwise, Operation, Product
from tnpeft.planning.planner import MACS_PER_ELEMENT


@dataclass(frozen=True)
class Stages:
    """Operations in order: ``weights`` appends to the factors, then come the activations, ``through``, the ``tail``.

    Places count the factors, the results of ``weights``, the activations (``x``) and the results of ``through``.
    What stands for the activations is what the ``entry`` makes of them, operations with frozen factors at a place.
    ``keep`` are those of results to keep for the backward pass, ``again`` those of results to compute again in it,
    and ``again_names`` names their steps. ``folded`` are those of products whose columns are multiplied by weights
    next: backward their matrix is, which is smaller than the gradient. ``merges`` is the place in the tail of the
    product with a matrix, ``[out, inp]``, that is added to the base weight instead, if there is one.
    """

    entry: tuple[tuple[Operation, int], ...]
    weights: Body
    through: Body
    tail: Tail
    x: int
    keep: tuple[int, ...]
    again: tuple[int, ...]
    again_names: tuple[str, ...]
    folded: frozenset[int]
    merges: int | None


def stages(lowered: Lowered, factors: Sequence[int], *, whole: bool = True) -> Stages:
    """The operations of a program, those that do not need the activations first.

    ``factors`` has the elements of each trainable factor, 0 for the others; the activations' width is in ``lowered``.
    They are those of a linear unless it is not the ``whole`` program: what is as wide as they are is kept then.

    >>> from tnpeft import network, plan
    >>> from tnpeft.nn.lower import lower
    >>> net = network("w[r] B[out r] A[r inp] -> out inp")
    >>> found = stages(lower(plan(net, out=64, inp=99, r=2, tokens=99, base=None), ("w", "B", "A")), (2, 128, 198))
    >>> len(found.weights), len(found.through), found.keep, found.again
    (1, 1, (5,), (3,))
    """
    count = len(factors)
    early, late = [*range(count)], [count]
    for place, (_, a, b) in enumerate(lowered.body, start=count + 1):
        (late if a in late or b in late else early).append(place)
    entry = _entry(lowered, late, factors) if whole else ()
    dropped, late = late[: len(entry)], late[len(entry) :]
    new = {old: place for place, old in enumerate([*early, *late])}
    facts = {new[old]: fact for old, fact in enumerate(lowered.facts, start=count + 1) if old in new}
    width = facts.pop(new[late[0]]).elements if entry else lowered.width
    moved = {
        old: (function, new[a], new[b])
        for old, (function, a, b) in enumerate(lowered.body, start=count + 1)
        if old != late[0] and old not in dropped
    }
    weights = tuple(moved[old] for old in early[count:])
    through = tuple(moved[old] for old in late[1:])
    tail = tuple((function, new[a], new[b]) for function, a, b in lowered.tail)
    kept = _Kept(weights, through, tail, facts, factors, width, whole and width >= lowered.width)
    again = kept.again()
    keep = tuple(sorted(kept.needed - kept.inputs - again))
    names = tuple(dict.fromkeys(facts[place].name for place in sorted(again)))
    folded = _folded(through, tail, facts, kept.x, lowered.tokens)
    return Stages(entry, weights, through, tail, kept.x, keep, tuple(sorted(again)), names, folded, lowered.merges)


def _folded(through: Body, tail: Tail, facts: dict[int, Fact], x: int, tokens: int) -> frozenset[int]:
    """The products with a matrix of fewer columns than tokens that only an elementwise product with a row reads."""
    users = [*through, *((added.operation, a, b) for added, a, b in tail)]
    found = set()
    for place, (product, _, matrix) in enumerate(through, start=x + 1):
        reading = [user for user in users if place in user[1:]]
        if isinstance(product, Product) and len(reading) == 1 and matrix < x and facts[place].macs <= tokens:
            ((operation, left, weights),) = reading
            if isinstance(operation, Elementwise) and operation.left.view is None and left == place and weights < x:
                found.add(place)
    return frozenset(found)


def _entry(lowered: Lowered, late: Sequence[int], factors: Sequence[int]) -> tuple[tuple[Operation, int], ...]:
    """The operations through which alone the activations go at first, each with a frozen factor."""
    entry: list[tuple[Operation, int]] = []
    for place, result in pairwise(late):
        operation, a, b = lowered.body[result - len(factors) - 1]
        users = [item for item in [*lowered.body, *lowered.tail] if place in item[1:]]
        if len(users) != 1 or a != place or b >= len(factors) or factors[b]:
            break
        entry.append((operation, b))
    return tuple(entry)


class _Kept:
    """What the gradients of a program read."""

    def __init__(
        self,
        weights: Body,
        through: Body,
        tail: Tail,
        facts: dict[int, Fact],
        factors: Sequence[int],
        width: int,
        full: bool,
    ) -> None:
        self.facts, self.width, self.full = facts, width, full
        self.x = len(factors) + len(weights)
        self.inputs = {*range(len(factors)), self.x}
        self.results = {k: (a, b) for k, (_, a, b) in enumerate(weights, start=len(factors))}
        self.results |= {k: (a, b) for k, (_, a, b) in enumerate(through, start=self.x + 1)}
        self.below = {k: {k} for k in self.inputs}
        for place in sorted(self.results):
            a, b = self.results[place]
            self.below[place] = self.below[a] | self.below[b]
        self.trainable = {k: size for k, size in enumerate(factors) if size} | {self.x: 0}
        self.needed: set[int] = set()
        for function, a, b in [*weights, *through, *((added.operation, a, b) for added, a, b in tail)]:
            if function.reads:
                self.needed |= {a} if self._live(b) else set()
                self.needed |= {b} if self._live(a) else set()

    def _live(self, place: int) -> bool:
        return not self.below[place].isdisjoint(self.trainable)

    def again(self) -> set[int]:
        """Places of the results that are computed again, and of those that this takes."""
        found = {place for place in sorted(self.results) if place in self.needed and self._cheap(place)}
        pending = [*found]
        while pending:
            for operand in self.results[pending.pop()]:
                if operand in self.results and operand not in found and operand not in self.needed:
                    found.add(operand)
                    pending.append(operand)
        return found

    def _cheap(self, place: int) -> bool:
        fact = self.facts[place]
        if self.x not in self.below[place]:
            return fact.macs == 1 or fact.elements > sum(self.trainable.get(k, 0) for k in self.below[place])
        at_hand = all(k in self.inputs | self.needed or self.x not in self.below[k] for k in self.results[place])
        wide = self.full and fact.elements >= self.width
        return self.x in self.needed and (wide or (fact.macs <= MACS_PER_ELEMENT and at_hand))
