"""Degrees of freedom: parameters less the changes of basis that leave the product as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any

from tnpeft.counting.cuts import Leg, absorbing, bond_cut, term_cut, term_legs, warn_ranks
from tnpeft.counting.min_cut import incidence
from tnpeft.counting.parameters import layout_on, site_shapes
from tnpeft.layout import Layout
from tnpeft.models.cards import Model, Targets
from tnpeft.networks import Factorization, Network, NetworkError, Term
from tnpeft.networks.sizes import Size, Sizes, complete, product


def dof(
    net: Network | Factorization,
    sizes: Sizes | None = None,
    /,
    *,
    model: Model = None,
    targets: Targets = None,
    **more: Size,
) -> Any:
    """The parameters modulo gauge of the whole stack: an int, or an expression if a size is a symbol.

    Every bond is clipped to its cut; a factor whose indices lie within a trainable factor's is absorbed by it; then

        gauge = (F - 1) + sum over bonds (S**2 - 1) H + sum over hyper and batch legs (k - 1) (S - 1) H

    with F trainable factors, S a leg's size, k its trainable factors, H the product of the hyper and batch legs
    that contain it. A leg that a frozen or constant factor carries is hyper. A cap, for every part of a term that
    shares no index with the rest, is the dimension of the matrices of the rank that its cut allows (at full rank: the
    dense size). It counts known symmetries, so it is an upper bound (defective formats exist); for a sum it is
    the terms' total. With a model (arguments as :func:`tnpeft.parameters`) it is the sum over shapes of sites, at
    most the parameters: what sites of several shapes share enters each of them. With symbols nothing is clipped or
    capped: no rank is taken to exceed its cut.

    Raises:
        NetworkError: a size is missing, or a trainable factor is used twice.

    Warns:
        RankWarning: a bond is larger than its cut.

    >>> import tnpeft
    >>> dof(tnpeft.network("B[out r] A[r inp] -> out inp"), out=64, inp=32, r=4)
    368
    """
    if model is not None:
        found = layout_on(net, sizes, model=model, targets=targets, **more)
        for shape in found.shapes():
            warn_ranks(shape.network, shape.sizes)
        return dof_on(found)
    [alone] = site_shapes(net, sizes, targets=targets, **more)
    network, bound = alone.network, alone.sizes
    complete(network, bound)
    if all(isinstance(size, int) for size in bound.values()):
        warn_ranks(network, bound)
    return _dof(network, bound)


def dof_on(found: Layout) -> int:
    """The degrees of freedom over a selection of sites: the sum over their shapes, at most the parameters.

    Factors that sites of several shapes share are counted with each shape, so it is an upper bound there.

    Raises:
        NetworkError: a trainable factor is used twice.

    >>> from tnpeft import families
    >>> from tnpeft.layout import layout
    >>> from tnpeft.networks import Site
    >>> dof_on(layout(families.lora(rank=4), [Site(0, "q_proj", 64, 32), Site(0, "fc1", 128, 32)]))
    992
    """
    return min(sum(int(_dof(shape.network, shape.sizes)) for shape in found.shapes()), found.count())


def _dof(network: Network, bound: Sizes) -> Any:
    _refuse_tied(network)
    exact = all(isinstance(size, int) for size in bound.values())
    total: Any = 0
    for term in network.terms:
        total = total + _term_dof(network, term, bound, exact)
    return min(total, prod(bound[i] for i in network.outer)) if exact else total.expand()


def _refuse_tied(net: Network) -> None:
    uses = Counter(net.label(factor) for factor in net.uses() if factor.kind == "trainable")
    for label, count in uses.items():
        if count > 1:
            raise NetworkError(
                f"the trainable factor {label!r} is used twice: no formula gives the degrees of freedom",
                line=str(net),
                remedy="use tnpeft.testing.jacobian_rank, which counts them at a random point",
            )


def _term_dof(net: Network, term: Term, sizes: Mapping[str, Size], exact: bool) -> Any:
    """The parts of a term without a common index count apart; between them is one gauge less than there are parts."""
    parts = [part for part in _parts(_absorb(term)) if any(f.kind == "trainable" for f in part.factors)]
    total: Any = -max(0, len(parts) - 1)
    for part in parts:
        total = total + _part_dof(net, part, sizes, exact)
    return total


def _part_dof(net: Network, part: Term, sizes: Mapping[str, Size], exact: bool) -> Any:
    trainable = frozenset(place for place, factor in enumerate(part.factors) if factor.kind == "trainable")
    legs = term_legs(part, sizes, dict.fromkeys(net.outer, "outer"))
    if exact:
        legs = _clip(legs, absorbing(net, part))
    count: Any = 0
    for place in trainable:
        count = count + product(leg.size for leg in legs if place in leg.holders)
    count = count - _gauge(legs, trainable)
    return min(count, _reach(net, part, sizes)) if exact else count


def _reach(net: Network, part: Term, sizes: Mapping[str, int]) -> int:
    """The dimension of all stacks of matrices of the rank that the part allows: the dense size at full rank."""
    stack, rows, cols = (
        prod(sizes[i] for i in group if part.places()[i]) for group in (net.stack, net.rows, net.cols)
    )
    rank = term_cut(part, {**sizes, **dict.fromkeys(net.stack, 1)}, net.rows, net.cols).size
    return stack * rank * (rows + cols - rank)


def _parts(term: Term) -> list[Term]:
    """The connected parts of a term: factors without an index in common with the others of the term."""
    groups: dict[str, list[int]] = {}  # index: the places joined to it so far, one list for each part
    for place, factor in enumerate(term.factors):
        joined = {id(groups[index]): groups[index] for index in factor.indices if index in groups}
        part, *others = sorted(joined.values(), key=len, reverse=True) or [[]]
        part += [place, *chain.from_iterable(others)]
        moved = {index for other in others for p in other for index in term.factors[p].indices}
        groups |= dict.fromkeys((*factor.indices, *moved, *([f"{place}"] * (not factor.indices))), part)
    parts = sorted(sorted(part) for part in {id(part): part for part in groups.values()}.values())
    return [Term(tuple(term.factors[place] for place in part)) for part in parts]


def _absorb(term: Term) -> Term:
    """The term without the factors whose indices lie within a trainable factor's: that one can hold the product."""
    kept = dict(enumerate(term.factors))
    carriers: dict[str, set[int]] = {}
    for place, factor in kept.items():
        for index in factor.indices if factor.kind == "trainable" else ():
            carriers.setdefault(index, set()).add(place)
    trainable = {place for place, factor in kept.items() if factor.kind == "trainable"}
    for place in sorted(kept, key=lambda its: len(term.factors[its].indices)):
        among = [carriers.get(index, set()) for index in term.factors[place].indices]
        if (set.intersection(*among) if among else trainable) & kept.keys() - {place}:
            del kept[place]
    return replace(term, factors=tuple(kept.values()))


