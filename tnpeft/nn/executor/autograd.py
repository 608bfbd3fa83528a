"""Two autograd functions: a site's program with its frozen linear, and a first product that several sites share.

The update is accumulated into the linear's own output and its input gradient into the linear's, so that no full-width
result is written twice. q, k and v read the same hidden states: their products with narrow matrices are one product
with the concatenated matrices, in forward and backward.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnpeft.nn.executor.eligibility import autocast_active
from tnpeft.nn.executor.kernels import NARROW, _see, run
from tnpeft.nn.executor.listing import Code, Listing
from tnpeft.nn.executor.prefix import Prefix

_Grads = tuple[Tensor | None, ...]
_PLAIN = nullcontext()


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


class ProgramFunction(torch.autograd.Function):
    """A program on ``x``, or on the result of its prefix with the linear's input ``wide``, added to the linear.

    Without a weight it is added to ``base``, out of place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        code: Code,
        scale: float,
        link: Link | None,
        x: Tensor,
        wide: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.code, ctx.scale, ctx.link, ctx.autocast = code, scale, link, None if weight is not None else _autocast(x)
        values = [*factors, x, wide, weight, bias, base, *[None] * (code.size - code.at.results)]
        run(code.forward, values, scale, inplace=ctx.autocast is None)
        brought = wide if link is not None and link.reads else None
        ctx.save_for_backward(*factors, *[values[k] for k in code.saved], brought)
        return values[code.at.y]  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Grads:  # type: ignore[override]
        code, scale, link, at = ctx.code, ctx.scale, ctx.link, ctx.code.at
        *saved, brought = ctx.saved_tensors
        twice = torch.is_grad_enabled()  # then what is computed here is differentiated in its turn
        values: list[Any] = [None] * code.total
        values[: at.factors] = factors = saved[: at.factors]
        for k, value in zip(code.saved, saved[at.factors :], strict=True):
            if not twice or k < at.results:
                values[k] = value
        if twice and brought is not None:
            values[at.x] = link.recomputed(brought, factors)
        values[code.size + at.y] = grad
        with _PLAIN if ctx.autocast is None else torch.autocast(*ctx.autocast):
            run(code.values if twice else code.recomputed, values, scale)
            run(code.backward, values, scale, inplace=not twice and ctx.autocast is None)
        if link is not None:
            link.keep_alive = None  # whoever has not come yet begins again
            if link.reads:
                link.inbox[:] = [brought]
        grads = values[code.size :]
        return None, None, None, *grads[at.x : at.y], grad if ctx.needs_input_grad[7] else None, *grads[: at.factors]


def apply(
    listing: Listing,
    scale: float,
    factors: Sequence[Tensor],
    x: Tensor,
    wide: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    link: Link | None = None,
) -> Tensor:
    """Return the result of a program, ``[tokens, out]``, by the instructions for the gradients that are wanted."""
    needs = tuple([tensor is not None and tensor.requires_grad for tensor in (*factors, x, wide, weight, bias)])
    code = listing.traced_code(needs) if torch.compiler.is_compiling() else listing.code(needs)
    result: Tensor = ProgramFunction.apply(code, scale, link, x, wide, weight, bias, base, *factors)
    return result


def _autocast(x: Tensor) -> tuple[str, torch.dtype] | None:
    kind = x.device.type
    return (kind, torch.get_autocast_dtype(kind)) if autocast_active(kind) else None


# ---- the shared projection


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
    def backward(ctx: Any, *grads: Tensor | None) -> _Grads:
        _, _, on_x, *on_operands = ctx.needs_input_grad
        x = ctx.inbox.pop() if ctx.inbox else None
        count = len(ctx.group.prefixes)
        to_x = grads[count] if on_x else None
        to_x, to_operands = ctx.group.gradients(grads[:count], x, to_x, ctx.operands, on_x, on_operands)
        ctx.inbox.clear()
        return None, None, to_x, *to_operands


