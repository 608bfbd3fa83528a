"""A plan's steps as torch operations: every choice of layout is made here, once, before anything runs.

Intermediate results are stored as matrices whose columns are what their consumer sums, so that a step on activations
is one ``linear`` on views and the last one accumulates into the base output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear

from tnpeft.networks.factor import Group
from tnpeft.nn.contract import pairwise
from tnpeft.planning.steps import Plan, Step, fresh

Function = Callable[[Tensor, Tensor], Tensor]
Accumulate = Callable[[Tensor | None, Tensor, Tensor, float], Tensor]
View = Callable[[Tensor], Tensor]
Views = tuple[View | None, View | None]  # of the left and the right operand; None: it is a matrix as it is
Body = tuple[tuple[Function, int, int], ...]  # a function and the places of its two operands
Tail = tuple[tuple[Accumulate, int, int, int], ...]  # the same with a sign: what is added to the output


@dataclass(frozen=True)
class Lowered:
    """The operations of a plan: the body computes intermediate results, the tail adds to ``[tokens, out]``.

    ``views`` holds, by the place of its result, how each product of two matrices in the body sees its operands, and
    under -1 how the tail's does, if all of it is one product as wide as the output.
    """

    body: Body
    tail: Tail
    views: Mapping[int, Views]


def lower(plan: Plan, labels: tuple[str, ...]) -> Lowered:
    """The operations of a plan that starts from the factors in the order of ``labels``, then the activations.

    Each result of the body is appended to the operands.

    >>> from tnpeft import network, plan
    >>> p = plan(network("B[out r] A[r inp] -> out inp"), out=64, inp=32, r=2, tokens=8)
    >>> [len(part) for part in (lower(p, ("B", "A")).body, lower(p, ("B", "A")).tail)]
    [1, 1]
    """
    return _Lowering(plan, labels).lower()


@dataclass(frozen=True)
class _Value:
    """Where a tensor is and how it is stored: its indices in order, the first ``cut`` of them fused to rows and the
    others to columns; ``cut`` None: every index has its axis."""

    place: int
    order: Group
    cut: int | None


class _Lowering:
    def __init__(self, plan: Plan, labels: tuple[str, ...]) -> None:
        self.token = plan.activation
        self.sizes: dict[str, int] = {**plan.sizes, self.token: -1}  # the number of rows is whatever comes
        self.steps = [step for step in plan.steps if step.kind != "reshape"]
        self.values = {name: _unfused(k, plan.network.factor(name).indices) for k, name in enumerate(labels)}
        self.x, self.places = fresh("x", labels), len(labels) + 1
        self.values[self.x] = _Value(len(labels), (self.token, *plan.network.cols), 1)
        self.wanted = wanted(self.steps, {**{name: v.order for name, v in self.values.items()}})
        self.body: list[tuple[Function, int, int]] = []
        self.tail: list[tuple[Accumulate, int, int, int]] = []
        self.views: dict[int, Views] = {}

    def lower(self) -> Lowered:
        last = self.steps[-1]
        parts = dict(zip(last.operands, last.signs, strict=True)) if last.kind == "add" else {last.result: 1}
        for step in self.steps:
            if step.kind == "add":
                if step is not last:
                    self._add(step)
            elif step.result in parts:
                left, right = (self._operand(step, k) for k in (0, 1))
                function = self._accumulate(left, right, last.indices)
                self.tail.append((function, left.place, right.place, parts[step.result]))
            else:
                self._contract(step)
        return Lowered(tuple(self.body), tuple(self.tail), self.views)

    # ---- steps

    def _operand(self, step: Step, k: int) -> _Value:
        """An operand; a factor takes the names that its indices have in this use."""
        value = self.values[step.operands[k]]
        return replace(value, order=step.uses[k]) if value.place < self.places else value

    def _append(
        self, name: str, function: Function, left: _Value, right: _Value, order: Group, cut: int | None
    ) -> None:
        self.body.append((function, left.place, right.place))
        place = self.places + len(self.body) - 1
        self.values[name] = _unfused(place, order) if cut is None else _Value(place, order, cut)

    def _contract(self, step: Step) -> None:
        left, right = self._operand(step, 0), self._operand(step, 1)
        order = self.wanted[step.result]
        if self.token not in left.order and order[:1] and order[0] not in left.order:
            left, right = right, left
        parts = _Roles.of(left.order, right.order, order)
        if not parts.summed:
            self._append(step.result, self._elementwise(left, right, order), left, right, order, None)
        elif parts.batch:
            self._append(step.result, self._general(left, right, order), left, right, order, None)
        else:
            views = self._matrices(left, right, parts)
            order, cut = parts.left + parts.right, len(parts.left)
            self._append(step.result, _with_views(linear, *views), left, right, order, cut)
            self.views[self.values[step.result].place] = views

    def _add(self, step: Step) -> None:
        """A chain of sums of weights; one part alone is added to nothing."""
        order = self.wanted[step.result]
        operands = [self._operand(step, k) for k in range(len(step.operands))]
        first, sign = operands[0], step.signs[0]
        for k, other in enumerate(operands[1:], start=1):
            function = _signed(self._spread(first, order), self._spread(other, order), sign, step.signs[k])
            self._append(step.result, function, first, other, order, None)
            first, sign = self.values[step.result], 1
        if len(operands) == 1:
            self._append(step.result, _scaled(self._spread(first, order), sign), first, first, order, None)

    def _accumulate(self, left: _Value, right: _Value, output: Group) -> Accumulate:
        """What adds the product of two operands to the output ``[tokens, out]``."""
        parts = _Roles.of(left.order, right.order, output)
        wide = prod(self.sizes[index] for index in output[1:])
        shape = tuple(self.sizes[index] for index in output)
        if not parts.summed:
            return _accumulate_product(self._spread(left, output), self._spread(right, output), shape, wide)
        if not parts.batch and parts.left + parts.right == output:
            narrow = prod(self.sizes[index] for index in parts.right)
            views = self._matrices(left, right, parts)
            if narrow == wide and not self.tail:
                self.views[-1] = views
            return _accumulate_matmul(*views, narrow, wide)
        return _accumulate_any(self._general(left, right, output), shape, wide)

    # ---- functions of two operands

    def _matrices(self, left: _Value, right: _Value, parts: _Roles) -> Views:
        """Both operands as matrices with the same columns: in the left one's order if it needs no copy so."""
        summed = tuple(index for index in left.order if index in parts.summed)
        if left.order != parts.left + summed:
            summed = tuple(index for index in right.order if index in parts.summed)
        return self._matrix(left, parts.left, summed), self._matrix(right, parts.right, summed)

    def _matrix(self, value: _Value, rows: Group, cols: Group) -> View | None:
        """The view of a tensor as a matrix; None if it is one already."""
        width = prod(self.sizes[index] for index in cols)
        if value.order == rows + cols:
            return None if value.cut == len(rows) else lambda tensor: tensor.reshape(-1, width)
        spread = self._spread(value, rows + cols)
        if spread is None or len(rows) == len(cols) == 1:
            return spread
        return lambda tensor: spread(tensor).reshape(-1, width)

    def _spread(self, value: _Value, order: Group) -> View | None:
        """The view of a tensor with one axis per index of ``order``, of size 1 where it lacks the index."""
        full = tuple(self.sizes[index] for index in value.order)
        axes = tuple(value.order.index(index) for index in order if index in value.order)
        shape = tuple(self.sizes[index] if index in value.order else 1 for index in order)
        fused = value.cut is not None and (value.cut, len(full)) != (1, 2)
        moved = axes != tuple(range(len(axes)))
        if not moved:
            return (lambda tensor: tensor.reshape(shape)) if fused or len(shape) != len(full) else None
        if not fused and len(shape) == len(full):
            return lambda tensor: tensor.permute(axes)
        return lambda tensor: tensor.reshape(full).permute(axes).reshape(shape)

    def _elementwise(self, left: _Value, right: _Value, order: Group) -> Function:
        return _with_views(torch.mul, self._compact(left, order), self._compact(right, order))

    def _compact(self, value: _Value, order: Group) -> View | None:
        """As :meth:`_spread`; a smaller factor is copied if its axes move, so that the product is stored in order."""
        spread = self._spread(value, order)
        kept = tuple(index for index in order if index in value.order)
        if spread is None or kept == value.order or len(kept) == len(order) or self.token in kept:
            return spread
        return lambda tensor: spread(tensor).contiguous()

    def _general(self, left: _Value, right: _Value, order: Group) -> Function:
        function = pairwise(left.order, right.order, order)
        return _with_views(function, self._spread(left, left.order), self._spread(right, right.order))


