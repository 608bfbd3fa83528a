"""The program of a weight that has one matrix for every expert: rows sorted by expert, an update of each by its own.

Only experts that rows are routed to are contracted, factors without the index ``expert`` serve all rows at once, and
no update of all experts is formed. The product with the frozen weight and the updates of it are one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tnpeft.networks import Network, NetworkError
from tnpeft.networks.sizes import Size, bind, integers
from tnpeft.nn.executor.compile import compile_plan
from tnpeft.nn.executor.eligibility import can_use_custom_backward
from tnpeft.nn.executor.groups import Groups
from tnpeft.nn.executor.kernels import Instruction, run
from tnpeft.nn.executor.listing import FACTORS, WEIGHT, X, Y
from tnpeft.nn.executor.program import SiteProgram
from tnpeft.nn.executor.saving import pack, unpack
from tnpeft.planning.planner import planned
from tnpeft.planning.steps import Plan

EXPERT = "expert"
ALL = slice(None)


def grouped_program(net: Network, sizes: Mapping[str, Size], *, tokens: int = 2048) -> GroupedProgram:
    """Return the program of a network over experts, best at about ``tokens`` rows in all; cached by value.

    Raises:
        NetworkError: a stack index other than ``expert`` is open, or a size is missing.

    >>> from tnpeft.networks import network
    >>> net = network("U[out r] e[expert r] V[inp r] -> expert out inp")
    >>> run = grouped_program(net, {"expert": 3, "out": 64, "r": 2, "inp": 32}, tokens=6)
    >>> print(run.plan.steps[0])
    t1[expert token r] = x[expert token inp] * V[inp r]
    >>> x, groups, e = torch.ones(2, 32), Groups(torch.tensor([0, 2]), 3), torch.tensor([[1.0, 1], [2, 2], [3, 3]])
    >>> run(x, groups, [torch.ones(64, 2), e, torch.ones(32, 2)])[:, 0]
    tensor([ 64., 192.])
    """
    return _grouped(net, tuple(integers(net, bind(net, sizes, {})).items()), tokens)


@lru_cache(maxsize=1024)
def _grouped(net: Network, dims: tuple[tuple[str, int], ...], tokens: int) -> GroupedProgram:
    net.require_matrix()
    if net.stack not in ((), (EXPERT,)):
        raise NetworkError(
            f"the stack index {next(index for index in net.stack if index != EXPERT)!r} cannot stand beside experts",
            line=str(net),
            remedy="leave it out of the line",
        )
    each = max(1, tokens // dict(dims).get(EXPERT, 1))
    return GroupedProgram(planned(net, dims, each), planned(net, dims, None))


class GroupedProgram(SiteProgram):
    """One weight's update over experts, compiled from a plan; what a :class:`Program` is for a linear.

    ``plan`` is for equal groups, which rows at run time need not be; ``replicas`` is the number of matrices.
    """

    def __init__(self, plan: Plan, dense: Plan) -> None:
        super().__init__(plan, dense)
        self.fused_plan = plan
        self.listing = compile_plan(plan, self.labels, group=EXPERT)
        self.has_weight_steps, self.recomputed = bool(self.listing.weight_steps), self.listing.recomputed()

    def __call__(self, x: Tensor, groups: Groups, operands: Sequence[Tensor], scale: float = 1.0) -> Tensor:
        """Return the scaled update of ``x [rows, inp]``, whose rows are sorted by expert: ``[rows, out]``."""
        part = Part(self, tuple(operands), scale, ALL, ALL)
        return grouped_linear(x, groups, [part], width=self.rows)

    def delta_of(self, expert: int, operands: Sequence[Tensor], scale: float = 1.0) -> Tensor:
        """Return ``scale * dW`` of one expert, ``[rows, cols]``."""
        net = self.plan.network
        if not net.stack:
            return self.delta(operands, scale)
        places = (factor.indices for factor in net.factors)
        own = [
            array.select(indices.index(EXPERT), expert) if EXPERT in indices else array
            for array, indices in zip(operands, places, strict=True)
        ]
        one = net.select(EXPERT)
        sizes = tuple((index, int(size)) for index, size in self.plan.sizes.items() if index in one.indices)
        return _grouped(one, sizes, 1).delta(own, scale)


# ---- one operation for the frozen product and all updates


@dataclass(frozen=True, eq=False)
class Part:
    """An update in a grouped linear: program, factors, scale, and the columns of output and input that it is of."""

    program: GroupedProgram
    operands: tuple[Tensor, ...]
    scale: float
    columns: slice
    inputs: slice


@dataclass(frozen=True, eq=False)
class _Call:
    groups: Groups
    parts: tuple[Part, ...]
    prepare: Callable[[Tensor], Tensor] | None
    width: int


def grouped_linear(
    source: Tensor,
    groups: Groups,
    parts: Sequence[Part],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    prepare: Callable[[Tensor], Tensor] | None = None,
    width: int = 0,
) -> Tensor:
    """Return ``x @ weight[expert] + bias[expert]`` and the updates of its parts, ``[rows, out]``, for sorted rows.

    With a custom backward pass, ``x`` is not kept but prepared again from ``source``, and nothing is kept of the
    product with the weight, which is frozen.

    Args:
        source: the rows ``x [rows, inp]``, or what ``prepare`` makes them from.
        groups: the expert of each row.
        parts: the updates.
        weight: ``[expert, inp, out]``, frozen; None for the updates alone, ``width`` columns of them.
        bias: ``[expert, out]`` or None, frozen.
        prepare: a cheap function of the source, in whose place the source is kept.
        width: the number of output columns without a weight.
    """
    call = _Call(groups, tuple(parts), prepare, width)
    factors = [operand for part in parts for operand in part.operands]
    if can_use_custom_backward(source):
        result: Tensor = _GroupedLinear.apply(call, source, weight, bias, *factors)
        return result
    x = source if prepare is None else prepare(source)
    total = _frozen(call, x, weight, bias)
    inplace = not torch.is_grad_enabled()
    for part in parts:
        values = part.program.listing.registers(part.operands, x[:, part.inputs])
        values[WEIGHT] = groups
        total = _add(part, part.program.listing.forward, values, total, inplace)
    return total


def _frozen(call: _Call, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x.new_zeros((len(x), call.width))
    result = call.groups.matmul(x, weight)
    return result if bias is None else result + call.groups.gather(bias)


def _add(part: Part, steps: Sequence[Instruction], values: list[Any], total: Tensor, inplace: bool) -> Tensor:
    """The total with one part's update added to its columns."""
    own = values[Y] = total[:, part.columns]
    run(steps, values, part.scale, inplace=inplace)
    return _put(total, part.columns, own, values[Y], inplace)


