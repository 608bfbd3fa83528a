"""Factors that a backward pass computes again are not saved for it.

An autograd function whose results are cheap to repeat has ``tnpeft_again`` in its context, a function of a result's
number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Again = list[tuple[int, Callable[[int], Tensor], int]]  # place of a factor, function, and the result's number


def pack(factors: Sequence[Tensor]) -> tuple[Sequence[Tensor | None], Again]:
    """Return the factors to save, None in the place of those that are computed again, and how these are."""
    if torch.compiler.is_compiling():  # which decides by itself
        return factors, []
    saved, again = list[Tensor | None](factors), Again()
    for k, factor in enumerate(factors):
        function = getattr(factor.grad_fn, "tnpeft_again", None)
        if function is not None:
            again.append((k, function, factor.output_nr))
            saved[k] = None
    return saved, again


def unpack(saved: Sequence[Tensor | None], again: Again) -> list[Tensor]:
    """Return all factors."""
    factors: list[Any] = [*saved]
    for k, function, number in again:
        factors[k] = function(number)
    return factors
