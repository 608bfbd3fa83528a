"""Many adapters of one factorization as one: every factor but the constants gets the index ``replica``."""

from __future__ import annotations

from dataclasses import replace

from tnpeft.networks.errors import NetworkError
from tnpeft.networks.factor import Factor, Term
from tnpeft.networks.factorization import Factorization, Line
from tnpeft.networks.network import Network

REPLICA = "replica"


def replicated(f: Factorization) -> Factorization:
    """The factorization of several adapters side by side, ``replica`` the first index of factors and output.

    Constant factors are data and shared by all. Selecting ``replica`` gives the factorization back.

    Raises:
        NetworkError: a line carries the index already.

    >>> print(replicated(Factorization.of("d[out] ^W[out inp] -> out inp")).network)
    d[replica out] ^W[out inp] -> replica out inp
    """
    return replace(f, lines=tuple(Line(with_replicas(line.network), line.sites) for line in f.lines))


def with_replicas(net: Network) -> Network:
    """One line of :func:`replicated`.

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
    terms = tuple(Term(tuple(map(_factor, term.factors)), term.sign) for term in net.terms)
    return Network(terms, ((REPLICA,), *net.output))


def _factor(factor: Factor) -> Factor:
    return factor if factor.kind == "constant" else replace(factor, indices=(REPLICA, *factor.indices))
