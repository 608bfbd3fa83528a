"""From a plan to instructions, and from instructions to those of the backward pass.

The base weight and bias are operands like any factor. The backward list is generated from the forward list for the
set of operands that want gradients; what it reads is saved, unless it is recomputed by one rule:

- from factors alone: elementwise products, and results larger than the trainable factors below them;
- on the activations, if those are saved: results as wide as they are, and those whose elements take no more
  multiply-adds than the planner pays for saving one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tnpeft.networks.factor import Group
from tnpeft.nn.executor.kernels import (
    ColumnNorm,
    Einsum2,
    Instruction,
    Kernel,
    Layout,
    Linear,
    Normalize,
    Sizes,
    Sum,
    View,
    flat,
    singly,
    view,
)
from tnpeft.planning.planner import MACS_PER_ELEMENT
from tnpeft.planning.steps import Plan, Step, fresh

Mask = tuple[bool, ...]  # which of the factors, activations, input, weight and bias want a gradient


@dataclass(frozen=True, eq=False)
class Registers:
    """Numbers of the registers: factors from zero on, then these, then results; ``wide`` is the linear's input."""

    factors: int

    def __post_init__(self) -> None:
        for k, name in enumerate(("x", "wide", "weight", "bias", "y", "results")):
            object.__setattr__(self, name, self.factors + k)

    x: int = 0
    wide: int = 0
    weight: int = 0
    bias: int = 0
    y: int = 0
    results: int = 0


@dataclass(frozen=True)
class Result:
    """A result: the name of its plan's step, elements for a row of activations, multiply-adds for each of them."""

    name: str
    elements: int
    macs: int


@dataclass(frozen=True, eq=False)
class Code:
    """The instructions of one site for one set of wanted gradients.

    ``saved`` are the registers kept for the backward pass besides factors, inputs first; ``recomputed`` is what that
    runs first, and ``values`` what it runs first, from the inputs, where it is itself differentiated. The gradient of
    register ``k`` is in register ``size + k`` of ``total``.
    """

    at: Registers
    forward: tuple[Instruction, ...]
    values: tuple[Instruction, ...]
    recomputed: tuple[Instruction, ...]
    backward: tuple[Instruction, ...]
    saved: tuple[int, ...]
    size: int
    total: int


class Listing:
    """A compiled plan: instructions from factors and activations to ``y``, those that need only factors first."""

    def __init__(
        self,
        steps: Sequence[Instruction],
        layouts: Mapping[int, Layout],
        results: Mapping[int, Result],
        at: Registers,
        sizes: Sizes,
        trainable: Sequence[int],
        width: int,
        output: int,
    ) -> None:
        self.layouts, self.results, self.at, self.sizes = layouts, results, at, sizes
        self.trainable, self.width, self.output = trainable, width, output
        self.active = {at.x, at.wide}
        steps = _marked(steps)
        for step in steps:
            if not self.active.isdisjoint(step.operands):
                self.active.add(step.result)
        self.weight_steps = tuple(step for step in steps if step.result not in self.active)
        self.activation_steps = tuple(step for step in steps if step.result in self.active)
        self.forward = self.weight_steps + self.activation_steps
        self.size = max([at.results, *(step.result + 1 for step in steps)])
        self._codes: dict[Mask, Code] = {}
        self._usual = (*(size > 0 for size in trainable), True, True, False, False)

    def registers(self, factors: Sequence[Any], *rest: Any) -> list[Any]:
        """Return registers with the factors, and what follows them, in place."""
        values = [*factors, *rest]
        return values + [None] * (self.size - len(values))

    def code(self, needs: Mask) -> Code:
        """Return the instructions for the operands that want gradients: factors, x, wide, weight, bias."""
        code = self._codes.get(needs)
        if code is None:
            code = self._codes[needs] = _generate(self, needs)
        return code

    def traced_code(self, needs: Mask) -> Code:
        """Return instructions for at least these gradients: nothing is generated while a compiler traces."""
        usual = all(on or not wanted for on, wanted in zip(self._usual, needs, strict=True))
        return self.training if usual else self.all_gradients

    def generate(self) -> None:
        """Generate the instructions that a compiler may need."""
        self.training, self.all_gradients = self.code(self._usual), self.code((True,) * len(self._usual))

    def recomputed(self) -> tuple[str, ...]:
        """Return the names of the plan's steps that are computed again in the backward pass of training."""
        names = (self.results[step.result].name for step in self.code(self._usual).recomputed)
        return tuple(dict.fromkeys(name for name in names if name))


