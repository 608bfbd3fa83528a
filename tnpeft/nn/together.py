"""A frozen linear and an update of it as one operation, whose backward pass is the update's own program reversed.

Forward, the update is accumulated into the linear's own output; backward, the update's input gradient into the
linear's: no full-width result is written twice. What is cheap to compute again is not kept (see
:mod:`tnpeft.nn.stages`). An update that is one matrix is added to the weight itself where that loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tnpeft.nn.first import Link
from tnpeft.nn.flow import Flow
from tnpeft.nn.modes import autocasting, hooked, transformed
from tnpeft.nn.units import Norms, Units

_Grads = tuple[Tensor | None, ...]


class _Together(torch.autograd.Function):
    """The update of ``x``, added to a linear of it or, without a weight, to ``base``; in place if that is ``new``.

    With a ``link`` the update is that of ``narrow``, the result of its first step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        flow: Flow,
        scale: float,
        new: bool,
        link: Link | None,
        norms: Norms | None,
        x: Tensor,
        narrow: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        ready = factors if norms is None else Units(factors, norms, flow.reads).factors
        values = flow.values(flow.prepare(ready), x if narrow is None else narrow)
        ctx.flow, ctx.scale, ctx.link, ctx.norms, ctx.autocast = flow, scale, link, norms, _autocast(x)
        read = link is None or link.reads or (weight is not None and weight.requires_grad)
        ctx.save_for_backward(x if read else None, weight, *factors, narrow, *flow.kept(values))
        if weight is not None:
            merged = flow.stages.merges is not None
            total = linear(x, _merged(flow, weight, values, scale) if merged else weight, bias)
            return flow.add(total, values, scale, new=True, merged=merged)
        if not new or base is None:
            return flow.add(base, values, scale)
        ctx.mark_dirty(base)
        flow.add(base, values, scale, new=True)
        return base

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Grads:  # type: ignore[override]
        flow, scale, link, norms = ctx.flow, ctx.scale, ctx.link, ctx.norms
        x, weight, *saved = ctx.saved_tensors
        on_x, on_narrow, on_weight, on_bias, on_base, *on_factors = ctx.needs_input_grad[5:]
        factors, narrow, kept = saved[: flow.factors], saved[flow.factors], saved[flow.factors + 1 :]
        twice = torch.is_grad_enabled()  # then what is computed here is differentiated in its turn
        to_narrow = None
        with _same(ctx.autocast):
            thawed = any(on_factors[place] for place in flow.frozen)
            if link is not None and link.reads and twice:
                narrow = link.share.again(x, factors)
            units = None if norms is None else Units(factors, norms, flow.reads)
            ready = factors if units is None else units.factors
            values = flow.restored(ready, x if link is None else narrow, kept, everything=twice or thawed)
            merged = weight is not None and flow.stages.merges is not None
            to_x = None
            if on_x and weight is not None:
                to_x = grad @ (_merged(flow, weight, values, scale) if merged else weight)
            if link is None:
                *to_factors, to_x = flow.gradients(grad, values, scale, [*on_factors, on_x], to_x, merged, twice)
            else:
                needs = [*on_factors, on_narrow]
                *to_factors, to_narrow = flow.gradients(grad, values, scale, needs, None, merged, twice)
                link.holder = None  # whoever has not come yet begins anew
                if link.reads:
                    link.brought[:] = [x]
            if units is not None:
                to_factors = units.gradients(to_factors)
        return (
            None,
            None,
            None,
            None,
            None,
            to_x,
            to_narrow,
            grad.t() @ x if on_weight else None,
            grad.sum(0) if on_bias else None,
            grad if on_base else None,
            *to_factors,
        )


