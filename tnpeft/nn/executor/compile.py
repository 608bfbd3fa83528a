"""From a plan to instructions; the base weight and bias are operands like any factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tnpeft.networks.factor import Group
from tnpeft.nn.executor.kernels import Einsum2, Instruction, Kernel, Layout, Linear, Sizes, Sum, flat, singly
from tnpeft.nn.executor.listing import BIAS, FACTORS, WEIGHT, Listing, X, Y
from tnpeft.planning.steps import Plan, Step, fresh


def compile_plan(
    plan: Plan, labels: Sequence[str], linear: bool = False, token: str = "", group: str = ""
) -> Listing:
    """Return the instructions of a plan whose factors come in the order of ``labels``.

    With ``linear`` the frozen product with the base weight is part of the list; without, ``y`` is what the update is
    added to, or empty. An index ``token`` of a plan without activations may have any size at run time. The rows of
    activations are sorted by the stack index ``group``, if given, whose :class:`Groups` stand in for the base weight.
    """
    return _Compiler(plan, labels, linear, token, group).listing()


class _Compiler:
    def __init__(self, plan: Plan, labels: Sequence[str], linear: bool, token: str, group: str) -> None:
        net = plan.network
        self.plan, self.labels, self.linear, self.group = plan, labels, linear, group
        self.sizes = Sizes(plan.sizes, plan.activation or token)
        self.steps = [step for step in plan.steps if step.kind != "reshape"]
        self.out: list[Instruction] = []
        self.base = fresh("W", labels)
        self.places = {label: k for k, label in enumerate(labels, FACTORS)}
        self.layouts = {k: singly(net.factor(label).indices) for label, k in self.places.items()}
        self.next = FACTORS + len(labels)
        if plan.activation:
            tokens = (*(index for index in net.stack if index != group), plan.activation)
            self.places |= {fresh("x", labels): X, self.base: WEIGHT}
            self.layouts |= {X: (tokens, net.cols), WEIGHT: (net.rows, net.cols), Y: (tokens, net.rows)}
        self.wanted = _wanted(self.steps, {name: flat(self.layouts[k]) for name, k in self.places.items()})
        for name, order in self.wanted.items():
            if group and plan.activation in order:  # one axis of rows
                self.wanted[name] = tuple(index for index in order if index != group)

    def listing(self) -> Listing:
        """Return all instructions."""
        last, active = self.steps[-1], bool(self.plan.activation)
        parts = dict(zip(last.operands, last.signs, strict=True)) if last.kind == "add" else {last.result: 1}
        if active:
            self.places |= dict.fromkeys(parts, Y)
        if self.linear and self.plan.form != "merged":
            self._linear(WEIGHT)
        for step in self.steps:
            total = active and step.result in parts
            if step.kind == "add":
                if step is not last or not active:
                    self._add(step)
            elif total and step.frozen and self.linear:
                self._linear(self.places[step.operands[1]])
            else:
                out = self.layouts[Y] if total else singly(self.wanted[step.result]) if step is last else None
                kernel, operands = self._einsum(step, out)
                self._emit(step.result, kernel, operands, parts[step.result] if total else 1, total)
        kinds = [self.plan.network.factor(label) for label in self.labels]
        trainable = [self.sizes.volume(f.indices) if f.kind == "trainable" else 0 for f in kinds]
        width = self.sizes.elements(self.layouts[X]) if active else 0
        names = {register: name for name, register in self.places.items()}
        output = Y if active else self.places[last.result]
        return Listing(self.out, names, self.sizes, trainable, width, output, owned=bool(self.group))

    def _emit(
        self, name: str, kernel: Kernel, operands: tuple[int, ...], sign: int = 1, scaled: bool = False
    ) -> None:
        """Compute a result, or add to it if it is there."""
        if name not in self.places:
            self.places[name], self.layouts[self.next] = self.next, kernel.out
            self.next += 1
        self.out.append(Instruction(kernel, operands, self.places[name], sign, scaled))

    def _operand(self, step: Step, k: int) -> tuple[int, Layout]:
        """Return an operand and its layout; a factor takes the names that its indices have in this use."""
        register = self.places[step.operands[k]]
        factor = FACTORS <= register < FACTORS + len(self.labels)
        return register, singly(step.uses[k]) if factor else self.layouts[register]

    def _linear(self, weight: int) -> None:
        kernel = Linear(self.layouts[X], self.layouts[WEIGHT], self.layouts[Y], self.sizes)
        self.out.append(Instruction(kernel, (X, weight, BIAS), Y))

    def _einsum(self, step: Step, out: Layout | None) -> tuple[Kernel, tuple[int, ...]]:
        """The kernel of a product, whose result is stored as suits best if that is left open, and its operands."""
        token, stack, order = self.plan.activation, self.plan.network.stack, self.wanted[step.result]
        left, right = self._operand(step, 0), self._operand(step, 1)
        rows = [index for index in order if index not in stack]
        if token in flat(right[1]) if token in order else bool(rows) and rows[0] not in flat(left[1]):
            left, right = right, left  # activations come first
        if out is None:
            a, b, out = flat(left[1]), flat(right[1]), singly(order)
            batch = tuple(index for index in order if index in a and index in b)
            if batch in ((), stack) and any(index in a and index not in order for index in b):
                alone = tuple(i for i in order if i in (self.group, token)) if self.group else batch  # what is sliced
                sides = (tuple(i for i in order if i in own and i not in alone) for own in (a, b))
                out = (*singly(alone), *(side for side in sides if side))
        operands = left[0], right[0]
        if self.group and token in flat(left[1]) and self.group in flat(right[1]):
            from tnpeft.nn.executor.groups import GroupedEinsum2  # numpy does without torch

            return GroupedEinsum2(left[1], right[1], out, self.sizes, self.group), (*operands, WEIGHT)
        return Einsum2(left[1], right[1], out, self.sizes), operands

    def _add(self, step: Step) -> None:
        """A sum of weights; one with the base weight begins with that and scales the others."""
        merged = self.base in step.operands and bool(self.plan.activation)
        layout = self.layouts[WEIGHT] if merged else singly(self.wanted[step.result])
        order = sorted(range(len(step.operands)), key=lambda k: not (merged and step.operands[k] == self.base))
        for k in order:
            place, own = self._operand(step, k)
            scaled = merged and self.linear and k != order[0]
            self._emit(step.result, Sum(own, layout, self.sizes), (place,), step.signs[k], scaled)


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
