"""Factors with columns of length one: what an array is divided by, and the gradient of that, written out.

Autograd would take a dozen small operations for each array and keep the lengths; this takes four and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

Norms = Sequence[
    tuple[int, ...]
]  # for each factor the axes that its columns run over, none where it is not normalised


def normalised(array: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The array with its columns (what the axes run over) of length one; a zero column stays zero.

    >>> normalised(torch.tensor([[3.0], [4.0]]), (0,)).flatten()
    tensor([0.6000, 0.8000])
    """
    return array / _length(array, axes)


def from_normalised(grad: Tensor, array: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The array's gradient from that of what :func:`normalised` makes of it.

    >>> from_normalised(torch.tensor([[5.0], [0.0]]), torch.tensor([[3.0], [4.0]]), (0,)).flatten()
    tensor([ 0.6400, -0.4800])
    """
    length = _length(array, axes)
    unit = array / length
    along = (grad * unit).sum(axes, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1) / length


def all_normalised(factors: Sequence[Tensor], norms: Norms, wanted: Collection[int] | None = None) -> list[Tensor]:
    """The factors, those ``wanted`` (None: all) normalised where they are to be.

    >>> [factor.item() for factor in all_normalised([torch.tensor([2.0])] * 2, [(), (0,)])]
    [2.0, 1.0]
    """
    return [
        normalised(factor, axes) if axes and (wanted is None or k in wanted) else factor
        for k, (factor, axes) in enumerate(zip(factors, norms, strict=True))
    ]


def all_from_normalised(
    grads: Sequence[Tensor | None], factors: Sequence[Tensor], norms: Norms
) -> list[Tensor | None]:
    """The gradients of the factors from those of what :func:`all_normalised` makes of them.

    >>> all_from_normalised([None, torch.tensor([1.0])], [torch.tensor([2.0])] * 2, [(), (0,)])
    [None, tensor([0.])]
    """
    return [
        from_normalised(grad, factor, axes) if grad is not None and axes else grad
        for grad, factor, axes in zip(grads, factors, norms, strict=True)
    ]


def _length(array: Tensor, axes: tuple[int, ...]) -> Tensor:
    length = torch.linalg.vector_norm(array, dim=axes, keepdim=True)
    return length.clamp_min(torch.finfo(array.dtype).tiny)