class _Enter(torch.autograd.Function):
    """A linear of ``x``, and operations on ``x`` with one frozen factor after the other: ``x`` itself is not kept."""

    @staticmethod
    def forward(
        ctx: Any, flow: Flow, x: Tensor, weight: Tensor, bias: Tensor | None, *gates: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.flow = flow
        read = any(tensor.requires_grad for tensor in (weight, *gates))
        ctx.save_for_backward(x if read else None, weight, *gates)
        return linear(x, weight, bias), flow.enter(x, gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, entered: Tensor) -> _Grads:  # type: ignore[override]
        x, weight, *gates = ctx.saved_tensors
        _, on_x, on_weight, on_bias, *on_gates = ctx.needs_input_grad
        to_x = grad @ weight if on_x else None
        fresh = not torch.is_grad_enabled()
        *to_gates, to_x = ctx.flow.leave(entered, x, gates, [*on_gates, on_x], to_x, fresh)
        return (
            None,
            to_x,
            grad.t() @ x if on_weight else None,
            grad.sum(0) if on_bias else None,
            *to_gates,
        )


def _merged(flow: Flow, weight: Tensor, values: Sequence[Tensor], scale: float) -> Tensor:
    matrix, sign = flow.matrix(values)
    return weight.add(matrix, alpha=sign * scale)


def _autocast(x: Tensor) -> tuple[str, torch.dtype] | None:
    kind = x.device.type
    return (kind, torch.get_autocast_dtype(kind)) if autocasting(kind) else None


def _same(autocast: tuple[str, torch.dtype] | None) -> AbstractContextManager[Any]:
    return nullcontext() if autocast is None else torch.autocast(*autocast)


def together(
    flow: Flow,
    scale: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    norms: Norms | None = None,
) -> Tensor:
    """``linear(x, weight, bias)`` plus the scaled update of ``x``, ``[tokens, out]``.

    ``x`` is ``[tokens, inp]``, ``weight [out, inp]``, all of one dtype. Along the axes in ``norms`` the factors are
    normalised first. It is differentiable twice. Autocast and
    transforms of ``torch.func`` are for plain operations: see :func:`may_join`.

    >>> from tnpeft import network
    >>> from tnpeft.nn.execute import program
    >>> flow = program(network("B[out r] A[r inp] -> out inp"), {"out": 5, "r": 1, "inp": 4}).flow
    >>> together(flow, 0.5, torch.ones(3, 4), torch.zeros(5, 4), None, (torch.ones(5, 1), torch.ones(1, 4))).unique()
    tensor([2.])
    """
    result: Tensor
    if not flow.stages.entry:
        result = _Together.apply(flow, scale, True, None, norms, x, None, weight, bias, None, *factors)
        return result
    base, entered = _Enter.apply(flow, x, weight, bias, *flow.gates(factors))
    new = not torch.compiler.is_compiling()  # the compiler decides by itself what is done in place
    result = _Together.apply(flow, scale, new, None, norms, entered, None, None, None, base, *factors)
    return result


def rest(
    link: Link,
    narrow: Tensor,
    scale: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    norms: Norms | None = None,
) -> Tensor:
    """What :func:`together` gives, from the ``narrow`` result of a first step that was taken elsewhere.

    >>> from tnpeft import network
    >>> from tnpeft.nn.execute import program
    >>> from tnpeft.nn.first import Joint, Source
    >>> first = program(network("B[out r] A[r inp] -> out inp"), {"out": 5, "r": 1, "inp": 4}, tokens=1).first
    >>> factors = torch.ones(5, 1), torch.ones(1, 4)
    >>> started = Joint([Source(first)])([factors], torch.ones(3, 4))
    >>> rest(started.links[0], started.narrow[0], 0.5, started.x, torch.zeros(5, 4), None, factors).unique()
    tensor([2.])
    """
    flow = link.share.first.rest
    result: Tensor = _Together.apply(flow, scale, True, link, norms, x, narrow, weight, bias, None, *factors)
    return result


def apart(flow: Flow, scale: float, x: Tensor, base: Tensor | None, factors: Sequence[Tensor]) -> Tensor:
    """``base`` (None: zero) plus the scaled update of ``x``, ``[tokens, out]``, with the program's own backward pass.

    >>> from tnpeft import network
    >>> from tnpeft.nn.execute import program
    >>> flow = program(network("B[out r] A[r inp] -> out inp"), {"out": 5, "r": 1, "inp": 4}).flow
    >>> apart(flow, 0.5, torch.ones(3, 4), None, (torch.ones(5, 1), torch.ones(1, 4))).unique()
    tensor([2.])
    """
    entered = flow.enter(x, flow.gates(factors))
    result: Tensor = _Together.apply(flow, scale, False, None, None, entered, None, None, None, base, *factors)
    return result


def takes(weight: Tensor) -> bool:
    """Whether a weight can take an update without losing it: in half precision it would.

    >>> takes(torch.ones(1)), takes(torch.ones(1, dtype=torch.bfloat16))
    (True, False)
    """
    return torch.finfo(weight.dtype).bits >= 32


def may_reverse(x: Tensor) -> bool:
    """Whether a program may bring its own backward pass: there is one, and no operation has to be seen on its own.

    That is: nothing is transformed, differentiated forward or traced, nor compiled under autocast, where the compiler
    decides what is kept.

    >>> may_reverse(torch.ones(1))
    True
    >>> with torch.no_grad():
    ...     may_reverse(torch.ones(1))
    False
    """
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return not autocasting(x.device.type)
    return not transformed()


def may_join(linear: nn.Module, x: Tensor) -> bool:
    """Whether a module's forward on ``x`` may be taken apart: it is torch's own linear and nothing looks on.

    That is: no subclass, hook, replaced forward or replaced weight; ``x`` has the weight's dtype; no autocast, and
    :func:`may_reverse` holds.

    >>> linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    >>> may_join(linear, x), may_join(linear, x.double()), linear.register_forward_hook(print) and may_join(linear, x)
    (True, False, False)
    """
    own = linear.__dict__
    if type(linear) is not nn.Linear or "forward" in own:
        return False
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    if hooked():
        return False
    weight = own["_parameters"].get("weight")
    if weight is None:
        weight = linear.weight
    return (
        type(weight) in (nn.Parameter, Tensor)
        and x.dtype == weight.dtype
        and not autocasting(x.device.type)
        and may_reverse(x)
    )
