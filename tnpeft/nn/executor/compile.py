"""From a plan to instructions; the base weight and bias are operands like any factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tnpeft.networks.factor import Group
from tnpeft.nn.executor.kernels import (
    Einsum2,
    Instruction,
    Kernel,
    Layout,
    Linear,
    Sizes,
    Sum,
    flat,
    singly,
)
from tnpeft.nn.executor.listing import BIAS, FACTORS, WEIGHT, Listing, Result, X, Y
from tnpeft.planning.steps import Plan, Step, fresh


def compile_plan(plan: Plan, labels: Sequence[str], linear: bool = False, token: str = "") -> Listing:
    """Return the instructions of a plan whose factors come in the order of ``labels``.

    With ``linear`` the frozen product with the base weight is part of the list; without, ``y`` is what the update is
    added to, or empty. An index ``token`` of a plan without activations may have any size at run time.
    """
    return _Compiler(plan, labels, linear, token).listing()


class _Compiler:
    def __init__(self, plan: Plan, labels: Sequence[str], linear: bool, token: str = "") -> None:
        net = plan.network
        self.plan, self.labels, self.linear = plan, labels, linear
        self.sizes = Sizes(plan.sizes, plan.activation or token)
        self.steps = [step for step in plan.steps if step.kind != "reshape"]
        self.out: list[Instruction] = []
        self.layouts: dict[int, Layout] = {}
        self.results: dict[int, Result] = {}
        self.places: dict[str, int] = {}
        self.base = fresh("W", labels)
        rows, tokens = net.rows if plan.activation else (), (*net.stack, plan.activation)
        cols = net.cols if plan.activation else ()
        inputs = {fresh("x", labels): (X, (tokens, cols)), self.base: (WEIGHT, (rows, cols))}
        self.layouts[Y] = (tokens, rows)
        self.next = FACTORS + len(labels)
        for k, label in enumerate(labels, FACTORS):
            self.places[label], self.layouts[k] = k, singly(net.factor(label).indices)
        self.factors = {*self.places.values()}
        for name, (register, layout) in inputs.items() if plan.activation else ():
            self.places[name], self.layouts[register] = register, layout
        self.wanted = _wanted(self.steps, {name: flat(self.layouts[k]) for name, k in self.places.items()})

    def listing(self) -> Listing:
        """Return all instructions."""
        last = self.steps[-1]
        parts = {last.result: 1}
        if last.kind == "add":
            parts = dict(zip(last.operands, last.signs, strict=True))
        if self.linear and self.plan.form != "merged":
            self._linear(WEIGHT)
        for step in self.steps:
            if step.kind == "add":
                if step is not last or not self.plan.activation:
                    self._add(step)
            elif step.result in parts and self.plan.activation:
                self._accumulate(step, parts[step.result])
            else:
                self._contract(step, step is last)
        output = Y if self.plan.activation else self.places[last.result]
        kinds = [self.plan.network.factor(label) for label in self.labels]
        trainable = [self.sizes.volume(f.indices) if f.kind == "trainable" else 0 for f in kinds]
        width = self._elements(self.layouts[X]) if self.plan.activation else 0
        return Listing(self.out, self.layouts, self.results, self.sizes, trainable, width, output)

    def _emit(
        self, name: str, kernel: Kernel, operands: tuple[int, ...], layout: Layout, summed: Group, sign: int = 1
    ) -> int:
        register, self.next = self.next, self.next + 1
        self.layouts[register] = layout
        self.out.append(Instruction(kernel, operands, register, sign < 0))
        self.results[register] = Result(name, self._elements(layout), self.sizes.volume(summed))
        if name:
            self.places[name] = register
        return register

    def _elements(self, layout: Layout) -> int:
        """The number of elements, of activations for each row."""
        return self.sizes.volume(index for index in flat(layout) if index != self.plan.activation)

    def _operand(self, step: Step, k: int) -> tuple[int, Layout]:
        """Return an operand and its layout; a factor takes the names that its indices have in this use."""
        register = self.places[step.operands[k]]
        return register, singly(step.uses[k]) if register in self.factors else self.layouts[register]

    def _linear(self, weight: int) -> None:
        kernel = Linear(self.layouts[X], self.layouts[WEIGHT], self.layouts[Y], self.sizes)
        self.out.append(Instruction(kernel, (X, weight, BIAS), Y))

    def _einsum(self, step: Step, out: Layout | None) -> tuple[Kernel, tuple[int, ...], Layout, Group]:
        """The kernel of a product, its operands, where activations come first, its layout and what it sums."""
        token, stack, order = self.plan.activation, self.plan.network.stack, self._order(step)
        left, right = self._operand(step, 0), self._operand(step, 1)
        rows = [index for index in order if index not in stack]
        if token in flat(right[1]) if token in order else bool(rows) and rows[0] not in flat(left[1]):
            left, right = right, left
        a, b = flat(left[1]), flat(right[1])
        kept = order if out is None else flat(out)
        summed = tuple(index for index in b if index in a and index not in kept)
        if out is None:
            out = singly(order)
            batch = tuple(index for index in order if index in a and index in b)
            if summed and batch in ((), stack):
                alone = self._alone(order, batch)
                sides = (tuple(i for i in order if i in own and i not in alone) for own in (a, b))
                out = (*singly(alone), *(side for side in sides if side))
        kernel, operands = self._kernel(left, right, out)
        return kernel, operands, out, summed

    def _order(self, step: Step) -> Group:
        return self.wanted[step.result]

    def _alone(self, order: Group, batch: Group) -> Group:
        """The indices of a result that have axes of their own where its sides are fused."""
        return batch

    def _kernel(
        self, left: tuple[int, Layout], right: tuple[int, Layout], out: Layout
    ) -> tuple[Kernel, tuple[int, ...]]:
        return Einsum2(left[1], right[1], out, self.sizes), (left[0], right[0])

    def _contract(self, step: Step, last: bool) -> None:
        kernel, operands, layout, summed = self._einsum(step, singly(self._order(step)) if last else None)
        self._emit(step.result, kernel, operands, layout, summed)

    def _add(self, step: Step) -> None:
        """A sum of weights; one with the base weight begins with that and scales the others."""
        merged = self.base in step.operands and self.plan.activation
        layout = self.layouts[WEIGHT] if merged else singly(self.wanted[step.result])
        order = sorted(range(len(step.operands)), key=lambda k: not (merged and step.operands[k] == self.base))
        register = -1
        for k in order:
            place, own = self._operand(step, k)
            kernel = Sum(own, layout, self.sizes)
            if register < 0:
                register = self._emit(step.result, kernel, (place,), layout, (), step.signs[k])
            else:
                scaled = bool(merged) and self.linear
                self.out.append(Instruction(kernel, (place,), register, step.signs[k] < 0, scaled))

    def _accumulate(self, step: Step, sign: int) -> None:
        """Add the product of two operands to the output."""
        if step.frozen and self.linear:
            return self._linear(self._operand(step, 1)[0])
        kernel, operands, _, _ = self._einsum(step, self.layouts[Y])
        self.out.append(Instruction(kernel, operands, Y, sign < 0, True))
        return None


def _wanted(steps: Sequence[Step], given: Mapping[str, Group]) -> dict[str, Group]:
    """Return the order in which every result should keep its indices: what its consumer sums comes last.

    ``given`` holds the orders of what is not a result.
    """
    orders: dict[str, Group] = {}
    for step in reversed(steps):
        order = orders.setdefault(step.result, step.indices)
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
            orders[name] = kept + tuple(summed)
    return orders