def _clip(legs: tuple[Leg, ...], free: frozenset[int]) -> tuple[Leg, ...]:
    """The legs with every bond between trainable factors no larger than its cut."""
    clipped, edges = [*legs], [leg.edge for leg in legs]
    at, changed = incidence(edges), True
    while changed:
        changed = False
        for place, leg in enumerate(clipped):
            if not leg.side and leg.holders <= free:
                cut = bond_cut(leg, edges, at, free, leg.size)
                if cut < leg.size:
                    clipped[place], changed = replace(leg, size=cut), True
                    edges[place] = clipped[place].edge
    return tuple(clipped)


def _gauge(legs: Iterable[Leg], trainable: frozenset[int]) -> Any:
    """The dimension of the changes of basis and scale between the trainable factors."""
    bonds: dict[frozenset[int], Any] = {}
    shared: dict[frozenset[int], Any] = {}
    for leg in legs:
        among = leg.holders & trainable
        if len(among) > 1:
            bond = not leg.side and leg.holders == among and len(among) == 2
            into = bonds if bond else shared
            into[among] = into.get(among, 1) * leg.size

    def beside(holders: frozenset[int], *, strictly: bool) -> Any:
        return product(size for its, size in shared.items() if (its > holders if strictly else its >= holders))

    total: Any = len(trainable) - 1
    for holders, size in bonds.items():
        total = total + (size * size - 1) * beside(holders, strictly=False)
    for holders, size in shared.items():
        total = total + (len(holders) - 1) * (size - 1) * beside(holders, strictly=True)
    return total