@dataclass(frozen=True)
class _Roles:
    """The indices of a product of two operands by where they stand."""

    batch: Group
    left: Group
    right: Group
    summed: Group

    @staticmethod
    def of(left: Group, right: Group, result: Group) -> _Roles:
        return _Roles(
            tuple(index for index in result if index in left and index in right),
            tuple(index for index in result if index in left and index not in right),
            tuple(index for index in result if index in right and index not in left),
            tuple(index for index in right if index in left and index not in result),
        )


def _unfused(place: int, order: Group) -> _Value:
    return _Value(place, order, 1 if len(order) == 2 else None)


def wanted(steps: list[Step], given: Mapping[str, Group]) -> dict[str, Group]:
    """The order in which every result should keep its indices: what its consumer sums comes last."""
    found: dict[str, Group] = {}
    for step in reversed(steps):
        order = found.setdefault(step.result, step.indices)
        for k, (name, use) in enumerate(zip(step.operands, step.uses, strict=True)):
            if name in given:
                continue
            kept = tuple(index for index in order if index in use)
            summed = [index for index in use if index not in kept]
            if step.kind == "contract" and summed:
                other = step.uses[1 - k]
                batch = tuple(index for index in kept if index in other)
                kept = batch + tuple(index for index in kept if index not in other)
                if step.operands[1 - k] in given:
                    summed.sort(key=other.index)
            found[name] = kept + tuple(summed)
    return found


