"""The leading steps of programs apart: a first product that several sites share, or one that needs no saved input.

q, k and v read the same hidden states: their products with narrow matrices are one product with the concatenated
matrices, in forward and backward.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnpeft.nn.executor.kernels import NARROW, Einsum2, Instruction, Layout, Linear, View, run, see, view
from tnpeft.nn.executor.listing import FACTORS, WIDE, Listing, X, Y

# ---- the steps


@dataclass(frozen=True, eq=False)
class Prefix:
    """The leading steps on the activations, which end in a narrower result, and the list of all others.

    ``factors`` are the places of those that they read. ``matrix`` computes the matrix ``[narrow, inp]`` of a first
    step that can be shared, which ``see`` shows as such and ``give`` puts back; None where it cannot.
    """

    factors: tuple[int, ...]
    matrix: Listing | None
    see: View | None
    give: View | None
    steps: Listing
    frozen: bool
    rest: Listing

    def registers(self, listing: Listing, own: Sequence[Tensor], total: int = 0) -> list[Any]:
        """Return registers with the prefix's own factors and what a listing computes from them alone."""
        values: list[Any] = [None] * max(total, listing.size)
        for k, factor in zip(self.factors, own, strict=True):
            values[FACTORS + k] = factor
        run(listing.weight_steps, values)
        return values

    def needs(self, on: Sequence[bool], on_x: bool = False) -> tuple[bool, ...]:
        """Return which registers want a gradient if the prefix's own factors do."""
        wanted = {k for k, yes in zip(self.factors, on, strict=True) if yes}
        return (on_x, *[False] * (FACTORS - 1), *[k in wanted for k in range(len(self.steps.trainable))])


def split(listing: Listing) -> Prefix | None:
    """Return the prefix of a program that begins with one narrow product, or with frozen factors only; else None."""
    body = listing.activation_steps
    uses = [step for step in body if X in step.operands and not isinstance(step.kernel, Linear)]
    if len(uses) != 1:
        return None
    first = uses[0]
    if not isinstance(first.kernel, Einsum2) or first.operands[0] != X or first.result == Y:
        return None
    kernel, matrix = first.kernel, first.operands[1]
    rows, cols = ((listing.sizes.token,), listing.layouts[X][1])
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
    moved = {X: WIDE, last: X}
    after = [step for step in body if step not in chain]
    weights = _reached(listing, after)
    after = [step._replace(operands=tuple(moved.get(k, k) for k in step.operands)) for step in after]
    layouts = {**listing.layouts, X: listing.layouts[last], WIDE: listing.layouts[X]}
    wide = listing.results[last].elements  # where it is as wide as the input, so may be what is recomputed from it
    before = _reached(listing, chain)
    factors = {
        k for step in (*before, *chain) for k in step.operands if FACTORS <= k < FACTORS + len(listing.trainable)
    }
    return Prefix(
        tuple(k - FACTORS for k in sorted(factors)),
        _part(listing, before, listing.layouts, matrix) if shared else None,
        view(kernel.right, (narrow, cols), listing.sizes)[0],
        view((narrow, cols), kernel.right, listing.sizes)[0],
        _part(listing, [*before, *chain], listing.layouts, last),
        frozen,
        _part(listing, [*weights, *after], layouts, Y, wide if wide >= listing.width else 0),
    )


def _frozen(step: Instruction, listing: Listing) -> bool:
    """True if the step multiplies what comes from the activations by one frozen factor."""
    factor = step.operands[-1] - FACTORS
    whole = isinstance(step.kernel, Einsum2) and step.operands[0] in listing.active
    return whole and 0 <= factor < len(listing.trainable) and not listing.trainable[factor]


