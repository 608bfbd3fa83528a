"""The dense tensor of a network from its factors, in numpy or torch, by the steps of its best plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import numpy as np

from tnpeft.networks import Factorization, Network, NetworkError
from tnpeft.networks.factor import Group
from tnpeft.networks.sizes import Sizes, bind, require_network
from tnpeft.planning.planner import planned
from tnpeft.planning.steps import Plan

Array = Any  # a numpy array or a torch tensor


def dense(net: Network | Factorization, factors: Mapping[str, Array], *, sizes: Sizes | None = None) -> Array:
    """The dense tensor ``[*stack, rows, cols]``, one axis per output group, of the factors' own kind and dtype.

    ``factors`` maps each factor's name to its array (``"~G"`` is the frozen start value of a trainable ``G``);
    sizes are read off the arrays. Torch tensors stay on their device and are differentiable, twice as well.

    Args:
        net: a network, or a factorization, of which the first line is taken.
        factors: numpy arrays or torch tensors, one per factor, axes in the order of the factor's indices.
        sizes: sizes that the arrays must have; what is not given is free.

    Raises:
        NetworkError: a factor is missing, unknown or of the wrong shape, or both kinds of array are mixed.

    >>> from tnpeft.networks import network
    >>> dense(network("B[out r] A[r inp] -> out inp"), {"B": np.ones((2, 3)), "A": np.ones((3, 1))})
    array([[3.],
           [3.]])
    """
    line = net.network if isinstance(net, Factorization) else net
    require_network(line)
    arrays = _checked(line, factors)
    dims = _measured(line, arrays, sizes)
    training = any(getattr(array, "requires_grad", False) for array in arrays.values())
    result = run(planned(line, tuple(dims.items()), None, "time", training), arrays)
    return result.reshape(tuple(prod(dims[index] for index in group) for group in line.output))


def run(plan: Plan, arrays: Mapping[str, Array]) -> Array:
    """The result of a dense plan's steps, one axis per open index.

    >>> from tnpeft.networks import network
    >>> p = planned(network("U[out r] U[inp r] -> out inp"), (("out", 2), ("r", 1), ("inp", 2)), None)
    >>> run(p, {"U": np.ones((2, 1))})
    array([[1., 1.],
           [1., 1.]])
    """
    values = dict(arrays)
    for step in plan.steps:
        found = [values[name] for name in step.operands]
        if step.kind == "contract":
            left, right = step.uses
            values[step.result] = pairwise(left, right, step.indices)(*found)
        elif step.kind == "add":
            parts = [aligned(use, step.indices)(value) for use, value in zip(step.uses, found, strict=True)]
            values[step.result] = _signed_sum(parts, step.signs)
    return values[plan.steps[-1].result]


# ---- two operands


def pairwise(left: Group, right: Group, result: Group) -> Callable[[Array, Array], Array]:
    """A function of two arrays: multiply them, sum the shared indices that the result lacks.

    >>> pairwise(("a", "b"), ("b",), ("a",))(np.ones((2, 3)), np.ones(3))
    array([3., 3.])
    """
    summed = tuple(index for index in left if index in right and index not in result)
    if not summed:
        spread_left, spread_right = aligned(left, result), aligned(right, result)
        return lambda a, b: spread_left(a) * spread_right(b)
    return matmul(left, right, result)


def matmul(left: Group, right: Group, result: Group) -> Callable[[Array, Array], Array]:
    """As :func:`pairwise`, by a product of (stacks of) matrices even where nothing is summed.

    >>> matmul(("a",), ("b",), ("b", "a"))(np.ones(2), np.ones(3)).shape
    (3, 2)
    """
    summed = tuple(index for index in left if index in right and index not in result)
    batch = tuple(index for index in result if index in left and index in right)
    rows = tuple(index for index in result if index in left and index not in right)
    cols = tuple(index for index in result if index in right and index not in left)
    return _Matmul(
        _order(left, batch + rows + summed),
        _order(right, batch + summed + cols),
        _order(batch + rows + cols, result),
        len(batch),
        len(summed),
    )


@dataclass(frozen=True)
class _Matmul:
    """Both operands as (stacks of) matrices, their product, and its axes in the wanted order."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    result: tuple[int, ...]
    batch: int
    summed: int

    def __call__(self, a: Array, b: Array) -> Array:
        a, b = permuted(a, self.left), permuted(b, self.right)
        stack, rows = tuple(a.shape[: self.batch]), tuple(a.shape[self.batch : len(self.left) - self.summed])
        middle, cols = prod(a.shape[len(stack) + len(rows) :]), tuple(b.shape[self.batch + self.summed :])
        product = a.reshape((*stack, prod(rows), middle)) @ b.reshape((*stack, middle, prod(cols)))
        return permuted(product.reshape((*stack, *rows, *cols)), self.result)


