"""Which ranks a network allows: minimal cuts, exact in whole numbers."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from math import prod

from tnpeft.counting.parameters import bound_sizes
from tnpeft.networks import Factorization, Network, Term
from tnpeft.networks.factor import Group
from tnpeft.networks.sizes import Size, Sizes, integers, product

Node = int | tuple[str, int]  # a factor's place, or a leg's entry or exit


class RankWarning(UserWarning):
    """A bond is larger than what it can carry: the surplus costs parameters and adds nothing."""


@dataclass(frozen=True)
class Leg:
    """Indices that the same factors of a term carry, fused: their names, the places of these factors, the side they
    face (``""`` for a bond) and their size together.
    """

    names: tuple[str, ...]
    holders: frozenset[int]
    side: str
    size: Size


def rank_bound(net: Network | Factorization, sizes: Sizes | None = None, /, **more: Size) -> int:
    """An upper bound on the rank of one site's matrix: the sum of the terms' minimal cuts, at most rows and columns.

    A cut is a set of indices without which no path leads from the rows to the columns; it costs the product of their
    sizes. Sizes of stack indices are not needed. Source: the bound of tensor networks, exact for generic factors
    in most networks.

    Raises:
        NetworkError: a size is missing or a symbol, or the output has no rows and columns.

    Warns:
        RankWarning: a bond is larger than its cut (looked at when all sizes are given).

    >>> import tnpeft
    >>> rank_bound(tnpeft.network("B1[o r] A1[r i] B2[o s] A2[s i] -> o i"), o=64, i=64, r=3, s=3)
    9
    """
    network, bound = bound_sizes(net, sizes, **more)
    network.require_matrix()
    site = network.select(*network.stack)
    known = integers(site, {index: bound[index] for index in site.indices if index in bound})
    if all(isinstance(bound.get(index), int) for index in network.indices):
        warn_ranks(network, bound)
    return _unfold(site, known, site.rows, site.cols)


def unfolding_bounds(net: Network | Factorization, sizes: Sizes | None = None, /, **more: Size) -> dict[str, int]:
    """Bounds on the ranks of the whole stack's unfoldings: each group of the output against all others.

    Raises:
        NetworkError: a size is missing or a symbol.

    >>> import tnpeft
    >>> lotr = tnpeft.network("U[out a] G[layer a b] V[inp b] -> layer out inp")
    >>> unfolding_bounds(lotr, layer=12, out=64, inp=64, a=4, b=5)
    {'layer': 12, 'out': 4, 'inp': 5}
    """
    network, bound = bound_sizes(net, sizes, **more)
    known = integers(network, bound)
    rest = {group: tuple(i for i in network.outer if i not in group) for group in network.output}
    return {" ".join(group): _unfold(network, known, group, rest[group]) for group in network.output if group}


def cuts(net: Network | Factorization, sizes: Sizes | None = None, /, **more: Size) -> dict[str, int]:
    """The largest useful size of each bond; bonds between the same factors count together (``"a b"``).

    A bond between two factors can carry no more than the smallest cut between either of them and all else; an
    index summed over three or more no more than all of them but one can tell apart. Only what a trainable factor
    can absorb is a limit: a frozen basis may be wider than its cut. Over several terms the largest counts.

    Raises:
        NetworkError: a size is missing or a symbol.

    >>> import tnpeft
    >>> cuts(tnpeft.network("G1[o1 a] G2[a o2 b] G3[b i] -> (o1 o2) i"), o1=2, o2=3, i=50, a=4, b=4)
    {'a': 2, 'b': 6}
    """
    network, bound = bound_sizes(net, sizes, **more)
    known = integers(network, bound)
    found: dict[str, int] = {}
    for term in network.terms:
        legs, free = term_legs(term, known, dict.fromkeys(network.outer, "outer")), absorbing(network, term)
        for leg in legs:
            if not leg.side:
                name = " ".join(leg.names)
                found[name] = max(found.get(name, 0), bond_cut(legs, leg, free))
    return found


def clipped_ranks(net: Network | Factorization, sizes: Sizes | None = None, /, **more: Size) -> dict[str, int]:
    """The bonds that are larger than their cuts, with these cuts: empty if every rank can be used.

    >>> import tnpeft
    >>> clipped_ranks(tnpeft.network("B[out r] A[r inp] -> out inp"), out=8, inp=4, r=6)
    {'r': 4}
    """
    network, bound = bound_sizes(net, sizes, **more)
    found = cuts(network, bound)
    return {name: cut for name, cut in found.items() if product(bound[i] for i in name.split()) > cut}


def warn_ranks(net: Network | Factorization, sizes: Sizes | None = None, /, **more: Size) -> None:
    """Warn of every bond that is larger than its cut; nothing is changed.

    >>> import tnpeft
    >>> warn_ranks(tnpeft.network("B[out r] A[r inp] -> out inp"), out=8, inp=4, r=4)
    """
    network, bound = bound_sizes(net, sizes, **more)
    for name, cut in clipped_ranks(network, bound).items():
        size = product(bound[i] for i in name.split())
        message = f"the rank {name!r} is {size}, but {cut} is all that it can carry in {network}: lower it to {cut}"
        warnings.warn(message, RankWarning, stacklevel=3)


def _unfold(net: Network, sizes: Mapping[str, int], left: Group, right: Group) -> int:
    """The sum over terms of the minimal cuts between two sets of open indices, at most either's size."""
    total = sum(term_cut(term, sizes, left, right) for term in net.terms)
    return min(total, prod(sizes[i] for i in left), prod(sizes[i] for i in right))


