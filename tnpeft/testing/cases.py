"""Small instances of a network or a factorization: sizes at which brute force is quick and ranks are generic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from tnpeft.layout import Layout, layout
from tnpeft.networks import STACK, Factorization, Network, NetworkError, Site
from tnpeft.networks.sizes import Sizes, bind, integers
from tnpeft.testing.strategies import equal_indices

_MOST_WORK = 1 << 19  # multiplications of one brute-force einsum
_MOST_BONDS = 8  # of size 2, for the same reason
_STACK = {"task": 2, "replica": 2}
_SIDES = {"q_proj": (12, 12), "fc1": (24, 12), "fc2": (12, 24)}


@dataclass(frozen=True)
class Case:
    """A network at sizes that can be worked out by brute force; ``where`` tells which part of the subject it is."""

    network: Network
    sizes: Mapping[str, int]
    where: str = ""


def small_sizes(net: Network, given: Sizes | None = None) -> dict[str, int]:
    """Sizes for every index that is not given: rows and columns larger than bonds, stack indices 2.

    >>> from tnpeft.networks import network
    >>> small_sizes(network("B[layer out r] A[layer r inp] -> layer out inp"))
    {'layer': 2, 'out': 5, 'r': 2, 'inp': 6}
    """
    given = dict(given or {})
    wanted = dict.fromkeys(net.indices, 2)
    for group, start in ((net.rows, 5), (net.cols, 6)):
        wanted |= {index: max(2, start - k) for k, index in enumerate(group)} if len(group) < 4 else {}
    for members in equal_indices(net):
        common = next((given[i] for i in members if i in given), min(wanted[i] for i in members))
        wanted |= dict.fromkeys(members, common)
    wanted |= given
    for index in reversed(net.indices):
        if _work(net, wanted) > _MOST_WORK and index not in given:
            wanted |= dict.fromkeys(next(m for m in equal_indices(net) if index in m), 1)
    return integers(net, bind(net, wanted, {}))


def _work(net: Network, sizes: Mapping[str, int]) -> int:
    return max(prod(sizes[index] for index in term.places()) for term in net.terms)


def small_factorization(net: Network, sizes: Mapping[str, int]) -> Factorization:
    """A bare network as a factorization with the start values of the general rule; constants are random."""
    splits = {side: tuple(sizes[i] for i in group) for side, group in (("out", net.rows), ("inp", net.cols))}
    init = {factor.name: "normal" for factor in net.factors if factor.kind == "constant"}
    return Factorization.of(net, ranks={bond: sizes[bond] for bond in net.bonds}, splits=splits, init=init)


def reduced(f: Factorization) -> Factorization:
    """The factorization with its free ranks at 2 (of many the later ones at 1) and free splits; rules stay rules."""
    free = [bond for bond, rank in f.ranks.items() if not isinstance(rank, str)]
    small = {bond: 2 if k < _MOST_BONDS else 1 for k, bond in enumerate(free)}
    ranks = {bond: rank if isinstance(rank, str) else min(rank, small[bond]) for bond, rank in f.ranks.items()}
    rules = {side: parts for side, parts in f.splits.items() if any(isinstance(part, str) for part in parts)}
    return replace(f, ranks=ranks, splits=rules)


def small_layout(f: Factorization, sites: Iterable[Site] | None = None) -> Layout:
    """The factorization over two layers of small square, tall and wide sites, those that one of its lines serves.

    Raises:
        NetworkError: no site can be served; pass ``sites``.

    >>> f = Factorization.of("B[layer proj out r] A[layer proj r inp] -> layer proj out inp", ranks={"r": 2})
    >>> small_layout(f).projs
    ('q_proj', 'fc1', 'fc2')
    """
    if sites is not None:
        return layout(f, sites, stack=_STACK)
    served = []
    experts = 2 if any("expert" in line.network.stack for line in f.lines) else 0
    for proj, (out, inp) in _SIDES.items():
        trial = [Site(layer, proj, out, inp, heads=2, experts=experts) for layer in range(2)]
        try:
            layout(f, trial, stack=_STACK)
        except NetworkError:
            continue
        served += trial
    if not served:
        raise NetworkError(
            f"{f.name!r} fits none of the small sites {', '.join(f'{a} x {b}' for a, b in _SIDES.values())}",
            line=str(f.network),
            remedy="pass sites=[tnpeft.Site(0, 'q_proj', out, inp)] of a shape that it fits",
        )
    return layout(f, served, stack=_STACK)


def cases(plan: Layout) -> tuple[Case, ...]:
    """One case per line and shape of site, with all its stack indices."""
    found: dict[tuple[Network, tuple[tuple[str, int], ...]], Case] = {}
    for place in plan.site_layouts:
        net = place.line.network
        sizes = {**place.sizes, **{i: 2 for i in net.stack if i in STACK}}
        key = net, tuple(sorted(sizes.items()))
        where = f"{place.site.proj} {place.site.out} x {place.site.inp}"
        found.setdefault(key, Case(net, sizes, where))
    return tuple(found.values())
