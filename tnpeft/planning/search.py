"""Which two operands to contract next. The only module that talks to a path optimiser.

Up to :data:`EXACT` operands the search is a dynamic program over all subsets of the operands, outer products and
hyper-indices included: exact for any cost that adds up over steps, so also for costs no path optimiser knows (the
backward pass given what is trainable, what autograd keeps). Path optimisers solve operands without a common index
apart, which multiplies a scalar factor in at the wrong place; here they are one problem. Beyond :data:`EXACT`
cotengra's greedy search proposes a path, and a plainer one where cotengra is not installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import prod
from typing import Any

from tnpeft._extras import needed
from tnpeft.networks import NetworkError

Path = tuple[tuple[int, int], ...]  # pairs of operands; the result of pair k is operand n + k

EXACT = 12  # most operands of an exact search: 3**12 / 2 splits take a fraction of a second
_COMPARED = 64  # operands up to which several random greedy paths are compared
_REPEATS, _SHARE = 32, 512  # how many: fewer the more operands there are, so that planning stays quick


@dataclass(frozen=True)
class Weights:
    """The prices of a step: the price of one unit of each cost."""

    macs: int = 0
    backward: int = 0
    written: int = 0
    saved: int = 0


@dataclass(frozen=True)
class Operand:
    """An operand as the search sees it: its indices, whether it needs a gradient, whether keeping it costs."""

    indices: frozenset[str]
    live: bool = False
    counts_as_saved: bool = False


def search(
    operands: Sequence[Operand], output: frozenset[str], sizes: Mapping[str, int], weights: Weights
) -> tuple[Path, bool]:
    """The cheapest path to one operand with the ``output`` indices, and whether it is proved the cheapest.

    >>> chain = [Operand(frozenset("ab")), Operand(frozenset("bc")), Operand(frozenset("cd"))]
    >>> search(chain, frozenset("ad"), {"a": 2, "b": 9, "c": 9, "d": 9}, Weights(macs=1))
    (((0, 1), (2, 3)), True)
    """
    used = sorted(frozenset(output).union(*(operand.indices for operand in operands)))
    key = tuple((index, sizes[index]) for index in used)
    return _search(tuple(operands), frozenset(output), key, weights)


@lru_cache(maxsize=4096)
def _search(
    operands: tuple[Operand, ...], output: frozenset[str], sizes: tuple[tuple[str, int], ...], weights: Weights
) -> tuple[Path, bool]:
    if len(operands) <= EXACT:
        return _Table(operands, output, dict(sizes), weights).best(), True
    return _proposed(operands, output, dict(sizes)), False


class _Table:
    """Subsets of the operands as bit masks, the indices that each leaves open, and the cost of joining two."""

    def __init__(
        self, operands: tuple[Operand, ...], output: frozenset[str], sizes: Mapping[str, int], weights: Weights
    ) -> None:
        self.operands, self.weights = operands, weights
        self.bit = {index: 1 << k for k, index in enumerate(sizes)}
        self.sizes = list(sizes.values())
        self.volumes: dict[int, int] = {0: 1}
        self.output = self._bits(output)

    def _bits(self, indices: frozenset[str]) -> int:
        return sum(self.bit[index] for index in indices)

    def volume(self, bits: int) -> int:
        """The product of the sizes of a set of indices."""
        found = self.volumes.get(bits)
        if found is None:
            top = bits.bit_length() - 1
            found = self.volumes[bits] = self.sizes[top] * self.volume(bits ^ 1 << top)
        return found

    def best(self) -> Path:
        """The cheapest path, by dynamic programming over subsets: every split of every subset is looked at once."""
        count = len(self.operands)
        full = (1 << count) - 1
        union = [0] * (full + 1)
        live = [False] * (full + 1)
        for mask in range(1, full + 1):
            operand = self.operands[mask.bit_length() - 1]
            rest = mask ^ (1 << mask.bit_length() - 1)
            union[mask] = union[rest] | self._bits(operand.indices)
            live[mask] = live[rest] or operand.live
        open_ = [union[mask] & (self.output | union[full ^ mask]) for mask in range(full + 1)]
        for k in range(count):
            open_[1 << k] = union[1 << k]
        keep = [self.weights.saved * self.volume(bits) for bits in open_]
        for k, operand in enumerate(self.operands):
            keep[1 << k] *= operand.counts_as_saved
        cost, choice = [0] * (full + 1), [0] * (full + 1)
        for mask in range(3, full + 1):
            if mask & (mask - 1):
                cost[mask], choice[mask] = self._cheapest(mask, cost, open_, live, keep)
                cost[mask] += self.weights.written * self.volume(open_[mask])
        return _path(choice, count)

    def _cheapest(
        self, mask: int, cost: list[int], open_: list[int], live: list[bool], keep: list[int]
    ) -> tuple[int, int]:
        """The cheapest way to split a subset in two, and its cost without what the result costs to write."""
        macs, backward, volumes = self.weights.macs, self.weights.backward, self.volumes
        low = mask & -mask
        rest = mask ^ low
        best, choice, part = -1, 0, rest
        while part:  # every non-empty part of the rest goes right, what remains goes left with the lowest operand
            left = mask ^ part
            total = cost[left] + cost[part]
            if best < 0 or total < best:
                bits = open_[left] | open_[part]
                volume = volumes.get(bits)
                if volume is None:
                    volume = self.volume(bits)
                total += volume * (macs + backward * (live[left] + live[part]))
                total += keep[left] * live[part] + keep[part] * live[left]
                if best < 0 or total < best:
                    best, choice = total, left
            part = (part - 1) & rest
        return best, choice


def _path(choice: list[int], count: int) -> Path:
    pairs: list[tuple[int, int]] = []

    def build(mask: int) -> int:
        if not mask & (mask - 1):
            return mask.bit_length() - 1
        left, right = build(choice[mask]), build(mask ^ choice[mask])
        pairs.append((min(left, right), max(left, right)))
        return count + len(pairs) - 1

    build((1 << count) - 1)
    return tuple(pairs)


def _proposed(operands: tuple[Operand, ...], output: frozenset[str], sizes: dict[str, int]) -> Path:
    """A path of a greedy search, which takes networks of any size."""
    try:
        import cotengra
    except ModuleNotFoundError:
        return _greedy(operands, output, sizes)
    inputs = [tuple(sorted(operand.indices)) for operand in operands]
    if len(inputs) <= _COMPARED:
        optimizer = cotengra.RandomGreedyOptimizer(
            max_repeats=min(_REPEATS, _SHARE // len(inputs)), seed=0, parallel=False
        )
    else:
        optimizer = cotengra.GreedyOptimizer()
    return _pairs(optimizer.ssa_path(inputs, tuple(sorted(output)), sizes), len(inputs))


def _greedy(operands: tuple[Operand, ...], output: frozenset[str], sizes: dict[str, int]) -> Path:
    """Always the pair whose product adds least to what is held; pairs without a common index last."""
    left = {k: operand.indices for k, operand in enumerate(operands)}
    held = Counter(index for indices in left.values() for index in indices) + Counter(output)
    pairs: list[tuple[int, int]] = []

    def volume(indices: Iterable[str]) -> int:
        return prod(sizes[index] for index in indices)

    def product(one: frozenset[str], two: frozenset[str]) -> frozenset[str]:
        return frozenset(index for index in one | two if held[index] > (index in one) + (index in two))

    def price(pair: tuple[int, int]) -> tuple[int, int]:
        one, two = (left[k] for k in pair)
        return volume(product(one, two)) - volume(one) - volume(two), volume(one | two)

    while len(left) > 1:
        joined = [pair for pair in combinations(left, 2) if not left[pair[0]].isdisjoint(left[pair[1]])]
        pair = min(joined or combinations(left, 2), key=price)
        one, two = left.pop(pair[0]), left.pop(pair[1])
        made = left[len(operands) + len(pairs)] = product(one, two)
        held += Counter(made)
        held -= Counter(one) + Counter(two)
        pairs.append(pair)
    return tuple(pairs)


def requested(optimize: Any, operands: Sequence[Operand], output: frozenset[str], sizes: Mapping[str, int]) -> Path:
    """Return the path that an optimiser of opt_einsum finds: a ``PathOptimizer``, or one by its name.

    Raises:
        NetworkError: the optimiser is unknown.

    >>> chain = [Operand(frozenset("ab")), Operand(frozenset("bc")), Operand(frozenset("cd"))]
    >>> requested("optimal", chain, frozenset("ad"), {"a": 2, "b": 9, "c": 9, "d": 9})
    ((0, 1), (2, 3))
    """
    if len(operands) == 1:
        return ()
    find = deepcopy(optimize)  # a random optimiser serves one contraction, and a line may have several terms
    if isinstance(optimize, str):
        needed("opt_einsum", "planning", f"optimize={optimize!r}")
        from opt_einsum.paths import get_path_fn

        try:
            find = get_path_fn(optimize)
        except KeyError as error:
            raise NetworkError(
                f"opt_einsum has no optimiser {optimize!r}", remedy="such as optimal, dp, greedy, branch-2, auto"
            ) from error
    inputs = [frozenset(operand.indices) for operand in operands]
    used = frozenset[str]().union(*inputs)
    left, pairs = [*range(len(inputs))], list[tuple[int, int]]()
    for step in find(inputs, output & used, {index: sizes[index] for index in used}):
        taken = [left[k] for k in sorted(step)]
        left = [name for name in left if name not in taken]
        result = taken[0]
        for other in taken[1:]:  # a step on more than two operands is one after the other
            pairs.append((min(result, other), max(result, other)))
            result = len(inputs) + len(pairs) - 1
        left.append(result)
    return tuple(pairs)


def _pairs(path: Sequence[Sequence[int]], count: int) -> Path:
    """A single-assignment path with its one-operand steps (sums within one operand) left out."""
    name = list(range(count))
    pairs: list[tuple[int, int]] = []
    for step in path:
        if len(step) == 1:
            name.append(name[step[0]])
            continue
        a, b = (name[k] for k in step)
        pairs.append((min(a, b), max(a, b)))
        name.append(count + len(pairs) - 1)
    return tuple(pairs)