class ProjectionGroup:
    """Prefixes of programs that read one input; those with one ``key`` have the same matrix, and one result."""

    def __init__(self, prefixes: Sequence[Prefix], keys: Sequence[Hashable] | None = None) -> None:
        unique: dict[Hashable, int] = {}
        names = [*range(len(prefixes))] if keys is None else keys
        for k, key in enumerate(names):
            unique.setdefault(key, k)
        order = {key: place for place, key in enumerate(unique)}
        self.places = [order[key] for key in names]
        self.chosen = [*unique.values()]
        self.members = [*prefixes]
        self.prefixes = [prefixes[k] for k in self.chosen]
        self.slices: list[slice] = []
        at = 0
        for prefix in self.prefixes:
            self.slices.append(slice(at, at + len(prefix.factors)))
            at += len(prefix.factors)

    def __call__(self, factors: Sequence[Sequence[Tensor]], x: Tensor) -> tuple[Tensor, list[Tensor], list[Link]]:
        """Return the input, each program's narrow result and its link, from all its factors and ``[tokens, inp]``."""
        both = zip(self.chosen, self.prefixes, strict=True)
        operands = [factors[k][place] for k, prefix in both for place in prefix.factors]
        reads = any(operand.requires_grad for operand in operands)
        inbox: list[Tensor] = []
        parts = SharedProjection.apply(self, inbox, x, *operands)
        links = [Link(prefix, reads, inbox) for prefix in self.members]
        return parts[-1] if x.requires_grad else x, [parts[k] for k in self.places], links

    def _values(self, place: int, listing: Listing, operands: Sequence[Tensor], total: int) -> list[Any]:
        """Registers with a prefix's own factors and what is computed from them."""
        values: list[Any] = [None] * total
        for k, operand in zip(self.prefixes[place].factors, operands[self.slices[place]], strict=True):
            values[k] = operand
        run(listing.weight_steps, values)
        return values

    def project(self, x: Tensor, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the narrow result of each prefix."""
        first = self.prefixes[0]
        if first.matrix is None:  # frozen steps of one program
            values = self._values(0, first.steps, operands, first.steps.size)
            values[first.steps.at.x] = x
            run(first.steps.activation_steps, values)
            return [values[first.steps.output]]
        matrices = self._matrices(range(len(self.prefixes)), operands)[1]
        sizes = [len(matrix) for matrix in matrices]
        result = _columns_first(x, _rows(matrices))
        return [result] if len(sizes) == 1 else result.split_with_sizes(sizes, 1)

    def _matrices(self, places: Sequence[int], operands: Sequence[Tensor]) -> tuple[list[list[Any]], list[Tensor]]:
        found = []
        for place in places:
            listing = self.prefixes[place].matrix
            assert listing is not None  # a group of several consists of such
            found.append(self._values(place, listing, operands, 2 * listing.size))
        return found, [
            _see(self.prefixes[place].see, values[self.prefixes[place].matrix.output])  # type: ignore[union-attr]
            for place, values in zip(places, found, strict=True)
        ]

    def gradients(
        self,
        grads: Sequence[Tensor | None],
        x: Tensor | None,
        to_x: Tensor | None,
        operands: Sequence[Tensor],
        on_x: bool,
        on_operands: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of the input, added to ``to_x``, and of the operands, which may read ``x``."""
        found: list[Tensor | None] = [None] * len(operands)
        places = [place for place, grad in enumerate(grads) if grad is not None]
        if not places:
            return to_x, found
        first = self.prefixes[0]
        if first.matrix is None:
            return self._chain(grads[0], x, to_x, operands, on_x, on_operands)
        registers, matrices = self._matrices(places, operands)
        inner = _side_by_side([grad for grad in grads if grad is not None])
        if x is not None:
            whole = _columns_first(inner.mT, x.mT)
            for place, values, part in zip(
                places, registers, whole.split_with_sizes([len(matrix) for matrix in matrices]), strict=True
            ):
                prefix, own = self.prefixes[place], self.slices[place]
                listing, on = prefix.matrix, on_operands[own]
                assert listing is not None  # as above
                code = listing.code(self._needs(prefix, on, False))
                values += [None] * (code.total - len(values))
                values[code.size + listing.output] = _see(prefix.give, part)
                run(code.backward, values)
                found[own] = [
                    values[code.size + k] if yes else None for k, yes in zip(prefix.factors, on, strict=True)
                ]
        if on_x:
            matrix = _rows(matrices)
            if to_x is None:
                to_x = inner @ matrix
            else:  # it comes from linears that keep nothing of it
                to_x = (to_x.addmm if torch.is_grad_enabled() else to_x.addmm_)(inner, matrix)
        return to_x, found

    def _chain(
        self,
        grad: Tensor | None,
        x: Tensor | None,
        to_x: Tensor | None,
        operands: Sequence[Tensor],
        on_x: bool,
        on_operands: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        prefix = self.prefixes[0]
        steps = prefix.steps
        code = steps.code(self._needs(prefix, on_operands, on_x))
        values = self._values(0, steps, operands, code.total)
        if x is not None:
            values[steps.at.x] = x
            run(steps.activation_steps, values)
        values[code.size + steps.output] = grad
        values[code.size + steps.at.x] = to_x
        run(code.backward, values, inplace=not torch.is_grad_enabled())
        return values[code.size + steps.at.x], [values[code.size + k] for k in prefix.factors]

    @staticmethod
    def _needs(prefix: Prefix, on: Sequence[bool], on_x: bool) -> tuple[bool, ...]:
        at = prefix.steps.at
        wanted = {k for k, yes in zip(prefix.factors, on, strict=True) if yes}
        return (*[k in wanted for k in range(at.factors)], on_x, False, False, False)


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