def term_cut(term: Term, sizes: Mapping[str, int], left: Group, right: Group) -> int:
    """The minimal cut of one term between two sets of open indices.

    >>> import tnpeft
    >>> term_cut(tnpeft.network("B[o r] A[r i] -> o i").terms[0], {"o": 9, "r": 2, "i": 5}, ("o",), ("i",))
    2
    """
    legs = term_legs(term, sizes, {**dict.fromkeys(left, "left"), **dict.fromkeys(right, "right")})
    return min_cut(legs, _ends(legs, "left", "in"), _ends(legs, "right", "out"))


def _ends(legs: tuple[Leg, ...], side: str, end: str) -> set[Node]:
    return {(end, place) for place, leg in enumerate(legs) if leg.side == side}


def absorbing(net: Network, term: Term) -> frozenset[int]:
    """Places in the term of the factors that can take up any change of basis: trainable, and used once."""
    uses = [net.label(factor) for factor in net.uses()]
    return frozenset(
        place
        for place, factor in enumerate(term.factors)
        if factor.kind == "trainable" and uses.count(net.label(factor)) == 1
    )


def term_legs(term: Term, sizes: Sizes, sides: Mapping[str, str]) -> tuple[Leg, ...]:
    """The legs of a term: its indices by holders and side; an index without a side is a bond."""
    holders: dict[str, set[int]] = {}
    for place, factor in enumerate(term.factors):
        for index in factor.indices:
            holders.setdefault(index, set()).add(place)
    fused: dict[tuple[frozenset[int], str], list[str]] = {}
    for index, places in holders.items():
        fused.setdefault((frozenset(places), sides.get(index, "")), []).append(index)
    return tuple(
        Leg(tuple(names), places, side, product(sizes[name] for name in names))
        for (places, side), names in fused.items()
    )


def bond_cut(legs: tuple[Leg, ...], bond: Leg, free: frozenset[int]) -> int:
    """The largest useful size of a bond, its own size where nothing limits it.

    An index that all holders carry stands beside the bond, one change of basis for each of its values, and limits
    nothing.
    """
    others = tuple(leg for leg in legs if leg is not bond and not bond.holders <= leg.holders)
    limits: list[int] = []
    for absorber in sorted(bond.holders & free):
        rest = bond.holders - {absorber}
        if len(rest) == 1:
            limits.append(min_cut(others, rest, {absorber, *_ends(others, "outer", "out")}))
        else:
            limits.append(prod(leg.size for leg in others if leg.holders & rest))
    return min(limits) if limits else int(bond.size)


def min_cut(legs: tuple[Leg, ...], start: Collection[Node], stop: Collection[Node]) -> int:
    """The smallest product of sizes of legs that separates ``start`` from ``stop``.

    Max-flow in whole numbers: a leg's capacity is the logarithm of its size as a fixed-point number with more digits
    than the product of all sizes has. Two different products differ by more than all rounding together, so the
    cut is the smallest one exactly; what is returned is the product of its sizes.
    """
    digits = len(str(prod(leg.size for leg in legs))) + len(str(len(legs))) + 2
    arcs: dict[Node, dict[Node, int]] = {node: {} for node in (*start, *stop)}

    def join(tail: Node, head: Node, capacity: int) -> None:
        arcs.setdefault(tail, {})[head] = capacity
        arcs.setdefault(head, {}).setdefault(tail, 0)

    capacities = [_logarithm(leg.size, digits) for leg in legs]
    unlimited = sum(capacities) + 1
    for place, (leg, capacity) in enumerate(zip(legs, capacities, strict=True)):
        join(("in", place), ("out", place), capacity)
        for holder in leg.holders:
            join(holder, ("in", place), unlimited)
            join(("out", place), holder, unlimited)
    reached = _saturate(arcs, start, stop)
    return prod(
        leg.size for place, leg in enumerate(legs) if ("in", place) in reached and ("out", place) not in reached
    )


def _saturate(arcs: dict[Node, dict[Node, int]], start: Collection[Node], stop: Collection[Node]) -> set[Node]:
    """What stays reachable when no more can flow along shortest paths; the arcs are left with what they have over."""
    while True:
        before: dict[Node, Node | None] = dict.fromkeys(start)
        queue = deque(start)
        end: Node | None = None
        while queue and end is None:
            node = queue.popleft()
            for head, left in arcs[node].items():
                if left > 0 and head not in before:
                    before[head] = node
                    queue.append(head)
                    if head in stop:
                        end = head
                        break
        if end is None:
            return set(before)
        path = []
        while (tail := before[end]) is not None:
            path.append((tail, end))
            end = tail
        flow = min(arcs[tail][head] for tail, head in path)
        for tail, head in path:
            arcs[tail][head] -= flow
            arcs[head][tail] += flow


@lru_cache(maxsize=4096)
def _logarithm(size: int, digits: int) -> int:
    """ln(size) times 10**digits, rounded to a whole number."""
    with localcontext() as context:
        context.prec = digits + len(str(size.bit_length())) + 3
        return int(Decimal(size).ln().scaleb(digits).to_integral_value())