def _reached(listing: Listing, steps: Iterable[Instruction]) -> list[Instruction]:
    """Return the steps on factors alone that the operands of some steps are computed by."""
    needed = {k for step in steps for k in step.operands}
    found = []
    for step in reversed(listing.weight_steps):
        if step.result in needed:
            needed.update(step.operands)
            found.append(step)
    return found[::-1]


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

    def recomputed(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Return the narrow result from the input by operations that autograd sees."""
        values = self.prefix.steps.registers(factors, x)
        run(self.prefix.steps.forward, values)
        return values[self.prefix.steps.output]  # type: ignore[no-any-return]


class SharedProjection(torch.autograd.Function):
    """The narrow results of several prefixes on one input, and the input once more if it needs a gradient.

    The input is not saved: whichever program runs backward brings it. Its gradient from the linears comes in with
    that of the second output and is added to in place.
    """

    @staticmethod
    def forward(ctx: Any, group: ProjectionGroup, inbox: list[Tensor], x: Tensor, *operands: Tensor) -> Any:
        ctx.group, ctx.inbox, ctx.operands = group, inbox, operands  # small, and Parameters mostly
        ctx.set_materialize_grads(False)
        narrow = group.project(x, operands)
        return (*narrow, x) if x.requires_grad else tuple(narrow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, on_x, *on_operands = ctx.needs_input_grad
        group, x = ctx.group, ctx.inbox.pop() if ctx.inbox else None
        narrow, to_x = grads[: len(group.prefixes)], grads[-1] if on_x else None
        if any(grad is not None for grad in narrow):
            to_x, *to_operands = group.gradients(narrow, x, to_x, ctx.operands, on_x, on_operands)
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
        first, steps = self.prefixes[0], self.prefixes[0].steps
        if first.matrix is None:  # frozen steps of one program
            values = first.registers(steps, operands)
            values[X] = x
            run(steps.activation_steps, values)
            return [values[steps.output]]
        matrices = [see(one.see, self._matrix(one, own)[1]) for one, own in self._own(operands)]
        result = _columns_first(x, _rows(matrices))
        return [result] if len(matrices) == 1 else result.split_with_sizes([len(matrix) for matrix in matrices], 1)

    def _own(self, values: Sequence[Any]) -> list[tuple[Prefix, Sequence[Any]]]:
        """Return the prefixes, each with its part of the operands, or of something about them."""
        found, at = [], 0
        for prefix in self.prefixes:
            found.append((prefix, values[at : at + len(prefix.factors)]))
            at += len(prefix.factors)
        return found

    @staticmethod
    def _matrix(prefix: Prefix, own: Sequence[Tensor]) -> tuple[list[Any], Tensor]:
        """Return the registers that a prefix's matrix is computed in, and the matrix."""
        assert prefix.matrix is not None  # a group of several consists of such
        values = prefix.registers(prefix.matrix, own, 2 * prefix.matrix.size)
        return values, values[prefix.matrix.output]

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
        first = self.prefixes[0]
        if first.matrix is None:
            return self._chain(first, grads[0], x, to_x, operands, on_x, on_operands)
        both = zip(self._own(operands), grads, strict=True)
        matrices = [None if grad is None else self._matrix(*own) for own, grad in both]
        seen = [see(p.see, both[1]) for p, both in zip(self.prefixes, matrices, strict=True) if both is not None]
        inner = _side_by_side([grad for grad in grads if grad is not None])
        to_operands: list[Tensor | None] = []
        parts = None
        if x is not None:
            parts = iter(_columns_first(inner.mT, x.mT).split_with_sizes([len(matrix) for matrix in seen]))
        for (prefix, on), both in zip(self._own(on_operands), matrices, strict=True):
            if both is None or parts is None:
                to_operands += [None] * len(on)
                continue
            values, listing = both[0], prefix.matrix
            assert listing is not None  # as above
            code = listing.code(prefix.needs(on))
            values += [None] * (code.total - len(values))
            values[code.size + listing.output] = see(prefix.give, next(parts))
            run(code.backward, values)
            own = [values[code.size + FACTORS + k] for k in prefix.factors]
            to_operands += [grad if yes else None for grad, yes in zip(own, on, strict=True)]
        if on_x:
            matrix = _rows(seen)
            if to_x is None:
                to_x = inner @ matrix
            else:  # it comes from linears that keep nothing of it
                to_x = (to_x.addmm if torch.is_grad_enabled() else to_x.addmm_)(inner, matrix)
        return [to_x, *to_operands]

    @staticmethod
    def _chain(
        prefix: Prefix,
        grad: Tensor | None,
        x: Tensor | None,
        to_x: Tensor | None,
        operands: Sequence[Tensor],
        on_x: bool,
        on_operands: Sequence[bool],
    ) -> list[Tensor | None]:
        steps = prefix.steps
        code = steps.code(prefix.needs(on_operands, on_x))
        values = prefix.registers(steps, operands, code.total)
        if x is not None:
            values[X] = x
            run(steps.activation_steps, values)
        values[code.size + steps.output], values[code.size + X] = grad, to_x
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
