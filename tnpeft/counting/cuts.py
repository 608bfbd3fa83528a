"""Which ranks a network allows: minimal cuts, exact in whole numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tnpeft.counting.min_cut import Edge, MinCut, Node, incidence, min_cut
from tnpeft.counting.parameters import bound_sizes, site_shapes
from tnpeft.models.cards import Model, Targets
from tnpeft.networks import Factorization, Network, Term
from tnpeft.networks.factor import Group
from tnpeft.networks.sizes import Size, Sizes, integers, product

_QUOTED = 500  # characters of a line that a warning repeats


class RankWarning(UserWarning):
    """A bond is larger than what it can carry: the surplus costs parameters and adds nothing.

    >>> import warnings, tnpeft
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     bound = tnpeft.rank_bound(tnpeft.network("B[out r] A[r inp] -> out inp"), out=8, inp=8, r=40)
    >>> bound, caught[0].category.__name__
    (8, 'RankWarning')
    """


@dataclass(frozen=True)
class Leg:
    """Indices that the same factors of a term carry, fused: their names, the places of these factors, the side they
    face (``""`` for a bond) and their size together.
    """

    names: tuple[str, ...]
    holders: frozenset[int]
    side: str
    size: Size

    @property
    def edge(self) -> Edge:
        """The leg between the places of its factors and its side."""
        return Edge(self.holders | {self.side} if self.side else self.holders, self.size)


def rank_bound(
    net: Network | Factorization,
    sizes: Sizes | None = None,
    /,
    *,
    model: Model = None,
    targets: Targets = None,
    **more: Size,
) -> int:
    """An upper bound on the rank of one site's matrix: the sum of the terms' minimal cuts, at most rows and columns.

    A cut is a set of indices without which no path leads from the rows to the columns; it costs the product of their
    sizes. Sizes of stack indices are not needed. Source: the bound of tensor networks, exact for generic factors
    in most networks. With a model it is the largest over the sites; the arguments are those of
    :func:`tnpeft.parameters`.

    Raises:
        NetworkError: a size is missing or a symbol, or the output has no rows and columns.

    Warns:
        RankWarning: a bond is larger than its cut (looked at when all sizes are given).

    >>> import tnpeft
    >>> rank_bound(tnpeft.network("B1[o r] A1[r i] B2[o s] A2[s i] -> o i"), o=64, i=64, r=3, s=3)
    9
    """
    bounds = []
    for shape in site_shapes(net, sizes, model=model, targets=targets, **more):
        network, bound = shape.network, shape.sizes
        network.require_matrix()
        site = network.select(*network.stack)
        known = integers(site, {index: bound[index] for index in site.indices if index in bound})
        if all(isinstance(bound.get(index), int) for index in network.indices):
            warn_ranks(network, bound)
        bounds.append(_unfold(site, known, site.rows, site.cols))
    return max(bounds)


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
    return bond_cuts(network, integers(network, bound))


def bond_cuts(
    net: Network, sizes: Mapping[str, int], limit: Callable[[Leg], int | None] = lambda leg: None
) -> dict[str, int]:
    """:func:`cuts`, where those above the limit of a bond need not be told apart from it."""
    found: dict[str, int] = {}
    for term in net.terms:
        legs = term_legs(term, sizes, dict.fromkeys(net.outer, "outer"))
        free, edges = absorbing(net, term), [leg.edge for leg in legs]
        at = incidence(edges)
        for leg in legs:
            if not leg.side:
                name = " ".join(leg.names)
                cut = bond_cut(leg, edges, at, free, limit(leg))
                found[name] = max(found.get(name, 0), cut)
    return found


def clipped_ranks(net: Network | Factorization, sizes: Sizes | None = None, /, **more: Size) -> dict[str, int]:
    """The bonds that are larger than their cuts, with these cuts: empty if every rank can be used.

    >>> import tnpeft
    >>> clipped_ranks(tnpeft.network("B[out r] A[r inp] -> out inp"), out=8, inp=4, r=6)
    {'r': 4}
    """
    network, bound = bound_sizes(net, sizes, **more)
    found = bond_cuts(network, integers(network, bound), lambda leg: int(leg.size))
    return {name: cut for name, cut in found.items() if product(bound[i] for i in name.split()) > cut}


def warn_ranks(net: Network | Factorization, sizes: Sizes | None = None, /, **more: Size) -> None:
    """Warn of every bond that is larger than its cut; nothing is changed.

    >>> import tnpeft
    >>> warn_ranks(tnpeft.network("B[out r] A[r inp] -> out inp"), out=8, inp=4, r=4)
    """
    network, bound = bound_sizes(net, sizes, **more)
    for name, cut in clipped_ranks(network, bound).items():
        size = product(bound[i] for i in name.split())
        line = str(network) if len(str(network)) <= _QUOTED else f"{str(network)[:_QUOTED]}..."
        message = f"the rank {name!r} is {size}, but {cut} is all that it can carry in {line}: lower it to {cut}"
        warnings.warn(message, RankWarning, stacklevel=3)


def _unfold(net: Network, sizes: Mapping[str, int], left: Group, right: Group) -> int:
    """The sum over terms of the minimal cuts between two sets of open indices, at most either's size."""
    total = sum(term_cut(term, sizes, left, right).size for term in net.terms)
    return min(total, prod(sizes[i] for i in left), prod(sizes[i] for i in right))


def term_cut(term: Term, sizes: Mapping[str, int], left: Group, right: Group) -> MinCut:
    """The minimal cut of one term between two sets of open indices; its side holds places of factors.

    >>> import tnpeft
    >>> found = term_cut(tnpeft.network("B[o r] A[r i] -> o i").terms[0], {"o": 9, "r": 2, "i": 5}, ("o",), ("i",))
    >>> found.size, 0 in found.side, 1 in found.side
    (2, True, False)
    """
    legs = term_legs(term, sizes, {**dict.fromkeys(left, "left"), **dict.fromkeys(right, "right")})
    return min_cut([leg.edge for leg in legs], {"left"}, {"right"})


def absorbing(net: Network, term: Term) -> frozenset[int]:
    """Places in the term of the factors that can take up any change of basis: trainable, and used once."""
    uses = Counter(factor.name for factor in net.uses() if factor.kind == "trainable")
    return frozenset(
        place for place, factor in enumerate(term.factors) if factor.kind == "trainable" and uses[factor.name] == 1
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


def bond_cut(
    bond: Leg,
    edges: Sequence[Edge],
    at: Mapping[Node, Sequence[int]],
    free: frozenset[int],
    limit: int | None = None,
) -> int:
    """The largest useful size of a bond of a term, its own size where nothing limits it; at most ``limit``.

    An index that all holders carry stands beside the bond, one change of basis for each of its values, and limits
    nothing.
    """

    def beside(edge: Edge) -> bool:
        return bond.holders <= edge.nodes

    limits: list[int] = []
    for absorber in sorted(bond.holders & free):
        rest = bond.holders - {absorber}
        if len(rest) == 1:
            limits.append(min_cut(edges, rest, {absorber, "outer"}, limit=limit, skip=beside, at=at).size)
        else:
            near = {k for place in rest for k in at.get(place, ())}
            limits.append(prod(edges[k].size for k in near if not beside(edges[k])))
    return min(limits) if limits else int(bond.size)
