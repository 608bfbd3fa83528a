"""Which factors are saved for a backward pass: all but those that are computed again in it.

An autograd function with results that are cheap to repeat has ``again`` in its context, which returns the result of a
number: what reads such a result keeps that in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Again = list[tuple[int, Callable[[int], Tensor], int]]  # place of a factor, function, and the result's number


def kept(factors: Sequence[Tensor]) -> tuple[Sequence[Tensor | None], Again]:
    """Return the factors to save, None in the place of those that are computed again, and how these are."""
    again: Again = []
    if not torch.compiler.is_compiling():  # a compiler decides by itself
        nodes = ((k, factor.grad_fn, factor.output_nr) for k, factor in enumerate(factors))
        again = [(k, node.again, number) for k, node, number in nodes if hasattr(node, "again")]
    saved: list[Tensor | None] = [*factors]
    for k, _, _ in again:
        saved[k] = None
    return saved, again


def restored(saved: Sequence[Tensor | None], again: Again) -> list[Tensor]:
    """Return all factors."""
    factors: list[Any] = [*saved]
    for k, function, number in again:
        factors[k] = function(number)
    return factors
