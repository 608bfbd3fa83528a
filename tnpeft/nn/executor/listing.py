"""Instructions of a site, and those of the backward pass, generated from them for the gradients that are wanted.

What the backward list reads is saved, unless it is recomputed by one rule:

- from factors alone: elementwise products, and results larger than the trainable factors below them;
- on the activations, if those are saved: results as wide as they are, and those whose elements take no more
  multiply-adds than the planner pays for saving one.

Behind frozen factors the activations are not read: there the result that these lead to is saved in their place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tnpeft.nn.executor.kernels import Einsum2, Instruction, Linear, Sizes, Sum, flat
from tnpeft.planning.planner import MACS_PER_ELEMENT

# registers: ``FIRST`` is the first product where that is given; factors, then results follow
X, FIRST, WEIGHT, BIAS, Y, FACTORS = range(6)
Mask = tuple[bool, ...]  # which of these registers and factors want a gradient


@dataclass(frozen=True, eq=False)
class Code:
    """The instructions of one site for one set of wanted gradients.

    ``saved`` are the registers kept for the backward pass besides factors; ``recomputed`` is what that runs first,
    and ``values`` what it runs first, from those that are ``inputs``, where it is itself differentiated. ``root`` is
    the result that stands for the activations, ``X`` if none does. The gradient of register ``k`` is in register
    ``size + k`` of ``total``.
    """

    forward: tuple[Instruction, ...]
    values: tuple[Instruction, ...]
    recomputed: tuple[Instruction, ...]
    backward: tuple[Instruction, ...]
    saved: tuple[int, ...]
    inputs: frozenset[int]
    root: int
    size: int
    total: int


class Listing:
    """A compiled plan: instructions from factors and activations to ``y``, those that need only factors first.

    ``names`` are those of the plan's steps by register, ``trainable`` the sizes of trained factors, zero for others,
    ``width`` that of an activation. ``lead`` computes a first product that is given to the other instructions. Output
    and gradient of the activations may be added to in place if they are ``owned``.
    """

    def __init__(
        self,
        steps: Sequence[Instruction],
        names: Mapping[int, str],
        sizes: Sizes,
        trainable: Sequence[int],
        width: int,
        output: int,
        lead: Sequence[Instruction] = (),
        owned: bool = False,
    ) -> None:
        self.names, self.sizes, self.trainable = names, sizes, trainable
        self.width, self.output, self.lead, self.owned = width, output, lead, owned
        self.active = {X, FIRST}
        steps = _marked(steps, {Y} if owned else set())
        for step in steps:
            if not self.active.isdisjoint(step.operands):
                self.active.add(step.result)
        self.weight_steps = tuple(step for step in steps if step.result not in self.active)
        self.activation_steps = tuple(step for step in steps if step.result in self.active)
        self.forward = self.weight_steps + self.activation_steps
        self.size = max([FACTORS + len(trainable), *(step.result + 1 for step in (*lead, *steps))])
        self.operands: dict[int, set[int]] = {}  # of each result
        for step in self.forward:
            self.operands.setdefault(step.result, set()).update(step.operands)
        self.kernels = {step.result: step.kernel for step in reversed((*lead, *self.forward))}  # the first of each
        self.codes: dict[Mask, Code] = {}
        self._usual = (True, True, False, False, False, *(size > 0 for size in trainable))

    def behind(self, registers: Collection[int], inputs: Collection[int] = ()) -> set[int]:
        """Return all that registers are computed from, with them, from some results as if these were inputs."""
        found, pending = {*registers}, [*registers]
        while pending:
            k = pending.pop()
            for operand in () if k in inputs else self.operands.get(k, set()) - found:
                found.add(operand)
                pending.append(operand)
        return found

    def readers(self, register: int) -> list[Instruction]:
        """Return the steps of the update that read a register."""
        return [step for step in self.forward if register in step.operands and not isinstance(step.kernel, Linear)]

    @cached_property
    def roots(self) -> list[int]:
        """The activations, and the results that frozen factors alone make of them, one after the other."""
        found = [X] if not self.readers(FIRST) else [FIRST]
        frozen = {k for k, size in enumerate(self.trainable, FACTORS) if not size}
        while len(steps := self.readers(found[-1])) == 1 and not self.owned:
            kernel, operands, result, *_ = steps[0]
            if result == Y or not isinstance(kernel, Einsum2) or operands[1] not in frozen:
                break
            found.append(result)
        return found

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
        steps = self.code(self._usual).recomputed
        return tuple(dict.fromkeys(self.names[step.result] for step in steps if step.result in self.names))


# ---- the backward pass


def _marked(steps: Sequence[Instruction], own: set[int]) -> list[Instruction]:
    """Mark the instructions that add to a result which the list itself has computed and nothing else holds."""
    found, seen = [], set[int]()
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
                operands = (size + step.result, *(step.operands[other] for other in others))
                back.append(Instruction(kernel, operands, size + operand, step.sign, step.scaled))
    back, extra = _folded(listing, back)
    read = {k for step in back for k in step.operands if k < size}
    root = next((k for k in listing.roots if k in read), X)
    recomputed = _recomputed(listing, read, root)
    needed = listing.behind(read, {root})
    trained = {k for k, on in enumerate(needs) if on and k >= FACTORS}
    first = {k for step in listing.lead for k in step.operands if k in trained}  # whose gradients read ``X``
    lead = listing.lead if first and FIRST in needed else ()
    inputs = needed & {X, FIRST, WEIGHT} | ({X} if first else set())
    made = {step.result for step in lead}
    return Code(
        forward=listing.forward,
        values=(*lead, *(step for step in listing.forward if step.result in needed - made - {root})),
        recomputed=tuple(step for step in listing.forward if step.result in recomputed),
        backward=tuple(_marked(back, {size + X} if listing.owned else set())),
        saved=(*sorted(inputs), *sorted(read.intersection(listing.operands) - recomputed)),
        inputs=frozenset(inputs | {root}) - made,
        root=root,
        size=size,
        total=2 * size + extra,
    )


def _recomputed(listing: Listing, read: set[int], root: int) -> set[int]:
    """Return the results that the backward pass computes again, and those that this takes."""
    factors = range(FACTORS, FACTORS + len(listing.trainable))
    width = listing.width if root == X else listing.kernels[root].elements
    width = width if width >= listing.width else 0

    def cheap(register: int) -> bool:
        kernel = listing.kernels[register]
        if register not in listing.active:
            sizes = (listing.trainable[k - FACTORS] for k in listing.behind([register]) if k in factors)
            return kernel.macs == 1 or kernel.elements > sum(sizes)
        at_hand = all(k in {X, WEIGHT} | read or k not in listing.active for k in listing.operands[register])
        wide = bool(width) and kernel.elements >= width
        return root in read and (wide or (kernel.macs <= MACS_PER_ELEMENT and at_hand))

    results = {*listing.operands}
    found = {register for register in results & read - {Y, root} if cheap(register)}
    return found | (listing.behind(found, read - found) & results - read)


def _folded(listing: Listing, back: list[Instruction]) -> tuple[list[Instruction], int]:
    """Fold a gradient that only scales columns into the matrix that the columns meet next, which is smaller.

    For ``t = x @ M.T`` and ``y = t * w`` the gradients of ``x`` and ``M`` take ``M * w`` instead of ``grad * w``.
    """
    size, extra = listing.size, 0
    rows = int(listing.sizes.dims.get(listing.sizes.token, 0))
    for step in listing.forward:
        kernel, t = step.kernel, step.result
        written = [item for item in back if item.result == size + t]
        if not (isinstance(kernel, Einsum2) and kernel.product) or len(written) != 1 or t in (Y, *listing.roots):
            continue
        matrix, (scaling,) = step.operands[1], written
        by, (grad, *weights) = scaling.kernel, scaling.operands
        if t not in listing.active or not listing.active.isdisjoint((matrix, *weights)) or kernel.macs > rows:
            continue
        if not isinstance(by, Einsum2) or by.product or by.summed or by.left != kernel.out:
            continue
        if not {*flat(by.right)} <= {*flat(kernel.right)}:
            continue
        scale = Einsum2(kernel.right, by.right, kernel.right, listing.sizes)
        back.remove(scaling)
        for at in [k for k, item in enumerate(back) if size + t in item.operands][::-1]:
            item, temporary, extra = back[at], 2 * size + extra, extra + 1
            if matrix in item.operands:
                first = scaling._replace(kernel=scale, operands=(matrix, *weights), result=temporary)
                second = item._replace(operands=(grad, temporary))
            else:
                first = item._replace(operands=(grad, item.operands[1]), result=temporary)
                second = scaling._replace(kernel=scale, operands=(temporary, *weights), result=item.result)
            back[at : at + 1] = first, second
    return back, extra
