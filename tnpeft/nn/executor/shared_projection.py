"""The first product of programs apart, which several sites share.

q, k and v read the same hidden states: their products with narrow matrices are one product with the concatenated
matrices, in forward and backward.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tnpeft.nn.executor.kernels import NARROW, Einsum2, Instruction, Sum, run
from tnpeft.nn.executor.listing import FACTORS, FIRST, Listing, X, Y
from tnpeft.nn.executor.saving import pack, unpack


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first product of a program, with a matrix of few rows, and the list of all other steps.

    ``factors`` are the places of those that the matrix, ``[narrow, inp]``, is made of, which ``matrix`` computes.
    """

    factors: tuple[int, ...]
    matrix: Listing
    rest: Listing

    def registers(self, own: Iterator[Tensor]) -> list[Any]:
        """Return the registers of ``matrix`` after it has run on the next of the factors."""
        values = self.matrix.registers([*islice(own, len(self.factors))])
        run(self.matrix.forward, values)
        return values

    def gradients(self, values: Sequence[Any], on: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
        """Return the gradients of the factors that want one, from registers and the matrix's gradient."""
        code = self.matrix.code((*[False] * FACTORS, *on))
        values = [*values, *[None] * (code.total - code.size)]
        values[code.size + self.matrix.output] = grad
        run(code.backward, values)
        return values[code.size + FACTORS :][: len(on)]


def split(listing: Listing) -> Prefix | None:
    """Return the first product of a program apart; None without one that is at most half as wide as the input."""
    if len(uses := listing.readers(X)) != 1:
        return None
    (first,) = uses
    kernel, rows, volume = first.kernel, (listing.sizes.token,), listing.sizes.volume
    if first.result == Y or not (isinstance(kernel, Einsum2) and kernel.product):
        return None
    if not (len(kernel.left) == len(kernel.out) == 2 and kernel.left[0] == kernel.out[0] == rows):
        return None
    cols, narrow = kernel.left[1], kernel.out[1]
    if {*kernel.summed} != {*cols} or not narrow or 2 * volume(narrow) > volume(cols):
        return None
    made_of = listing.behind({first.operands[1]})
    before = [step for step in listing.weight_steps if step.result in made_of]
    after = [step for step in listing.activation_steps if step is not first]
    weights = listing.behind({k for step in after for k in step.operands} - listing.active)
    rest = [step for step in listing.weight_steps if step.result in weights]
    for step in after:
        rest.append(step._replace(operands=tuple(FIRST if k == first.result else k for k in step.operands)))
    places = [k for k in range(len(listing.trainable)) if FACTORS + k in made_of]
    own = {FACTORS + k: FACTORS + place for place, k in enumerate(places)}
    as_rows = Instruction(Sum(kernel.right, (narrow, cols), listing.sizes), first.operands[1:], listing.size)
    steps = [step._replace(operands=tuple(own.get(k, k) for k in step.operands)) for step in (*before, as_rows)]
    common, trainable = (listing.names, listing.sizes), [listing.trainable[k] for k in places]
    return Prefix(
        tuple(places),
        Listing(steps, *common, trainable, listing.width, listing.size),
        Listing(rest, *common, listing.trainable, listing.width, Y, (*before, first._replace(result=FIRST))),
    )


class SharedProjection(torch.autograd.Function):
    """The narrow results of several prefixes on one input, and the input once more if it needs a gradient.

    The input is not saved, so that each program can run backward on its own: if gradients read it, a program puts it
    into ``x`` of the context in its backward pass. Its gradient from the linears comes in with that of the last
    output and is added to in place.
    """

    @staticmethod
    def forward(ctx: Any, prefixes: Sequence[Prefix], x: Tensor, *operands: Tensor) -> Any:
        ctx.prefixes, ctx.x = prefixes, None
        ctx.operands, ctx.again = pack(operands)  # small, and Parameters mostly
        ctx.set_materialize_grads(False)
        own = iter(operands)
        matrices = [prefix.registers(own)[prefix.matrix.output] for prefix in prefixes]
        narrow = _columns_first(x, _joined(matrices)).split_with_sizes([len(matrix) for matrix in matrices], 1)
        return (*narrow, x) if x.requires_grad else (*narrow,)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, on_x, *on = ctx.needs_input_grad
        x, ctx.x, to_x = ctx.x, None, grads[-1] if on_x else None
        narrow = [grad for grad in grads[: len(ctx.prefixes)] if grad is not None]  # of some programs, perhaps
        if not narrow:
            return None, to_x, *[None] * len(on)
        own = iter(unpack(ctx.operands, ctx.again))
        computed = [(prefix, prefix.registers(own), grad) for prefix, grad in zip(ctx.prefixes, grads, strict=False)]
        matrices = [values[prefix.matrix.output] for prefix, values, grad in computed if grad is not None]
        inner = _beside(narrow)
        if x is not None:
            parts = iter(_columns_first(inner.mT, x.mT).split_with_sizes([len(matrix) for matrix in matrices]))
        to_operands: list[Tensor | None] = []
        for prefix, values, grad in computed:
            wanted = on[len(to_operands) :][: len(prefix.factors)]
            absent = x is None or grad is None
            to_operands += [None] * len(wanted) if absent else prefix.gradients(values, wanted, next(parts))
        if on_x:
            matrix = _joined(matrices)
            if to_x is None:
                to_x = inner @ matrix
            else:  # it comes from linears that keep nothing of it
                to_x = (to_x.addmm if torch.is_grad_enabled() else to_x.addmm_)(inner, matrix)
        return None, to_x, *to_operands


def project(
    prefixes: Sequence[Prefix], factors: Sequence[Sequence[Tensor]], x: Tensor, keys: Sequence[Hashable]
) -> tuple[Tensor, list[Tensor]]:
    """Return an input ``[tokens, inp]`` and the narrow results on it, one for prefixes with the same key and factors.

    ``factors`` are all those of each program.
    """
    unique = [*dict.fromkeys(keys)]
    chosen = [keys.index(key) for key in unique]
    operands = [factors[k][place] for k in chosen for place in prefixes[k].factors]
    parts = SharedProjection.apply([prefixes[k] for k in chosen], x, *operands)
    return parts[-1] if x.requires_grad else x, [parts[unique.index(key)] for key in keys]


def _columns_first(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.T``, a narrow result stored with its narrow side as rows."""
    return (b @ a.mT).mT if b.shape[-2] <= NARROW else a @ b.mT


def _joined(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], axis)


def _beside(grads: Sequence[Tensor]) -> Tensor:
    """Return gradients of narrow results in one matrix, stored as they are: the narrow sides as rows or columns."""
    rows = len(grads) > 1 and all(grad.stride(0) == 1 for grad in grads)
    return _joined([grad.t() for grad in grads]).t() if rows else _joined(grads, 1)