# ---- from a plan to instructions


def compile_plan(plan: Plan, labels: Sequence[str], unit_norm: Collection[str] = (), linear: bool = False) -> Listing:
    """Return the instructions of a plan whose factors come in the order of ``labels``.

    Columns of the factors in ``unit_norm`` are normalised first. With ``linear`` the frozen product with the base
    weight is part of the list; without, ``y`` is what the update is added to, or empty.
    """
    return _Compiler(plan, labels, unit_norm, linear).listing()


class _Compiler:
    def __init__(self, plan: Plan, labels: Sequence[str], unit_norm: Collection[str], linear: bool) -> None:
        net = plan.network
        self.plan, self.labels, self.linear = plan, labels, linear
        self.sizes = Sizes(plan.sizes, plan.activation)
        self.at = Registers(len(labels))
        self.steps = [step for step in plan.steps if step.kind != "reshape"]
        self.out: list[Instruction] = []
        self.layouts: dict[int, Layout] = {}
        self.results: dict[int, Result] = {}
        self.places: dict[str, int] = {}
        self.base = fresh("W", labels)
        rows, tokens = net.rows if plan.activation else (), (*net.stack, plan.activation)
        cols = net.cols if plan.activation else ()
        inputs = {fresh("x", labels): (self.at.x, (tokens, cols)), self.base: (self.at.weight, (rows, cols))}
        self.layouts[self.at.y] = (tokens, rows)
        self.next = self.at.results
        for k, label in enumerate(labels):
            self.places[label] = self._input(k, net.factor(label).indices, label in unit_norm)
        self.factors = {*self.places.values()}
        for name, (register, layout) in inputs.items() if plan.activation else ():
            self.places[name], self.layouts[register] = register, layout
        self.wanted = _wanted(self.steps, {name: flat(self.layouts[k]) for name, k in self.places.items()})

    def _input(self, register: int, indices: Group, normalised: bool) -> int:
        net = self.plan.network
        layout = self.layouts[register] = singly(indices)
        if not normalised:
            return register
        axes = tuple(k for k, index in enumerate(indices) if index in (*net.rows, *net.cols))
        length = self._emit("", ColumnNorm(axes), (register,), layout, ())
        return self._emit("", Normalize(axes), (register, length), layout, ())

    def listing(self) -> Listing:
        """Return all instructions."""
        last = self.steps[-1]
        parts = {last.result: 1}
        if last.kind == "add":
            parts = dict(zip(last.operands, last.signs, strict=True))
        if self.linear and self.plan.form != "merged":
            self._linear(self.at.weight)
        for step in self.steps:
            if step.kind == "add":
                if step is not last or not self.plan.activation:
                    self._add(step, step is last)
            elif step.result in parts and self.plan.activation:
                self._accumulate(step, parts[step.result])
            else:
                self._contract(step, step is last)
        output = self.at.y if self.plan.activation else self.places[last.result]
        kinds = [self.plan.network.factor(label) for label in self.labels]
        trainable = [self.sizes.volume(f.indices) if f.kind == "trainable" else 0 for f in kinds]
        width = self.sizes.volume(flat(self.layouts[self.at.x])) if self.plan.activation else 0
        width //= self.plan.sizes.get(self.plan.activation, 1)
        return Listing(self.out, self.layouts, self.results, self.at, self.sizes, trainable, width, output)

    def _emit(
        self, name: str, kernel: Kernel, operands: tuple[int, ...], layout: Layout, summed: Group, sign: int = 1
    ) -> int:
        register, self.next = self.next, self.next + 1
        self.layouts[register] = layout
        self.out.append(Instruction(kernel, operands, register, sign < 0))
        elements = self.sizes.volume(flat(layout)) // self._rows(layout)
        self.results[register] = Result(name, elements, self.sizes.volume(summed))
        if name:
            self.places[name] = register
        return register

    def _rows(self, layout: Layout) -> int:
        token = self.plan.activation
        return int(self.plan.sizes[token]) if token and token in flat(layout) else 1

    def _operand(self, step: Step, k: int) -> tuple[int, Layout]:
        """Return an operand and its layout; a factor takes the names that its indices have in this use."""
        register = self.places[step.operands[k]]
        return register, singly(step.uses[k]) if register in self.factors else self.layouts[register]

    def _linear(self, weight: int) -> None:
        at = self.at
        kernel = Linear(self.layouts[at.x], self.layouts[at.weight], self.layouts[at.y], self.sizes)
        self.out.append(Instruction(kernel, (at.x, weight, at.bias), at.y))

    def _contract(self, step: Step, last: bool) -> None:
        left, right = self._operand(step, 0), self._operand(step, 1)
        stack, order = self.plan.network.stack, self.wanted[step.result]
        rows = [index for index in order if index not in stack]
        if self.plan.activation not in flat(left[1]) and rows and rows[0] not in flat(left[1]):
            left, right = right, left
        a, b = flat(left[1]), flat(right[1])
        summed = tuple(index for index in b if index in a and index not in order)
        batch = tuple(index for index in order if index in a and index in b)
        layout = singly(order)
        if summed and not last and batch in ((), stack):
            sides = (tuple(i for i in order if i in own and i not in batch) for own in (a, b))
            layout = (*singly(batch), *(side for side in sides if side))
        kernel = Einsum2(left[1], right[1], layout, self.sizes)
        self._emit(step.result, kernel, (left[0], right[0]), layout, summed)

    def _add(self, step: Step, last: bool) -> None:
        """A sum of weights; one with the base weight begins with that and scales the others."""
        merged = self.base in step.operands and self.plan.activation
        layout = self.layouts[self.at.weight] if merged else singly(self.wanted[step.result])
        order = sorted(range(len(step.operands)), key=lambda k: not (merged and step.operands[k] == self.base))
        register = -1
        for k in order:
            place, own = self._operand(step, k)
            if register < 0:
                kernel: Kernel = Sum(own, layout, self.sizes)
                register = self._emit(step.result, kernel, (place,), layout, (), step.signs[k])
            else:
                kernel = Sum(own, layout, self.sizes)
                scaled = bool(merged) and self.linear
                self.out.append(Instruction(kernel, (place,), register, step.signs[k] < 0, scaled))

    def _accumulate(self, step: Step, sign: int) -> None:
        """Add the product of two operands to the output."""
        left, right = self._operand(step, 0), self._operand(step, 1)
        if step.frozen and self.linear:
            return self._linear(right[0])
        kernel = Einsum2(left[1], right[1], self.layouts[self.at.y], self.sizes)
        self.out.append(Instruction(kernel, (left[0], right[0]), self.at.y, sign < 0, True))
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


