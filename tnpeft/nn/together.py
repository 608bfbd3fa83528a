"""A frozen linear and a narrow update of it as one operation, so that no full-width result is written twice.

Forward, the update is accumulated into the linear's own output; backward, the update's input gradient into the
linear's. Every narrow product has its narrow side as rows: the other way round takes two to four times as long on
a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_Grads = tuple[Tensor | None, ...]


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, last: Tensor, scale: float
    ) -> Tensor:
        narrow = first @ x.t()
        ctx.scale = scale
        ctx.save_for_backward(x, weight, first, last, narrow)
        return linear(x, weight, bias).addmm_(narrow.t(), last.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Grads:  # type: ignore[override]
        x, weight, first, last, narrow = ctx.saved_tensors
        on_x, on_weight, on_bias, on_first, on_last, _scale = ctx.needs_input_grad
        twice = torch.is_grad_enabled()  # then what is computed here is differentiated in its turn
        inner = last.t() @ grad.t() * ctx.scale
        to_x = grad @ weight if on_x else None
        if to_x is not None:
            to_x = to_x.addmm(inner.t(), first) if twice else to_x.addmm_(inner.t(), first)
        to_last = None
        if on_last:
            outer = first @ x.t() if twice else narrow
            to_last = (outer * ctx.scale @ grad).t()
        return (
            to_x,
            grad.t() @ x if on_weight else None,
            grad.sum(0) if on_bias else None,
            inner @ x if on_first else None,
            to_last,
            None,
        )


def together(x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """``linear(x, weight, bias) + scale * x @ first.T @ last.T``, for any number of leading axes of ``x``.

    ``weight`` is ``[out, inp]``, ``first`` ``[narrow, inp]``, ``last`` ``[out, narrow]``, all of one dtype. It is
    differentiable twice and keeps ``x`` and the narrow product for the backward pass. Autocast and transforms of
    ``torch.func`` are for plain operations: see :func:`may_join`.

    >>> x, weight = torch.ones(2, 3, 4), torch.zeros(5, 4)
    >>> together(x, weight, None, torch.ones(1, 4), torch.ones(5, 1), 0.5).unique()
    tensor([2.])
    """
    result: Tensor = _Together.apply(x.reshape(-1, x.shape[-1]), weight, bias, first, last, scale)
    return result.reshape(*x.shape[:-1], result.shape[-1])


def may_join(linear: nn.Module, x: Tensor) -> bool:
    """Whether a module's forward on ``x`` may be taken apart: it is torch's own linear and nothing looks on.

    That is: gradients are on; no subclass, hook, replaced forward or replaced weight; ``x`` has the weight's dtype;
    neither autocast nor a transform of ``torch.func`` is active.

    >>> linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    >>> may_join(linear, x), may_join(linear, x.double()), linear.register_forward_hook(print) and may_join(linear, x)
    (True, False, False)
    """
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return (
        torch.is_grad_enabled()
        and type(linear) is nn.Linear
        and not hooks
        and "forward" not in vars(linear)
        and type(linear.weight) in (nn.Parameter, Tensor)
        and x.dtype == linear.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
    )
