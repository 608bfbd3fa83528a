"""A frozen linear and narrow updates of its blocks of rows as one operation, as :mod:`tnpeft.nn.together`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_Grads = tuple[Tensor | None, ...]


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, last: Tensor, scale: float
    ) -> Tensor:
        narrow = first @ x.mT  # narrow sides as rows, see tnpeft.nn.together
        ctx.scale = scale
        ctx.save_for_backward(x, weight, first, last, narrow)
        return linear(x, weight, bias).baddbmm_(narrow.mT, last.mT, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Grads:  # type: ignore[override]
        x, weight, first, last, narrow = ctx.saved_tensors
        on_x, on_weight, on_bias, on_first, on_last, _scale = ctx.needs_input_grad
        twice = torch.is_grad_enabled()  # then what is computed here is differentiated in its turn
        inner = last.mT @ grad.mT * ctx.scale
        to_x = grad @ weight if on_x else None
        if to_x is not None:
            to_x = to_x.baddbmm(inner.mT, first) if twice else to_x.baddbmm_(inner.mT, first)
        to_last = None
        if on_last:
            outer = first @ x.mT if twice else narrow
            to_last = (outer * ctx.scale @ grad).mT
        return (
            to_x,
            grad.flatten(0, 1).t() @ x.flatten(0, 1) if on_weight else None,
            grad.sum((0, 1)) if on_bias else None,
            inner @ x if on_first else None,
            to_last,
            None,
        )


def side_by_side(x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """``linear(x, weight, bias)`` plus, for block k of the rows, ``scale * x @ first[k].T @ last[k].T``.

    ``x [rows, ..., inp]`` is as many equal contiguous blocks as there are ``first [k, narrow, inp]`` and
    ``last [k, out, narrow]``. It is differentiable twice, and for what :func:`tnpeft.nn.together.may_join` allows.

    >>> x, weight = torch.ones(4, 3), torch.zeros(2, 3)
    >>> first, last = torch.ones(2, 1, 3), torch.tensor([1.0, 10.0]).reshape(2, 1, 1).expand(2, 2, 1)
    >>> side_by_side(x, weight, None, first, last, 0.5)[:, 0]
    tensor([ 1.5000,  1.5000, 15.0000, 15.0000])
    """
    result: Tensor = _SideBySide.apply(x.reshape(len(first), -1, x.shape[-1]), weight, bias, first, last, scale)
    return result.reshape(*x.shape[:-1], result.shape[-1])
