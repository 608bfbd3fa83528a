"""Factors to and from TensorLy's decompositions: CPTensor, TuckerTensor and TTTensor."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from tnpeft.networks import Factor, Factorization, Network, NetworkError, Term
from tnpeft.networks.factor import Group
from tnpeft.networks.sizes import require_network


def to_tensorly(net: Network | Factorization, factors: Mapping[str, Any]) -> Any:
    """Return the factors of a CP, Tucker or tensor-train line as TensorLy's object, one mode per open index.

    Args:
        net: a network, or a factorization, of which the first line is taken (without its scale).
        factors: numpy arrays or torch tensors by name.

    Raises:
        NetworkError: the line is none of the three, or its modes do not stand in the order of the output.

    >>> from tnpeft.networks import network
    >>> line = network("A[a r] B[b r] C[c r] -> a b c")
    >>> to_tensorly(line, {"A": np.ones((2, 3)), "B": np.ones((4, 3)), "C": np.ones((5, 3))}).shape
    (2, 4, 5)
    """
    line = net.network if isinstance(net, Factorization) else net
    require_network(line)
    arrays = {name: np.asarray(a.detach().cpu() if hasattr(a, "detach") else a) for name, a in factors.items()}
    uses = list(line.uses())
    if len(line.terms) == 1 and line.terms[0].sign > 0 and len({f.name for f in uses}) == len(uses):
        for build in (_cp, _tucker, _train):
            if (found := build(line, uses, arrays)) is not None:
                return found
    raise NetworkError(
        "the line is neither CP nor Tucker nor a tensor train over its open indices",
        line=str(line),
        remedy="one term; A[i r] for each open index; or a core over all bonds; or a chain in the output's order",
    )


def from_tensorly(tensor: Any) -> tuple[Network, dict[str, Any]]:
    """Return the network and the factors of a CPTensor, a TuckerTensor or a TTTensor; modes are called ``i1 i2 ...``.

    Raises:
        NetworkError: the tensor is none of these.

    >>> from tensorly.cp_tensor import CPTensor
    >>> net, factors = from_tensorly(CPTensor((None, [np.ones((2, 3)), np.ones((4, 3))])))
    >>> print(net)
    w[r] A1[i1 r] A2[i2 r] -> i1 i2
    """
    from tensorly.cp_tensor import CPTensor
    from tensorly.tt_tensor import TTTensor
    from tensorly.tucker_tensor import TuckerTensor

    if isinstance(tensor, CPTensor):
        names: list[tuple[str, Group]] = [("w", ("r",))]
        names += [(f"A{k}", (f"i{k}", "r")) for k in range(1, len(tensor.factors) + 1)]
        weights = np.ones(tensor.factors[0].shape[1]) if tensor.weights is None else tensor.weights
        values = [weights, *tensor.factors]
    elif isinstance(tensor, TuckerTensor):
        count = len(tensor.factors)
        names = [("G", tuple(f"r{k}" for k in range(1, count + 1)))]
        names += [(f"A{k}", (f"i{k}", f"r{k}")) for k in range(1, count + 1)]
        values = [tensor.core, *tensor.factors]
    elif isinstance(tensor, TTTensor):
        count = len(tensor.factors)
        chain = [(f"r{k - 1}" if k > 1 else "", f"i{k}", f"r{k}" if k < count else "") for k in range(1, count + 1)]
        names = [(f"G{k}", tuple(filter(None, its))) for k, its in enumerate(chain, 1)]
        values = [
            core.reshape([n for n, name in zip(core.shape, its, strict=True) if name])
            for core, its in zip(tensor.factors, chain, strict=True)
        ]
    else:
        raise NetworkError(
            f"expected a CPTensor, TuckerTensor or TTTensor, got {type(tensor).__name__}",
            remedy="pass what tensorly.decomposition.parafac, tucker or tensor_train return",
        )
    modes = dict.fromkeys(index for _, indices in names for index in indices if index.startswith("i"))
    net = Network((Term(tuple(Factor(*name) for name in names)),), tuple((mode,) for mode in modes))
    return net, dict(zip((name for name, _ in names), values, strict=True))


def decomposed(line: Network, sizes: Mapping[str, int], target: np.ndarray[Any, Any]) -> dict[str, Any] | None:
    """Return factors by TensorLy's decomposition of the target, one axis per open index; None for any other line.

    >>> from tnpeft.networks import network
    >>> found = decomposed(network("B[a r] A[r b] -> a b"), {"a": 2, "b": 2, "r": 1}, np.ones((2, 2)))
    >>> np.allclose(found["B"] @ found["A"], 1)
    True
    """
    uses = [*line.uses()]
    if len(line.terms) > 1 or line.terms[0].sign < 0 or len({f.name for f in uses}) < len(uses) or target.ndim < 2:
        return None
    numbers, start = dict[str, Any](), 0  # every entry has a number, by which it is found in TensorLy's arrays
    for factor in uses:
        shape = [sizes[index] for index in factor.indices]
        numbers[factor.name] = np.arange(start, start + math.prod(shape)).reshape(shape)
        start += math.prod(shape)
    for build, decompose in ((_train, _train_of), (_tucker, _tucker_of), (_cp, _cp_of)):
        if (wanted := build(line, uses, numbers)) is not None:
            import tensorly

            with tensorly.backend_context("numpy"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = decompose(wanted, target)
            values = np.zeros(start)
            for places, array in found:  # ranks beyond those of an unfolding stay zero
                values[places[tuple(map(slice, array.shape))]] = array
            return {name: values[places] for name, places in numbers.items()} if found else None
    return None


Parts = list[tuple[Any, Any]]


def _train_of(wanted: Any, target: Any) -> Parts:
    from tensorly.decomposition import tensor_train

    return [*zip(wanted.factors, tensor_train(target, rank=[*wanted.rank]).factors, strict=True)]


def _tucker_of(wanted: Any, target: Any) -> Parts:
    from tensorly.decomposition import tucker

    ranks = [min(rank, size) for rank, size in zip(wanted.rank, target.shape, strict=True)]
    core, factors = tucker(target, rank=ranks, n_iter_max=20)
    return [(wanted.core, core), *zip(wanted.factors, factors, strict=True)]


def _cp_of(wanted: Any, target: Any) -> Parts:
    from tensorly.decomposition import parafac

    if wanted.rank > min(target.shape):  # no start by the singular vectors of each unfolding
        return []
    weights, factors = parafac(target, rank=wanted.rank, init="svd", n_iter_max=20)
    own = np.issubdtype(wanted.weights.dtype, np.integer)
    first = factors[0] if own else factors[0] * weights
    return [*([(wanted.weights, weights)] if own else []), *zip(wanted.factors, [first, *factors[1:]], strict=True)]


def _cp(line: Network, uses: list[Factor], arrays: Mapping[str, Any]) -> Any:
    from tensorly.cp_tensor import CPTensor

    modes = {index: f for f in uses for index in f.indices if index in line.outer and len(f.indices) == 2}
    weights = [f for f in uses if f.indices == line.bonds]
    fits = len(line.bonds) == 1 and [*modes] and set(modes) == set(line.outer) and len(weights) < 2
    if not fits or len(modes) + len(weights) != len(uses) or any(line.bonds[0] not in f.indices for f in uses):
        return None
    factors = [_ordered(modes[i], (i, line.bonds[0]), arrays) for i in line.outer]
    return CPTensor((arrays[weights[0].name] if weights else np.ones(factors[0].shape[1]), factors))


def _tucker(line: Network, uses: list[Factor], arrays: Mapping[str, Any]) -> Any:
    from tensorly.tucker_tensor import TuckerTensor

    cores = [f for f in uses if set(f.indices) == set(line.bonds)]
    modes = {i: f for f in uses for i in f.indices if f not in cores and i in line.outer and len(f.indices) == 2}
    if len(cores) != 1 or set(modes) != set(line.outer) or len({f.name for f in modes.values()}) != len(uses) - 1:
        return None
    bonds = {i: next(b for b in modes[i].indices if b != i) for i in line.outer}
    if sorted(bonds.values()) != sorted(line.bonds):
        return None
    core = _ordered(cores[0], tuple(bonds.values()), arrays)
    return TuckerTensor((core, [_ordered(modes[i], (i, bonds[i]), arrays) for i in line.outer]))


def _train(line: Network, uses: list[Factor], arrays: Mapping[str, Any]) -> Any:
    from tensorly.tt_tensor import TTTensor

    held = {i: [f for f in uses if i in f.indices] for i in line.indices}
    if len(uses) != len(line.outer) or any(len(held[i]) != 1 for i in line.outer):
        return None
    chain = [held[i][0] for i in line.outer]
    before = [None, *([*{*a.indices} & {*b.indices}] for a, b in itertools.pairwise(chain)), None]
    links = [link[0] if link and len(link) == 1 else None for link in before]
    if len({f.name for f in chain}) != len(uses) or None in links[1:-1]:
        return None
    cores = []
    for left, mode, right, factor in zip(links, line.outer, links[1:], chain, strict=False):
        wanted = tuple(index for index in (left, mode, right) if index is not None)
        if sorted(wanted) != sorted(factor.indices):
            return None
        core = _ordered(factor, wanted, arrays)
        cores.append(core.reshape(1 if left is None else core.shape[0], -1, 1 if right is None else core.shape[-1]))
    return TTTensor(cores)


def _ordered(factor: Factor, wanted: Group, arrays: Mapping[str, Any]) -> Any:
    """The array with its axes in the wanted order."""
    return arrays[factor.name].transpose([factor.indices.index(index) for index in wanted])