def _marked(steps: Sequence[Instruction], own: Collection[int] = ()) -> list[Instruction]:
    """Mark the instructions that add to a result which the list itself has computed and nothing else holds."""
    own, seen = {*own}, set[int]()
    found = []
    for step in steps:
        found.append(step._replace(fresh=step.result in own))
        if step.result in seen or not isinstance(step.kernel, Sum):  # a sum alone may be a view of its operand
            own.add(step.result)
        seen.add(step.result)
    return found


# ---- the backward pass


def _generate(listing: Listing, needs: Mask) -> Code:
    at, size = listing.at, listing.size
    live = {k for k, on in enumerate(needs) if on}
    for step in listing.forward:
        if not live.isdisjoint(step.operands):
            live.add(step.result)
    order = [step for step in listing.forward if isinstance(step.kernel, Linear)]  # what others are added to
    order += [step for step in reversed(listing.forward) if not isinstance(step.kernel, Linear)]
    back = []
    for step in order:
        for k, operand in enumerate(step.operands):
            if (
                operand in live
                and not isinstance(step.kernel, ColumnNorm)
                and (k, type(step.kernel)) != (1, Normalize)
            ):
                kernel, others = step.kernel.vjp(k)
                read = [step.result if other < 0 else step.operands[other] for other in others]
                operands = (size + step.result, *read)
                back.append(Instruction(kernel, operands, size + operand, step.negative, step.scaled))
    back, extra = _folded(listing, back)
    read = {k for step in back for k in step.operands if k < size}
    recomputed = _recomputed(listing, read)
    producers: dict[int, list[Instruction]] = {}
    for step in listing.forward:
        producers.setdefault(step.result, []).append(step)
    below, pending = set[int](), [*read]
    while pending:
        register = pending.pop()
        if register not in below:
            below.add(register)
            pending += [k for step in producers.get(register, ()) for k in step.operands]
    inputs = sorted(below & {at.x, at.wide, at.weight})
    again = tuple(step for step in listing.forward if step.result in recomputed)
    saved = (*inputs, *sorted((read & {*producers}) - recomputed))
    values = tuple(step for step in listing.forward if step.result in below)
    own = () if listing.output == at.y else (size + at.x,)  # what a prefix's input gets from elsewhere is added to
    return Code(at, listing.forward, values, again, tuple(_marked(back, own)), saved, size, 2 * size + extra)


