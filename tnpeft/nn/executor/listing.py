"""Instructions of a site, and those of the backward pass, generated from them for the gradients that are wanted.

What the backward list reads is saved, unless it is recomputed by one rule:

- from factors alone: elementwise products, and results larger than the trainable factors below them;
- on the activations, if those are saved: results as wide as they are, and those whose elements take no more
  multiply-adds than the planner pays for saving one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tnpeft.nn.executor.kernels import Einsum2, Instruction, Layout, Linear, Sizes, Sum, flat
from tnpeft.planning.planner import MACS_PER_ELEMENT

# registers: ``WIDE`` is the linear's input; factors, then results follow
X, WIDE, WEIGHT, BIAS, Y, FACTORS = range(6)
Mask = tuple[bool, ...]  # which of these registers and factors want a gradient


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
        sizes: Sizes,
        trainable: Sequence[int],
        width: int,
        output: int,
    ) -> None:
        self.layouts, self.results, self.sizes = layouts, results, sizes
        self.trainable, self.width, self.output = trainable, width, output
        self.active = {X, WIDE}
        steps = _marked(steps)
        for step in steps:
            if not self.active.isdisjoint(step.operands):
                self.active.add(step.result)
        self.weight_steps = tuple(step for step in steps if step.result not in self.active)
        self.activation_steps = tuple(step for step in steps if step.result in self.active)
        self.forward = self.weight_steps + self.activation_steps
        self.size = max([FACTORS + len(trainable), *(step.result + 1 for step in steps)])
        self.operands: dict[int, set[int]] = {}  # of each result
        self.below = {
            k: {k} for k in range(FACTORS + len(trainable))
        }  # all that a register is computed from, with it
        for step in self.forward:
            self.operands.setdefault(step.result, set()).update(step.operands)
            self.below.setdefault(step.result, {step.result}).update(*(self.below[k] for k in step.operands))
        self.codes: dict[Mask, Code] = {}
        self._usual = (True, True, False, False, False, *(size > 0 for size in trainable))

    def registers(self, factors: Sequence[Any], x: Any = None) -> list[Any]:
        """Return registers with the factors and the activations in place."""
        return [x, None, None, None, None, *factors, *[None] * (self.size - FACTORS - len(factors))]

    def code(self, needs: Mask) -> Code:
        """Return the instructions for the registers that want gradients, generated once."""
        if needs not in self.codes:
            self.codes[needs] = _generate(self, needs)
        return self.codes[needs]

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


# ---- the backward pass


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


def _generate(listing: Listing, needs: Mask) -> Code:
    size = listing.size
    live = {k for k, on in enumerate(needs) if on}
    for step in listing.forward:
        if not live.isdisjoint(step.operands):
            live.add(step.result)
    order = [step for step in listing.forward if isinstance(step.kernel, Linear)]  # what others are added to
    order += [step for step in reversed(listing.forward) if not isinstance(step.kernel, Linear)]
    back = []
    for step in order:
        for k, operand in enumerate(step.operands):
            if operand in live and step.result in live:
                kernel, others = step.kernel.vjp(k)
                read = [step.result if other < 0 else step.operands[other] for other in others]
                operands = (size + step.result, *read)
                back.append(Instruction(kernel, operands, size + operand, step.negative, step.scaled))
    back, extra = _folded(listing, back)
    read = {k for step in back for k in step.operands if k < size}
    recomputed = _recomputed(listing, read)
    needed = {k for register in read for k in listing.below[register]}
    again = tuple(step for step in listing.forward if step.result in recomputed)
    saved = (*sorted(needed & {X, WIDE, WEIGHT}), *sorted(read.intersection(listing.operands) - recomputed))
    values = tuple(step for step in listing.forward if step.result in needed)
    own = () if listing.output == Y else (size + X,)  # what a prefix's input gets from elsewhere is added to
    return Code(listing.forward, values, again, tuple(_marked(back, own)), saved, size, 2 * size + extra)


def _recomputed(listing: Listing, read: set[int]) -> set[int]:
    """Return the results that the backward pass computes again, and those that this takes."""
    operands, factors = listing.operands, range(FACTORS, FACTORS + len(listing.trainable))

    def cheap(register: int) -> bool:
        result = listing.results[register]
        if register not in listing.active:
            sizes = (listing.trainable[k - FACTORS] for k in listing.below[register] if k in factors)
            return result.macs == 1 or result.elements > sum(sizes)
        inputs = {*factors, X, WIDE, WEIGHT}
        at_hand = all(k in inputs | read or k not in listing.active for k in operands[register])
        wide = bool(listing.width) and result.elements >= listing.width
        return X in read and (wide or (result.macs <= MACS_PER_ELEMENT and at_hand))

    found = {register for register in operands if register in read and register != Y and cheap(register)}
    pending = [*found]
    while pending:
        for operand in operands[pending.pop()]:
            if operand in operands and operand not in found and operand not in read:
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
