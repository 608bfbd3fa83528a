"""Many adapters of one network as one: every factor but the constants gets the index ``replica``."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tnpeft.networks.errors import NetworkError
from tnpeft.networks.factor import Factor, Term
from tnpeft.networks.factorization import Factorization, SiteRule
from tnpeft.networks.network import Network

REPLICA = "replica"


def replicated(*each: Factorization) -> Factorization:
    """The factorization of several adapters side by side, ``replica`` the first index of factors and output.

    Constant factors are data and shared by all. Selecting ``replica`` gives the factorization back. The adapters may
    differ in ranks and scale: a bond is then as wide as the widest, a constant masks it with ones and zeros, and
    another holds the scales. One factorization stands for any number of adapters that do not differ.

    Raises:
        NetworkError: a line carries the index already, or the adapters have not what is :func:`common` in common.

    >>> print(replicated(Factorization.of("d[out] ^W[out inp] -> out inp")).network)
    d[replica out] ^W[out inp] -> replica out inp
    >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 3})
    >>> both = replicated(f, f.with_ranks(r=1))
    >>> print(both.network, both.init)
    B[replica out r] A[replica r inp] ^mask_r[replica r] -> replica out inp {'mask_r': [[1, 1, 1], [1, 0, 0]]}
    """
    first = each[0]
    if any(common(f) != common(first) for f in each):
        raise NetworkError(
            "replicas may differ in scale, and in ranks that are numbers from which no rule derives a size",
            line=str(first.network),
            remedy="train adapters that differ in more apart",
        )
    taken = {factor.name for line in first.lines for factor in line.network.factors}
    ranks, scale, constants = dict(first.ranks), first.scale, list[Factor]()
    values: dict[str, Any] = {}
    for bond in [bond for bond, rank in first.ranks.items() if any(f.ranks[bond] != rank for f in each)]:
        own = [int(f.ranks[bond]) for f in each]
        ranks[bond] = max(own)
        constants.append(Factor(_free(f"mask_{bond}", taken), (REPLICA, bond), "constant"))
        values[constants[-1].name] = [[int(k < rank) for k in range(max(own))] for rank in own]
    if any(f.scale != scale for f in each):
        scale = 1.0
        constants.append(Factor(_free("scales", taken), (REPLICA,), "constant"))
        values[constants[-1].name] = [f.scale for f in each]
    lines = tuple(SiteRule(with_replicas(line.network, *constants), line.sites) for line in first.lines)
    return replace(first, lines=lines, ranks=ranks, init={**first.init, **values}, scale=scale)


def common(f: Factorization) -> Factorization:
    """The factorization without what replicas may differ in: its scale, and ranks that are not part of any rule.

    >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 8}, scale=2.0)
    >>> common(f) == common(f.with_ranks(r=4)), common(f).ranks, common(f.with_ranks(r="min(out, 4)")).ranks
    (True, {'r': 1}, {'r': 'min(out, 4)'})
    """
    rules = [*f.ranks.values(), *(part for parts in f.splits.values() for part in parts)]
    words = {word for rule in rules if isinstance(rule, str) for word in re.findall(r"\w+", rule)}
    ranks = {bond: rank if isinstance(rank, str) or bond in words else 1 for bond, rank in f.ranks.items()}
    return replace(f, ranks=ranks, scale=1.0)


def with_replicas(net: Network, *constants: Factor) -> Network:
    """One line of :func:`replicated`; the constants go into every term that has their bonds.

    >>> from tnpeft.networks.notation import network
    >>> print(with_replicas(network("B[out r] A[r inp] -> out inp")))
    B[replica out r] A[replica r inp] -> replica out inp
    """
    if REPLICA in net.indices:
        raise NetworkError(
            f"the line carries {REPLICA!r} already",
            line=str(net),
            position=str(net).index(REPLICA),
            remedy="write the line of one adapter: the index is added to it",
        )
    terms = []
    for term in net.terms:
        own = [c for c in constants if term.places().keys() >= {*c.indices} - {REPLICA}]
        terms.append(Term((*map(_factor, term.factors), *own), term.sign))
    return Network(tuple(terms), ((REPLICA,), *net.output))


def _factor(factor: Factor) -> Factor:
    return factor if factor.kind == "constant" else replace(factor, indices=(REPLICA, *factor.indices))


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name
