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


class Units:
    """Factors, those ``wanted`` (None: all) with columns of length one where they are to be; zero columns stay zero.

    >>> units = Units([torch.tensor([[3.0], [4.0]]), torch.tensor([2.0])], [(0,), ()])
    >>> units.factors[0].flatten(), units.factors[1]
    (tensor([0.6000, 0.8000]), tensor([2.]))
    >>> units.gradients([torch.tensor([[5.0], [0.0]]), None])
    [tensor([[ 0.6400],
            [-0.4800]]), None]
    """

    def __init__(self, factors: Sequence[Tensor], norms: Norms, wanted: Collection[int] | None = None) -> None:
        self.factors, self._norms = [*factors], norms
        self._lengths: dict[int, Tensor] = {}
        for k, axes in enumerate(norms):
            if axes and (wanted is None or k in wanted):
                length = torch.linalg.vector_norm(factors[k], dim=axes, keepdim=True)
                self._lengths[k] = length = length.clamp_min(torch.finfo(length.dtype).tiny)
                self.factors[k] = factors[k] / length

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the factors as they were given, from those of what they have become."""
        found = [*grads]
        for k, length in self._lengths.items():
            if (grad := grads[k]) is not None:
                unit = self.factors[k]
                along = (grad * unit).sum(self._norms[k], keepdim=True)
                found[k] = torch.addcmul(grad, unit, along, value=-1) / length
        return found
