"""Brute force: the plainest possible evaluation of a network, kept apart from the code that it judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnpeft.networks import Factorization, Network, Term
from tnpeft.networks.sizes import Sizes, bind, integers
from tnpeft.testing.strategies import random_factors

Arrays = Mapping[str, NDArray[Any]]


def brute(net: Network, factors: Arrays, *, absolute: bool = False) -> NDArray[Any]:
    """The dense update, one axis per output group, by ``numpy.einsum`` without optimisation, term by term.

    With ``absolute`` every factor and every sign is made positive: what rounding errors are relative to.

    >>> from tnpeft.networks import network
    >>> brute(network("B[out r] A[r inp] -> out inp"), {"B": np.ones((2, 3)), "A": np.ones((3, 1))})
    array([[3.],
           [3.]])
    """
    size = {i: n for f in net.uses() for i, n in zip(f.indices, factors[net.label(f)].shape, strict=True)}
    total: NDArray[Any] = np.zeros([size[i] for i in net.outer])
    for term in net.terms:
        arrays = [factors[net.label(factor)] for factor in term.factors]
        product = _einsum(net, term, [np.abs(a) for a in arrays] if absolute else arrays)
        total = total + (product if absolute else term.sign * product)
    return total.reshape([prod(size[i] for i in group) for group in net.output])


def _einsum(net: Network, term: Term, arrays: Sequence[NDArray[Any]], free: int | None = None) -> NDArray[Any]:
    """One term with an axis (of size 1 if it does not carry it) per open index; operand ``free`` has an axis more."""
    number = {index: k for k, index in enumerate(net.indices)}
    carried = [index for index in net.outer if term.places()[index]]
    operands: list[Any] = []
    for k, (factor, array) in enumerate(zip(term.factors, arrays, strict=True)):
        axes = [number[index] for index in factor.indices]
        operands += [array, [len(number), *axes] if k == free else axes]
    lead = [] if free is None else [len(number)]
    result = np.asarray(np.einsum(*operands, [*lead, *(number[i] for i in carried)], optimize=False))
    shape = dict(zip(carried, result.shape[len(lead) :], strict=True))
    return result.reshape([*result.shape[: len(lead)], *(shape.get(i, 1) for i in net.outer)])


def tolerance(net: Network, sizes: Mapping[str, int], dtype: Any = np.float64) -> float:
    """Largest relative error of a correct contraction, in any order, against ``brute(..., absolute=True)``.

    A product of n numbers has at most n - 1 roundings, a sum of m terms m - 1 in the worst order; two correct
    results differ by at most twice that.

    >>> from tnpeft.networks import network
    >>> tolerance(network("A[out r] B[r inp] -> out inp"), {"out": 2, "r": 2, "inp": 2}) < 1e-14
    True
    """
    outer = set(net.outer)
    sums = sum(prod(sizes[i] for i in term.places() if i not in outer) for term in net.terms)
    return 2 * float(np.finfo(dtype).eps) * (sum(len(term.factors) for term in net.terms) + sums)


def jacobian_rank(
    net: Network | Factorization, sizes: Sizes | None = None, /, *, seed: int = 0, **keywords: Any
) -> int:
    """Rank of d dense / d trainable factors at a random point, in float64: the true degrees of freedom.

    Exact with probability one for generic factors; the Jacobian is dense, so keep the sizes small.

    Raises:
        NetworkError: a size is missing, unknown or no positive whole number.

    >>> from tnpeft.networks import network
    >>> jacobian_rank(network("B[out r] A[r inp] -> out inp"), out=5, r=2, inp=4)  # 2 (5 + 4) - 2 * 2
    14
    """
    bound = net.bind(sizes, keywords) if isinstance(net, Factorization) else bind(net, sizes, keywords)
    net = net.network if isinstance(net, Factorization) else net
    whole = integers(net, bound)
    factors = random_factors(net, whole, seed)
    blocks = [_jacobian(net, whole, factors, f.name) for f in net.factors if f.kind == "trainable"]
    return int(np.linalg.matrix_rank(np.concatenate(blocks))) if blocks else 0


def _jacobian(net: Network, sizes: Mapping[str, int], factors: Arrays, name: str) -> NDArray[Any]:
    """d dense / d one factor, ``[elements of the factor, elements of dense]``: product rule over its uses."""
    shape = factors[name].shape
    units = np.eye(prod(shape)).reshape(prod(shape), *shape)
    full = (prod(shape), *(sizes[i] for i in net.outer))
    total = np.zeros(full)
    for term in net.terms:
        arrays = [factors[net.label(factor)] for factor in term.factors]
        for k, factor in enumerate(term.factors):
            if net.label(factor) == name:
                total = total + term.sign * _einsum(net, term, [*arrays[:k], units, *arrays[k + 1 :]], free=k)
    return total.reshape(prod(shape), -1)
