"""The leading steps of programs apart: a first product that several sites share, or one that needs no saved input.

q, k and v read the same hidden states: their products with narrow matrices are one product with the concatenated
matrices, in forward and backward.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tnpeft.nn.executor.kernels import NARROW, Einsum2, Instruction, Layout, Linear, Sum, run
from tnpeft.nn.executor.listing import FACTORS, WIDE, Code, Listing, X, Y
from tnpeft.nn.executor.saving import kept, restored

# ---- the steps


@dataclass(frozen=True, eq=False)
class Prefix:
    """The leading steps on the activations, which end in a narrower result, and the list of all others.

    ``factors`` are the places of those that they read. ``matrix`` computes the matrix ``[narrow, inp]`` of a first
    step that can be shared; None where it cannot.
    """

    factors: tuple[int, ...]
    matrix: Listing | None
    steps: Listing
    frozen: bool
    rest: Listing

    def registers(self, listing: Listing, own: Sequence[Tensor], x: Tensor | None = None) -> list[Any]:
        """Return registers after a listing has run on ``x`` and the prefix's own factors."""
        values: list[Any] = [x, *[None] * (listing.size - 1)]
        for k, factor in zip(self.factors, own, strict=True):
            values[FACTORS + k] = factor
        run(listing.weight_steps if x is None else listing.forward, values)
        return values

    def code(self, listing: Listing, on: Sequence[bool], on_x: bool = False) -> Code:
        """Return a listing's instructions for the gradients of ``x`` and of its own factors that want one."""
        wanted = {k for k, yes in zip(self.factors, on, strict=True) if yes}
        return listing.code((on_x, *[False] * (FACTORS - 1), *[k in wanted for k in range(len(listing.trainable))]))

    def narrow(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Return the result from all factors by operations that autograd sees, which keeps ``x`` for trained ones."""
        values = self.steps.registers(factors, x)
        run(self.steps.forward, values)
        return values[self.steps.output]  # type: ignore[no-any-return]


def split(listing: Listing) -> Prefix | None:
    """Return the prefix of a program that begins with one narrow product, or with frozen factors only; else None."""
    body = listing.activation_steps
    uses = [step for step in body if X in step.operands and not isinstance(step.kernel, Linear)]
    if len(uses) != 1:
        return None
    first = uses[0]
    if not isinstance(first.kernel, Einsum2) or first.operands[0] != X or first.result == Y:
        return None
    kernel, rows, cols = first.kernel, (listing.sizes.token,), listing.layouts[X][1]
    narrow = kernel.out[1] if len(kernel.out) == 2 and kernel.out[0] == rows else ()
    plain = kernel.product and kernel.left == (rows, cols) and {*kernel.summed} == {*cols} and bool(narrow)
    shared = plain and 2 * listing.sizes.volume(narrow) <= listing.sizes.volume(cols)
    chain = [first]
    while _frozen(chain[-1], listing) and not shared:
        following = [step for step in body if chain[-1].result in step.operands]
        if len(following) != 1 or following[0].result == Y or not _frozen(following[0], listing):
            break
        chain += following
    frozen = all(_frozen(step, listing) for step in chain)
    if not shared and not frozen:
        return None
    last = chain[-1].result
    before = [step for step in listing.weight_steps if step.result in listing.below[last]]
    after = [step for step in body if step not in chain]
    weights = {k for step in after for operand in {*step.operands} - listing.active for k in listing.below[operand]}
    moved = {X: WIDE, last: X}
    rest = [step for step in listing.weight_steps if step.result in weights]
    rest += [step._replace(operands=tuple(moved.get(k, k) for k in step.operands)) for step in after]
    layouts = {**listing.layouts, X: listing.layouts[last], WIDE: listing.layouts[X]}
    wide = listing.results[last].elements  # where it is as wide as the input, so may be what is recomputed from it
    matrix = None
    if shared:
        as_rows = Sum(kernel.right, (narrow, cols), listing.sizes)
        steps = [*before, Instruction(as_rows, (first.operands[1],), listing.size)]
        matrix = _part(listing, steps, listing.layouts, listing.size)
    return Prefix(
        tuple(k for k in range(len(listing.trainable)) if FACTORS + k in listing.below[last]),
        matrix,
        _part(listing, [*before, *chain], listing.layouts, last),
        frozen,
        _part(listing, rest, layouts, Y, wide if wide >= listing.width else 0),
    )


def _frozen(step: Instruction, listing: Listing) -> bool:
    """True if the step multiplies what comes from the activations by one frozen factor."""
    factor = step.operands[-1] - FACTORS
    whole = isinstance(step.kernel, Einsum2) and step.operands[0] in listing.active
    return whole and 0 <= factor < len(listing.trainable) and not listing.trainable[factor]


def _part(
    listing: Listing, steps: Sequence[Instruction], layouts: Mapping[int, Layout], output: int, width: int = 0
) -> Listing:
    return Listing(steps, layouts, listing.results, listing.sizes, listing.trainable, width, output)


# ---- running them


@dataclass(eq=False)
class Link:
    """Reference from one program to the projection that it starts from.

    ``reads``: the projection's gradients read its input, which the program's backward pass puts into ``inbox``: it is
    saved once, and each program can run backward on its own. ``keep_alive`` is a pending group.
    """

    prefix: Prefix
    reads: bool
    inbox: list[Tensor]
    keep_alive: Any = None


class SharedProjection(torch.autograd.Function):
    """The narrow results of several prefixes on one input, and the input once more if it needs a gradient.

    The input is not saved: whichever program runs backward brings it. Its gradient from the linears comes in with
    that of the second output and is added to in place.
    """

    @staticmethod
    def forward(ctx: Any, group: ProjectionGroup, inbox: list[Tensor], x: Tensor, *operands: Tensor) -> Any:
        ctx.group, ctx.inbox, (ctx.operands, ctx.again) = group, inbox, kept(operands)  # Parameters
        ctx.set_materialize_grads(False)
        narrow = group.project(x, operands)
        return (*narrow, x) if x.requires_grad else tuple(narrow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, on_x, *on_operands = ctx.needs_input_grad
        group, x = ctx.group, ctx.inbox.pop() if ctx.inbox else None
        narrow, to_x = grads[: len(group.prefixes)], grads[-1] if on_x else None
        if any(grad is not None for grad in narrow):
            operands = restored(ctx.operands, ctx.again)
            to_x, *to_operands = group.gradients(narrow, x, to_x, operands, on_x, on_operands)
        else:
            to_operands = [None] * len(on_operands)
        ctx.inbox.clear()
        return None, None, to_x, *to_operands


class ProjectionGroup:
    """Prefixes of programs that read one input; those with one ``key`` have the same matrix, and one result."""

    def __init__(self, prefixes: Sequence[Prefix], keys: Sequence[Hashable] | None = None) -> None:
        names = [*range(len(prefixes))] if keys is None else [*keys]
        unique = [*dict.fromkeys(names)]
        self.places = [unique.index(key) for key in names]
        self.chosen = [names.index(key) for key in unique]
        self.members = [*prefixes]
        self.prefixes = [prefixes[k] for k in self.chosen]

    def __call__(self, factors: Sequence[Sequence[Tensor]], x: Tensor) -> tuple[Tensor, list[Tensor], list[Link]]:
        """Return the input, each program's narrow result and its link, from all its factors and ``[tokens, inp]``."""
        both = zip(self.chosen, self.prefixes, strict=True)
        operands = [factors[k][place] for k, prefix in both for place in prefix.factors]
        reads = any(operand.requires_grad for operand in operands)
        inbox: list[Tensor] = []
        parts = SharedProjection.apply(self, inbox, x, *operands)
        links = [Link(prefix, reads, inbox) for prefix in self.members]
        return parts[-1] if x.requires_grad else x, [parts[k] for k in self.places], links

    def project(self, x: Tensor, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the narrow result of each prefix."""
        first = self.prefixes[0]
        if first.matrix is None:  # frozen steps of one program
            return [first.registers(first.steps, operands, x)[first.steps.output]]
        matrices = [values[listing.output] for listing, values in self._matrices(operands)]
        result = _columns_first(x, _rows(matrices))
        return [result] if len(matrices) == 1 else result.split_with_sizes([len(matrix) for matrix in matrices], 1)

    def _own(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """Return each prefix's part of the operands, or of something about them."""
        ends = [*accumulate(len(prefix.factors) for prefix in self.prefixes)]
        return [values[end - len(prefix.factors) : end] for prefix, end in zip(self.prefixes, ends, strict=True)]

    def _matrices(self, operands: Sequence[Tensor]) -> list[tuple[Listing, list[Any]]]:
        """Return what computes each prefix's matrix, and the registers after that."""
        found = []
        for prefix, own in zip(self.prefixes, self._own(operands), strict=True):
            assert prefix.matrix is not None  # a group of several consists of such
            found.append((prefix.matrix, prefix.registers(prefix.matrix, own)))
        return found

    def gradients(
        self,
        grads: Sequence[Tensor | None],
        x: Tensor | None,
        to_x: Tensor | None,
        operands: Sequence[Tensor],
        on_x: bool,
        on_operands: Sequence[bool],
    ) -> list[Tensor | None]:
        """Return the gradients of the input, added to ``to_x``, and of the operands, which may read ``x``."""
        if self.prefixes[0].matrix is None:
            return self._chain(grads[0], x, to_x, operands, on_x, on_operands)
        computed = self._matrices(operands)
        pairs = zip(computed, grads, strict=True)
        matrices = [values[listing.output] for (listing, values), grad in pairs if grad is not None]
        inner = _side_by_side([grad for grad in grads if grad is not None])
        parts = None
        if x is not None:
            parts = iter(_columns_first(inner.mT, x.mT).split_with_sizes([len(matrix) for matrix in matrices]))
        to_operands: list[Tensor | None] = []
        for k, ((listing, values), on) in enumerate(zip(computed, self._own(on_operands), strict=True)):
            if parts is None or grads[k] is None:
                to_operands += [None] * len(on)
                continue
            code = self.prefixes[k].code(listing, on)
            values += [None] * (code.total - len(values))
            values[code.size + listing.output] = next(parts)
            run(code.backward, values)
            to_operands += [values[code.size + FACTORS + place] for place in self.prefixes[k].factors]
        if on_x:
            matrix = _rows(matrices)
            if to_x is None:
                to_x = inner @ matrix
            else:  # it comes from linears that keep nothing of it
                to_x = (to_x.addmm if torch.is_grad_enabled() else to_x.addmm_)(inner, matrix)
        return [to_x, *to_operands]

    def _chain(
        self,
        grad: Tensor | None,
        x: Tensor | None,
        to_x: Tensor | None,
        operands: Sequence[Tensor],
        on_x: bool,
        on_operands: Sequence[bool],
    ) -> list[Tensor | None]:
        """Return the gradients of frozen steps of one program."""
        (prefix,) = self.prefixes
        code = prefix.code(prefix.steps, on_operands, on_x)
        values = prefix.registers(prefix.steps, operands, x) + [None] * (code.total - code.size)
        values[code.size + prefix.steps.output], values[code.size + X] = grad, to_x
        run(code.backward, values, inplace=not torch.is_grad_enabled())
        return [values[code.size + X], *[values[code.size + FACTORS + k] for k in prefix.factors]]


def _columns_first(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.T``, a narrow result stored with its narrow side as rows."""
    return (b @ a.mT).mT if b.shape[-2] <= NARROW else a @ b.mT


def _rows(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat([*matrices])


def _side_by_side(grads: Sequence[Tensor]) -> Tensor:
    """Return gradients of narrow results in one matrix, stored as they are: the narrow sides as rows or columns."""
    if len(grads) == 1:
        return grads[0]
    if all(grad.stride(0) == 1 for grad in grads):
        return torch.cat([grad.t() for grad in grads]).t()
    return torch.cat([*grads], dim=1)