def _put(total: Tensor, columns: slice, before: Any, after: Tensor, inplace: bool) -> Tensor:
    """The total with new values of some columns, which may be there already."""
    if after is before or (inplace and after.data_ptr() == before.data_ptr()):
        return total
    if inplace:
        before.copy_(after)
        return total
    if columns == ALL or before.shape == total.shape:
        return after
    whole = total.clone()
    whole[:, columns] = after
    return whole


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: _Call, source: Tensor, weight: Tensor | None, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:
        x = source if call.prepare is None else call.prepare(source)
        total = _frozen(call, x, weight, bias)
        on_x, on_factors = ctx.needs_input_grad[1], ctx.needs_input_grad[4:]
        saved: list[Tensor] = []
        codes, at = [], 0
        for part in call.parts:
            count = len(part.operands)
            code = part.program.listing.code((on_x, *[False] * (FACTORS - 1), *on_factors[at : at + count]))
            values = part.program.listing.registers(part.operands, x[:, part.inputs])
            values[WEIGHT] = call.groups
            total = _add(part, code.forward, values, total, inplace=True)
            codes.append(code)
            saved += [values[k] for k in code.saved if k not in (X, WEIGHT)]
            at += count
        own, ctx.again = pack(factors)
        ctx.call, ctx.codes = call, codes
        ctx.save_for_backward(source, weight, *own, *saved)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):  # as it was in the forward pass
            return _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    call, twice = ctx.call, torch.is_grad_enabled()
    source, weight, *rest = ctx.saved_tensors
    count = sum(len(part.operands) for part in call.parts)
    factors, saved = unpack(rest[:count], ctx.again), iter(rest[count:])
    on_source, on_factors = ctx.needs_input_grad[1], ctx.needs_input_grad[4:]
    start, x = _prepared(call, source, on_source, twice)
    to_x = None
    if on_source:
        to_x = x.new_zeros(x.shape) if weight is None else call.groups.matmul(grad, weight.mT)
    to_factors: list[Tensor | None] = []
    for part, code in zip(call.parts, ctx.codes, strict=True):
        own = factors[len(to_factors) : len(to_factors) + len(part.operands)]
        rows = (x if twice else x.detach())[:, part.inputs]
        values = [rows, None, call.groups, None, None, *own, *[None] * (code.total - FACTORS - len(own))]
        for k in code.saved:
            if k not in (X, WEIGHT):
                value = next(saved)
                values[k] = None if twice else value
        values[code.size + Y] = grad[:, part.columns]
        before = values[code.size + X] = None if to_x is None else to_x[:, part.inputs]
        run(code.values if twice else code.recomputed, values, part.scale)
        run(code.backward, values, part.scale, inplace=not twice)
        if to_x is not None:
            to_x = _put(to_x, part.inputs, before, values[code.size + X], not twice)
        to_factors += values[code.size + FACTORS : code.size + FACTORS + len(own)]
    needed = [value if on else None for value, on in zip(to_factors, on_factors, strict=True)]
    if on_source and call.prepare is not None:
        [to_x] = torch.autograd.grad(x, start, to_x, create_graph=twice)
    return None, to_x if on_source else None, None, None, *needed


def _prepared(call: _Call, source: Tensor, on_source: bool, twice: bool) -> tuple[Tensor, Tensor]:
    """The source as a leaf of its own, and the rows made from it again, differentiable if that is needed."""
    if call.prepare is None:
        return source, source
    if twice or not on_source:
        return source, call.prepare(source)
    start = source.detach().requires_grad_()
    with torch.enable_grad():
        return start, call.prepare(start)