def _recomputed(listing: Listing, read: set[int]) -> set[int]:
    """Return the results that the backward pass computes again, and those that this takes."""
    at, producers = listing.at, dict[int, set[int]]()
    below = {k: {k} for k in range(at.results)}
    for step in listing.forward:
        producers.setdefault(step.result, set()).update(step.operands)
        below.setdefault(step.result, set()).update(*(below[k] for k in step.operands))

    def cheap(register: int) -> bool:
        result = listing.results[register]
        if register not in listing.active:
            sizes = (listing.trainable[k] for k in below[register] if k < at.factors)
            return result.macs == 1 or result.elements > sum(sizes)
        inputs = {*range(at.factors), at.x, at.wide, at.weight}
        at_hand = all(k in inputs | read or k not in listing.active for k in producers[register])
        wide = bool(listing.width) and result.elements >= listing.width
        return at.x in read and (wide or (result.macs <= MACS_PER_ELEMENT and at_hand))

    found = {register for register in producers if register in read and register != at.y and cheap(register)}
    pending = [*found]
    while pending:
        for operand in producers[pending.pop()]:
            if operand in producers and operand not in found and operand not in read:
                found.add(operand)
                pending.append(operand)
    return found


def _folded(listing: Listing, back: list[Instruction]) -> tuple[list[Instruction], int]:
    """Fold a gradient that only scales columns into the matrix that the columns meet next, which is smaller.

    For ``t = x @ M.T`` and ``y = t * w`` the gradients of ``x`` and ``M`` take ``M * w`` instead of ``grad * w``.
    """
    size, extra = listing.size, 0
    for step in listing.forward:
        kernel, t = step.kernel, step.result
        if not (isinstance(kernel, Einsum2) and kernel.product and t in listing.results and t in listing.active):
            continue
        matrix = step.operands[1]
        written = [item for item in back if item.result == size + t]
        rows = int(listing.sizes.dims.get(listing.sizes.token, 0))
        if matrix in listing.active or len(written) != 1 or listing.results[t].macs > rows:
            continue
        (scaling,) = written
        by = scaling.kernel
        if not isinstance(by, Einsum2) or by.product or by.summed or scaling.operands[1] in listing.active:
            continue
        grad, weights = scaling.operands
        if not set(flat(by.right)) <= set(flat(kernel.right)) or by.left != kernel.out:
            continue
        scale = Einsum2(kernel.right, by.right, kernel.right, listing.sizes)
        found = []
        for item in back:
            if item is scaling:
                continue
            if size + t not in item.operands:
                found.append(item)
                continue
            extra += 1
            temporary = 2 * size + extra - 1
            if matrix in item.operands:
                found.append(scaling._replace(kernel=scale, operands=(matrix, weights), result=temporary))
                found.append(item._replace(operands=(grad, temporary)))
            else:
                found.append(item._replace(operands=(grad, item.operands[1]), result=temporary))
                found.append(scaling._replace(kernel=scale, operands=(temporary, weights), result=item.result))
        back = found
    return back, extra


