"""A plan's steps as torch operations: every choice of layout is made here, once, before anything runs.

Intermediate results are stored as matrices whose columns are what their consumer sums, so that a step on activations
is one ``linear`` on views and the last one accumulates into the base output. Where the stack index ``replica`` is
open, the rows of the activations are a block for each of its values, and a step is a product of as many matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from tnpeft.networks.factor import Group
from tnpeft.nn.contract import matmul
from tnpeft.nn.operations import Elementwise, General, Operation, Product, Side, Sum, View
from tnpeft.nn.orders import Roles, Value, singly, walk, wanted
from tnpeft.planning.steps import Plan, Step, fresh

Body = tuple[tuple[Operation, int, int], ...]  # an operation and the places of its two operands


@dataclass(frozen=True)
class Fact:
    """What the result of an operation is: the name of its step, its elements (for one row of activations, of every
    block, if it has such rows) and the multiply-adds that an element takes."""

    name: str
    elements: int
    macs: int


@dataclass(frozen=True)
class Added:
    """An operation whose result is added to the output, seen in ``shape``, with a sign."""

    operation: Operation
    shape: tuple[int, ...]
    sign: int

    def __call__(self, total: Tensor | None, a: Tensor, b: Tensor, scale: float, wide: int, new: bool) -> Tensor:
        """``total + scale * operation(a, b)`` as ``[tokens, wide]``; in place if the total is a new tensor."""
        scale = self.sign * scale
        if total is None:
            return self.operation(a, b if scale == 1.0 else b * scale).reshape(-1, wide)
        if self.shape == (-1, wide):
            return self.operation.add_to(total, a, b, scale, new)
        return self.operation.add_to(total.reshape(self.shape), a, b, scale, new).reshape(-1, wide)


Tail = tuple[tuple[Added, int, int], ...]


@dataclass(frozen=True)
class Lowered:
    """The operations of a plan: the body computes intermediate results, the tail adds to ``[tokens, out]``.

    ``facts`` belong to the body; ``width`` is that of the activations, ``tokens`` the rows that were planned for.
    ``merges`` is the place in the tail of the product of the activations and the matrix, ``[out, inp]``, that the
    plan adds to the base weight; None if it does not.
    """

    body: Body
    tail: Tail
    facts: tuple[Fact, ...]
    width: int
    tokens: int
    merges: int | None


def lower(plan: Plan, labels: tuple[str, ...]) -> Lowered:
    """The operations of a plan that starts from the factors in the order of ``labels``, then the activations.

    Each result of the body is appended to the operands. The base weight is left out where the plan adds to it:
    whoever runs the operations has it.

    >>> from tnpeft import network, plan
    >>> p = plan(network("B[out r] A[r inp] -> out inp"), out=64, inp=32, r=2, tokens=8)
    >>> [len(part) for part in (lower(p, ("B", "A")).body, lower(p, ("B", "A")).tail)]
    [1, 1]
    """
    return _Lowering(plan, labels).lower()


class _Lowering:
    def __init__(self, plan: Plan, labels: tuple[str, ...]) -> None:
        self.token, self.tokens = plan.activation, plan.sizes[plan.activation]
        self.stack = plan.network.stack
        self.sizes: dict[str, int] = {**plan.sizes, self.token: -1}  # the number of rows is whatever comes
        self.steps = [step for step in plan.steps if step.kind != "reshape"]
        self.values = {name: Value(k, singly(plan.network.factor(name).indices)) for k, name in enumerate(labels)}
        self.x, self.places = fresh("x", labels), len(labels) + 1
        self.values[self.x] = Value(len(labels), ((*self.stack, self.token), plan.network.cols))
        self.wanted = wanted(self.steps, {**{name: v.order for name, v in self.values.items()}})
        self.body: list[tuple[Operation, int, int]] = []
        self.facts: list[Fact] = []
        self.tail: list[tuple[Added, int, int]] = []
        self.base = fresh("W", labels)
        self.merges: int | None = None

    def lower(self) -> Lowered:
        walk(self.steps, self._contract, self._add, self._accumulate)
        width = abs(self._size(self.values[self.x].order))
        return Lowered(tuple(self.body), tuple(self.tail), tuple(self.facts), width, self.tokens, self.merges)

    def _size(self, indices: Group) -> int:
        """Elements of an axis; with the activations' rows less than zero, and minus one if it is they alone."""
        return prod(self.sizes[index] for index in indices)

    def _shape(self, axes: tuple[Group, ...]) -> tuple[int, ...]:
        return tuple(max(self._size(axis), -1) for axis in axes)

    # ---- steps

    def _operand(self, step: Step, k: int) -> Value:
        """An operand; a factor takes the names that its indices have in this use."""
        value = self.values[step.operands[k]]
        return Value(value.place, singly(step.uses[k])) if value.place < self.places - 1 else value

    def _append(
        self, name: str, operation: Operation, left: Value, right: Value, axes: tuple[Group, ...], summed: Group
    ) -> None:
        value = self.values[name] = Value(self.places + len(self.body), axes)
        self.body.append((operation, left.place, right.place))
        self.facts.append(Fact(name, abs(self._size(value.order)), self._size(summed)))

    def _contract(self, step: Step) -> None:
        left, right = self._operand(step, 0), self._operand(step, 1)
        order = self.wanted[step.result]
        rows = [index for index in order if index not in self.stack]
        if self.token not in left.order and rows and rows[0] not in left.order:
            left, right = right, left
        parts = Roles.of(left.order, right.order, order)
        axes = singly(order)
        operation: Operation
        if not parts.summed:
            operation = Elementwise(self._compact(left, order), self._compact(right, order))
        elif parts.batch not in ((), self.stack):
            operation = self._general(left, right, order)
        else:
            operation = self._matrices(left, right, parts)
            axes = (*singly(parts.batch), parts.left, parts.right)
        self._append(step.result, operation, left, right, axes, parts.summed)

    def _add(self, step: Step) -> None:
        """A chain of sums of weights; one part alone is added to nothing."""
        order = self.wanted[step.result]
        parts = [(self._operand(step, k), step.signs[k]) for k, name in enumerate(step.operands) if name != self.base]
        (first, sign), *more = parts
        rest = more or [(first, 0)]
        for other, second in rest:
            operation = Sum(self._spread(first, order), self._spread(other, order), sign, second)
            self._append(step.result, operation, first, other, singly(order), ())
            first, sign = self.values[step.result], 1

    def _accumulate(self, step: Step, output: Group, sign: int) -> None:
        """Adds the product of two operands to the output ``[tokens, out]``."""
        left, right = self._operand(step, 0), self._operand(step, 1)
        parts = Roles.of(left.order, right.order, output)
        axes = singly(output)
        operation: Operation
        if not parts.summed:
            operation = Elementwise(self._spread(left, output), self._spread(right, output))
        elif parts.batch in ((), self.stack) and parts.batch + parts.left + parts.right == output:
            operation = self._matrices(left, right, parts)
            axes = (*axes[: len(parts.batch)], parts.left, parts.right)
            if step.frozen:
                self.merges = len(self.tail)
        else:
            operation = self._general(left, right, output)
        self.tail.append((Added(operation, self._shape(axes), sign), left.place, right.place))

    # ---- how an operation sees its operands

    def _matrices(self, left: Value, right: Value, parts: Roles) -> Product:
        """Both operands as matrices with the same columns: in the left one's order if it needs no copy so."""
        summed = tuple(index for index in left.order if index in parts.summed)
        if left.order != parts.batch + parts.left + summed:
            summed = tuple(index for index in right.order if index in parts.summed)
        batch = singly(parts.batch)
        rows = parts.left == (self.token,) and len(parts.right) == 1  # more indices would be copied into order again
        return Product(
            self._fused(left, (*batch, parts.left, summed)), self._fused(right, (*batch, parts.right, summed)), rows
        )

    def _fused(self, value: Value, axes: tuple[Group, ...]) -> Side:
        """A tensor with axes of several indices."""
        order, shape, own = sum(axes, ()), self._shape(axes), self._shape(value.axes)
        if value.axes == axes:
            return Side(shape=shape)
        if value.order == order:
            return Side(lambda tensor: tensor.reshape(shape), lambda grad: grad.reshape(own), shape)
        spread, full = self._spread(value, order), self._shape(singly(order))
        if axes == singly(order):
            return spread
        return Side(lambda tensor: spread.see(tensor).reshape(shape), lambda grad: spread.give(grad.reshape(full)))

    def _spread(self, value: Value, order: Group) -> Side:
        """A tensor with one axis per index of ``order``, of size 1 where it lacks the index."""
        return Side(self._axes(value, order), self._stored(value, order))

    def _axes(self, value: Value, order: Group) -> View | None:
        full = tuple(self.sizes[index] for index in value.order)
        axes = tuple(value.order.index(index) for index in order if index in value.order)
        shape = tuple(self.sizes[index] if index in value.order else 1 for index in order)
        moved = axes != tuple(range(len(axes)))
        if not moved:
            return (lambda tensor: tensor.reshape(shape)) if value.fused or len(shape) != len(full) else None
        if not value.fused and len(shape) == len(full):
            return lambda tensor: tensor.permute(axes)
        return lambda tensor: tensor.reshape(full).permute(axes).reshape(shape)

    def _stored(self, value: Value, order: Group) -> View | None:
        """The way back from one axis per index of ``order``, summed over those that the tensor lacks."""
        kept = [index for index in order if index in value.order]
        missing = tuple(axis for axis, index in enumerate(order) if index not in value.order)
        axes = tuple(kept.index(index) for index in value.order)
        steps: list[View] = []
        if missing:
            steps.append(lambda grad: grad.sum(missing))
        if axes != tuple(range(len(axes))):
            steps.append(lambda grad: grad.permute(axes))
        if value.fused:
            shape = self._shape(value.axes)
            steps.append(lambda grad: grad.reshape(shape))
        return _chained(steps)

    def _compact(self, value: Value, order: Group) -> Side:
        """As :meth:`_spread`; a smaller factor is copied if its axes move, so that the product is stored in order."""
        spread = self._spread(value, order)
        kept = tuple(index for index in order if index in value.order)
        if spread.view is None or kept == value.order or len(kept) == len(order) or self.token in kept:
            return spread
        return Side(lambda tensor: spread.see(tensor).contiguous(), spread.back)

    def _general(self, left: Value, right: Value, order: Group) -> General:
        return General(
            self._spread(left, left.order),
            self._spread(right, right.order),
            matmul(left.order, right.order, order),
            matmul(order, right.order, left.order),
            matmul(order, left.order, right.order),
        )


def _chained(steps: list[View]) -> View | None:
    if len(steps) <= 1:
        return steps[0] if steps else None

    def chain(tensor: Tensor) -> Tensor:
        for step in steps:
            tensor = step(tensor)
        return tensor

    return chain