def aligned(own: Group, wanted: Group) -> Callable[[Array], Array]:
    """A function that gives an array the wanted axes, of size 1 where it has none: ready to broadcast.

    >>> aligned(("b", "a"), ("a", "c", "b"))(np.ones((2, 3))).shape
    (3, 1, 2)
    """
    order = _order(own, tuple(index for index in wanted if index in own))
    place = tuple(index in own for index in wanted)

    def align(array: Array) -> Array:
        array = permuted(array, order)
        shape = iter(array.shape)
        return array.reshape(tuple(next(shape) if here else 1 for here in place))

    return align


def permuted(array: Array, order: tuple[int, ...]) -> Array:
    """The array with its axes in another order; a view, and the array itself if nothing changes."""
    if order == tuple(range(len(order))):
        return array
    return array.transpose(order) if isinstance(array, np.ndarray) else array.permute(order)


def _order(own: Group, wanted: Group) -> tuple[int, ...]:
    return tuple(own.index(index) for index in wanted)


def _signed_sum(parts: Sequence[Array], signs: Sequence[int]) -> Array:
    total = parts[0] if signs[0] > 0 else -parts[0]
    for part, sign in zip(parts[1:], signs[1:], strict=True):
        total = total + part if sign > 0 else total - part
    return total


# ---- what comes in


def _checked(net: Network, factors: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays by label, all numpy or all torch and then of one dtype."""
    labels = [net.label(factor) for factor in net.factors]
    for name in factors:
        if name not in labels:
            known = ", ".join(labels)
            raise NetworkError(f"the line has no factor {name!r}", line=str(net), remedy=f"the factors are {known}")
    for label in labels:
        if label not in factors:
            raise NetworkError(f"no array for the factor {label!r}", line=str(net), remedy=f"add {label!r}")
    tensors = [label for label in labels if hasattr(factors[label], "requires_grad")]
    if not tensors:
        return {label: np.asarray(factors[label]) for label in labels}
    for label in labels:
        if label not in tensors:
            raise NetworkError(
                f"{tensors[0]!r} is a torch tensor and {label!r} is not",
                line=str(net),
                remedy="pass torch tensors only, or numpy arrays only",
            )
    return _one_dtype({label: factors[label] for label in labels})


def _one_dtype(tensors: dict[str, Array]) -> dict[str, Array]:
    """Torch multiplies matrices of one dtype only, so all take the widest."""
    from torch import promote_types

    dtype = reduce(promote_types, (tensor.dtype for tensor in tensors.values()))
    return {label: tensor.to(dtype) for label, tensor in tensors.items()}


def _measured(net: Network, arrays: Mapping[str, Array], sizes: Sizes | None) -> dict[str, int]:
    """The size of every index, read off the arrays and checked to agree with each other and with ``sizes``."""
    dims = dict(bind(net, sizes, {}))
    for factor in net.uses():
        label, shape = net.label(factor), tuple(arrays[net.label(factor)].shape)
        needed = tuple(dims.get(index, "any") for index in factor.indices)
        fits = len(shape) == len(needed) and all(n in ("any", s) for n, s in zip(needed, shape, strict=True))
        if not fits or 0 in shape:
            raise NetworkError(
                f"the array for {label!r} {'has' if not fits else 'is empty: it has'} shape {shape}, "
                f"{factor} needs ({', '.join(map(str, needed))})",
                line=str(net),
                remedy=f"give {label!r} one axis per index, in their order, of the sizes that the other factors have",
            )
        dims |= zip(factor.indices, shape, strict=True)
    return {index: dims[index] for index in net.indices}