# ---- the first step apart from the others


@dataclass(frozen=True, eq=False)
class Prefix:
    """The leading steps on the activations, which end in a narrower result, and the list of all others.

    ``factors`` are those that they read. ``matrix`` computes the matrix ``[narrow, inp]`` of a first step that can be
    shared, which ``see`` shows as such and ``give`` puts back; ``steps`` are all leading steps where it cannot.
    """

    factors: tuple[int, ...]
    matrix: Listing | None
    see: View | None
    give: View | None
    steps: Listing
    frozen: bool
    rest: Listing


def split(listing: Listing) -> Prefix | None:
    """Return the prefix of a program that begins with one narrow product, or with frozen factors only; else None."""
    at, body = listing.at, listing.activation_steps
    uses = [step for step in body if at.x in step.operands and not isinstance(step.kernel, Linear)]
    if len(uses) != 1:
        return None
    first = uses[0]
    if not isinstance(first.kernel, Einsum2) or first.operands[0] != at.x or first.result == at.y:
        return None
    kernel, matrix = first.kernel, first.operands[1]
    rows, cols = ((listing.sizes.token,), listing.layouts[at.x][1])
    narrow = kernel.out[1] if len(kernel.out) == 2 and kernel.out[0] == rows else ()
    plain = kernel.product and kernel.left == (rows, cols) and {*kernel.summed} == {*cols} and bool(narrow)
    shared = plain and 2 * listing.sizes.volume(narrow) <= listing.sizes.volume(cols)
    chain = [first]
    while _frozen(chain[-1], listing) and not shared:
        following = [step for step in body if chain[-1].result in step.operands]
        if len(following) != 1 or following[0].result == at.y or not _frozen(following[0], listing):
            break
        chain += following
    if not shared and not _frozen(first, listing):
        return None
    after = [step for step in body if step not in chain]
    weights = _reached(listing, [k for step in after for k in step.operands])
    last = chain[-1].result
    moved = {at.x: at.wide, last: at.x}
    after = [step._replace(operands=tuple(moved.get(k, k) for k in step.operands)) for step in after]
    layouts = {**listing.layouts, at.x: listing.layouts[last], at.wide: listing.layouts[at.x]}
    wide = listing.results[last].elements  # where it is as wide as the input, so may be what is recomputed from it
    rest = _part(listing, [*weights, *after], layouts, at.y, wide if wide >= listing.width else 0)
    before = _reached(listing, [k for step in chain for k in step.operands])
    factors = {k for step in (*before, *chain) for k in step.operands if k < at.factors}
    return Prefix(
        tuple(sorted(factors)),
        _part(listing, before, listing.layouts, matrix) if shared else None,
        view(kernel.right, (narrow, cols), listing.sizes)[0],
        view((narrow, cols), kernel.right, listing.sizes)[0],
        _part(listing, [*before, *chain], listing.layouts, last),
        all(_frozen(step, listing) for step in chain),
        rest,
    )


def _frozen(step: Instruction, listing: Listing) -> bool:
    """True if the step multiplies what comes from the activations by one frozen factor."""
    factor = step.operands[-1]
    whole = isinstance(step.kernel, Einsum2) and step.operands[0] in listing.active
    return whole and factor < listing.at.factors and not listing.trainable[factor]


def _reached(listing: Listing, registers: Sequence[int]) -> list[Instruction]:
    """Return the steps on factors alone that some registers are computed by."""
    needed = {*registers}
    found = []
    for step in reversed(listing.weight_steps):
        if step.result in needed:
            needed.update(step.operands)
            found.append(step)
    return found[::-1]


def _part(
    listing: Listing, steps: Sequence[Instruction], layouts: Mapping[int, Layout], output: int, width: int = 0
) -> Listing:
    return Listing(steps, layouts, listing.results, listing.at, listing.sizes, listing.trainable, width, output)
