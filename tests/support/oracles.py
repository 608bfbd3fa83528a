"""What results are compared with: the update by plain einsum, and how far correct results may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tnpeft.networks import Network, Term

if TYPE_CHECKING:
    from torch import Tensor

Array = Any  # a numpy array or a torch tensor


def dense(net: Network, factors: Mapping[str, Array]) -> Array:
    """The update ``[*stack, rows, cols]`` in float64, by one einsum for each term; numpy or torch, as the factors."""
    sizes = _sizes(net, factors)
    return open_axes(net, factors).reshape([prod(sizes[index] for index in group) for group in net.output])


def open_axes(net: Network, factors: Mapping[str, Array], terms: Sequence[Term] | None = None) -> Array:
    """The update with one axis for each open index; of some terms only if they are given."""
    numbers, sizes = {index: k for k, index in enumerate(net.indices)}, _sizes(net, factors)
    tensors = not all(isinstance(array, np.ndarray) for array in factors.values())
    if tensors:
        import torch  # families are tried where there is none
    total: Array = 0.0
    for term in net.terms if terms is None else terms:
        operands: list[Any] = []
        for factor in term.factors:
            array = factors[net.label(factor)]
            operands += [array.double() if tensors else array, [numbers[index] for index in factor.indices]]
        for index in net.outer:  # a term without a stack index is broadcast over it
            if index not in term.places():
                ones = np.ones(sizes[index])
                operands += [torch.from_numpy(ones) if tensors else ones, [numbers[index]]]
        out = [numbers[index] for index in net.outer]
        part = torch.einsum(*operands, out) if tensors else np.einsum(*operands, out, optimize="greedy")
        total = total + term.sign * part
    return total


def _sizes(net: Network, factors: Mapping[str, Array]) -> dict[str, int]:
    shapes = ((factor, factors[net.label(factor)].shape) for factor in net.uses())
    return {index: int(size) for factor, shape in shapes for index, size in zip(factor.indices, shape, strict=True)}


def close(found: Tensor, wanted: Tensor, roundings: float = 64, least: float = 1.0) -> bool:
    """True if all entries agree up to some roundings of ``found``'s dtype, relative to the largest one wanted.

    ``roundings`` counts them: the summands of an entry, times the layers between. ``least`` is the size of an entry
    below which the bound is not lowered: what sums of larger summands that cancel are relative to.
    """
    import torch

    found, wanted = found.detach(), wanted.detach()
    bound = roundings * torch.finfo(found.dtype).eps * max(least, float(wanted.abs().max()))
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= bound)
