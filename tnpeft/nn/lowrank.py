"""A site's update as two thin matrices: exact through its smallest cut, or the nearest of a given rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from tnpeft.counting.cuts import term_cut
from tnpeft.networks import Factor, Network, Term
from tnpeft.networks.factor import Group
from tnpeft.nn.dense import evaluator
from tnpeft.planning.planner import planned
from tnpeft.planning.steps import fresh


@dataclass(frozen=True)
class Cut:
    """A partition of a term's factors: places on the side of the rows, the indices between, their size."""

    left: tuple[int, ...]
    indices: Group
    size: int


def cut(net: Network, term: Term, sizes: Mapping[str, int]) -> Cut:
    """The smallest cut of a term between the rows and the columns of its matrix.

    A row index counts as standing on the left, a column index on the right, so that an index of the matrix which
    the other side's factors carry is cut as well.

    >>> from tnpeft.networks import network
    >>> net = network("b[out] B[out r] d[r] A[r inp] -> out inp")
    >>> cut(net, net.terms[0], {"out": 8, "r": 2, "inp": 8})
    Cut(left=(0, 1), indices=('r',), size=2)
    """
    return _cut(net, term, tuple((index, sizes[index]) for index in net.indices))


@lru_cache(maxsize=256)
def _cut(net: Network, term: Term, sizes: tuple[tuple[str, int], ...]) -> Cut:
    side = term_cut(term, dict(sizes), net.rows, net.cols).side
    left = tuple(place for place in range(len(term.factors)) if place in side)
    ours = set(net.rows).union(*(term.factors[place].indices for place in left))
    theirs = set(net.cols).union(*(f.indices for place, f in enumerate(term.factors) if place not in side))
    between = tuple(index for index in net.indices if index in ours & theirs)
    return Cut(left, between, prod(dict(sizes)[index] for index in between))


def cut_rank(net: Network, sizes: Mapping[str, int]) -> int:
    """The columns of :func:`sides`' first matrix: the sum of the terms' smallest cuts.

    >>> from tnpeft.networks import network
    >>> cut_rank(network("D[out g] ^J[h] -> out (h g)"), {"out": 6, "g": 2, "h": 3})
    2
    """
    return sum(cut(net, term, sizes).size for term in net.terms)


def sides(
    net: Network, sizes: Mapping[str, int], arrays: Mapping[str, Tensor], **values: int
) -> tuple[Tensor, Tensor]:
    """Two matrices ``[rows, k]`` and ``[k, cols]`` whose product is the network's, each side contracted alone.

    Args:
        net: one site's network.
        sizes: of every index.
        arrays: the factors by label.
        values: of its stack indices.

    >>> from tnpeft.networks import network
    >>> arrays = {"D": torch.ones(6, 2), "J": torch.ones(3)}
    >>> left, right = sides(network("D[out g] ^J[h] -> out (h g)"), {"out": 6, "g": 2, "h": 3}, arrays)
    >>> tuple(left.shape), tuple(right.shape), (left @ right).eq(1).all().item()
    ((6, 2), (2, 6), True)
    """
    if values:
        at = {net.label(f): tuple(values.get(index, slice(None)) for index in f.indices) for f in net.factors}
        net, arrays = net.select(*values), {label: array[at[label]] for label, array in arrays.items()}
    return compiled_sides(net, sizes)(arrays)


_Side = Callable[[Mapping[str, Tensor]], Tensor]


def compiled_sides(net: Network, sizes: Mapping[str, int]) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]:
    """:func:`sides` as a function of the factors by label, planned once."""
    return _compiled(net, tuple((index, sizes[index]) for index in net.indices))


@lru_cache(maxsize=512)
def _compiled(
    net: Network, dims: tuple[tuple[str, int], ...]
) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]:
    found, sizes = [], dict(dims)
    for term in net.terms:
        it = cut(net, term, sizes)
        theirs = [place for place in range(len(term.factors)) if place not in it.left]
        left = _side(net, [term.factors[k] for k in it.left], net.rows, it.indices, sizes)
        right = _side(net, [term.factors[k] for k in theirs], net.cols, it.indices, sizes)
        found.append((term.sign, left, right))

    def both(arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        lefts = [left(arrays) if sign > 0 else -left(arrays) for sign, left, _ in found]
        rights = [right(arrays).T for *_, right in found]
        return (lefts[0], rights[0]) if len(found) == 1 else (torch.cat(lefts, 1), torch.cat(rights, 0))

    return both


def _side(net: Network, factors: list[Factor], group: Group, between: Group, sizes: Mapping[str, int]) -> _Side:
    """Some factors as a matrix ``[group, between]``; an index of both is its own row and column by an identity."""
    taken = {*sizes, *(factor.name for factor in net.factors)}
    copies: dict[str, str] = {}
    for index in [i for i in between if i in group]:
        copies[index] = fresh(index, taken)
        taken.add(copies[index])
    line = Network(
        (Term((*factors, *(Factor(copy, (index, copy), "constant") for index, copy in copies.items()))),),
        (group, tuple(copies.get(index, index) for index in between)),
    )
    dims = tuple((index, sizes[{copy: i for i, copy in copies.items()}.get(index, index)]) for index in line.indices)
    form = evaluator(planned(line, dims, None))
    labels = {line.label(factor): net.label(factor) for factor in factors}
    shape = tuple(prod(sizes[index] for index in part) for part in (group, between))

    def side(arrays: Mapping[str, Tensor]) -> Tensor:
        like = next(iter(arrays.values()))
        own = {label: arrays[name] for label, name in labels.items()}
        for index, copy in copies.items():
            own[copy] = torch.eye(sizes[index], dtype=like.dtype, device=like.device)
        matrix: Tensor = form(own)
        return matrix.reshape(shape)

    return side


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The two matrices of the given rank nearest to ``left @ right``, and the relative error, by a thin SVD.

    The singular values are shared evenly between the two.

    >>> left, right, error = truncated(torch.eye(2), torch.diag(torch.tensor([4.0, 3.0])), 1)
    >>> (left @ right).round(decimals=5).tolist(), round(error, 5)
    ([[4.0, 0.0], [0.0, 0.0]], 0.6)
    """
    q, upper = torch.linalg.qr(left.double())
    p, lower = torch.linalg.qr(right.double().T)
    u, s, vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = s[:rank].sqrt()
    error = float(s[rank:].norm() / s.norm()) if s.any() else 0.0
    return (q @ u[:, :rank] * root).to(left.dtype), (root[:, None] * vt[:rank] @ p.T).to(right.dtype), error