# ---- the operations; those that need no view are torch's own


def _with_views(function: Function, left: View | None, right: View | None) -> Function:
    if left is None and right is None:
        return function
    if left is None:
        assert right is not None
        return lambda a, b: function(a, right(b))
    if right is None:
        return lambda a, b: function(left(a), b)
    return lambda a, b: function(left(a), right(b))


def _signed(left: View | None, right: View | None, first: int, second: int) -> Function:
    if first > 0:
        return _with_views(partial(torch.add, alpha=second), left, right)
    return _with_views(lambda a, b: torch.add(-a, b, alpha=second), left, right)


def _scaled(view: View | None, sign: int) -> Function:
    return _with_views(lambda a, _: a if sign > 0 else -a, view, None)


def _accumulate_matmul(left: View | None, right: View | None, narrow: int, wide: int) -> Accumulate:
    def accumulate(total: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a = a if left is None else left(a)
        b = b if right is None else right(b)
        if total is None:
            return linear(a, b if scale == 1.0 else b * scale).reshape(-1, wide)
        if narrow == wide:
            return torch.addmm(total, a, b.t(), alpha=scale)
        return torch.addmm(total.reshape(-1, narrow), a, b.t(), alpha=scale).reshape(-1, wide)

    return accumulate


def _accumulate_product(left: View | None, right: View | None, shape: tuple[int, ...], wide: int) -> Accumulate:
    def accumulate(total: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a = a if left is None else left(a)
        b = b if right is None else right(b)
        if total is None:
            return (a * (b if scale == 1.0 else b * scale)).reshape(-1, wide)
        return torch.addcmul(total.reshape(shape), a, b, value=scale).reshape(-1, wide)

    return accumulate


def _accumulate_any(function: Function, shape: tuple[int, ...], wide: int) -> Accumulate:
    """For a product whose axes are not in the output's order: it is added as the view that it is, never copied."""

    def accumulate(total: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        part = function(a, b)
        if total is None:
            return (part if scale == 1.0 else part * scale).reshape(-1, wide)
        return torch.add(total.reshape(shape), part, alpha=scale).reshape(-1, wide)

    return accumulate
