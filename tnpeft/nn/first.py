"""The first step of a program on its own: where linears read one input, they take theirs together.

Three narrow products of one input are one narrow product, and so are their shares of its gradient. The input is not
kept for that: a linear that sends back a gradient brings along the input, which it keeps anyway. So any of the
linears may be left out, run backward on its own, or be computed again by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnpeft.nn.flow import Flow, pull
from tnpeft.nn.lower import Body, Lowered
from tnpeft.nn.operations import Product, Side, times, times_rows
from tnpeft.nn.stages import stages
from tnpeft.nn.units import Norms, Units

_NARROW = 2  # how many times narrower than the input a result is that is worth sharing


@dataclass(frozen=True, eq=False)
class First:
    """The product of the activations with one matrix, ``[narrow, inp]``, and the program of all that follows.

    ``reads`` are the places of the factors that the matrix is made of; ``steps`` make it of these, and it stands at
    ``place`` among them and the steps' results, seen from ``side``.
    """

    reads: tuple[int, ...]
    steps: Body
    place: int
    side: Side
    rest: Flow

    def values(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The factors that the matrix is made of, and what is made of them."""
        values = [*operands]
        for operation, a, b in self.steps:
            values.append(operation(values[a], values[b]))
        return values

    def matrix(self, values: Sequence[Tensor]) -> Tensor:
        """The matrix itself."""
        return self.side.see(values[self.place])

    def gradients(self, grad: Tensor, values: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of the factors from that of the matrix; ``needs`` says which are wanted."""
        wanted = [*needs]
        for _, a, b in self.steps:
            wanted.append(wanted[a] or wanted[b])
        grads: list[Tensor | None] = [None] * len(values)
        grads[self.place] = self.side.give(grad) if wanted[self.place] else None
        for place, (operation, a, b) in reversed([*enumerate(self.steps, start=len(self.reads))]):
            if (part := grads[place]) is not None:
                pull(grads, operation, a, b, part, 1.0, values, (wanted[a], wanted[b]))
        return grads[: len(self.reads)]


def first(lowered: Lowered, factors: Sequence[int], rows: int) -> First | None:
    """The first step of a program; None if the activations go elsewhere than into one narrow product.

    ``factors`` has the elements of each trainable factor, 0 for the others.

    >>> from tnpeft import network, plan
    >>> from tnpeft.nn.lower import lower
    >>> net = network("w[r] B[out r] A[r inp] -> out inp")
    >>> p = plan(net, out=64, inp=99, r=2, tokens=99, base=None)
    >>> found = first(lower(p, ("w", "B", "A")), (2, 128, 198), 64)
    >>> found.reads, len(found.steps), len(found.rest.stages.weights)
    ((2,), 0, 1)
    """
    x = len(factors)
    body = dict(enumerate(lowered.body, start=x + 1))
    uses = [place for place, item in body.items() if x in item[1:]]
    if len(uses) != 1 or any(x in item[1:] for item in lowered.tail):
        return None
    (at,) = uses
    operation, left, matrix = body[at]
    narrow = lowered.facts[at - x - 1].elements
    if not isinstance(operation, Product) or left != x or operation.left.shape != (-1, lowered.width):
        return None
    if _NARROW * narrow > lowered.width:
        return None
    own, after = _below(body, [matrix], at), _below(body, [k for item in lowered.tail for k in item[1:]], at)
    reads = tuple(sorted(place for place in own if place < x))
    before = {place: k for k, place in enumerate([*reads, *sorted(own - {*reads})])}
    then = {place: k for k, place in enumerate([*range(x), at, *sorted(k for k in after if k > x and k != at)])}
    rest = Lowered(
        tuple((f, then[a], then[b]) for place, (f, a, b) in body.items() if place in after and place != at),
        tuple((f, then[a], then[b]) for f, a, b in lowered.tail),
        tuple(fact for place, fact in zip(body, lowered.facts, strict=True) if place in after and place != at),
        narrow,
        lowered.tokens,
        None,
    )
    steps = tuple((f, before[a], before[b]) for place, (f, a, b) in body.items() if place in own)
    flow = Flow(stages(rest, factors, whole=False), rows, [size > 0 for size in factors])
    return First(reads, steps, before[matrix], operation.right, flow)


def _below(body: Any, places: Sequence[int], stop: int) -> set[int]:
    """The places and all that they are computed from, down to ``stop``."""
    found: set[int] = set()
    pending = [*places]
    while pending:
        place = pending.pop()
        if place not in found:
            found.add(place)
            pending += body[place][1:] if place in body and place != stop else ()
    return found


@dataclass(frozen=True, eq=False)
class Share:
    """A program's share in a joined first step: the axes over which the factors that its matrix is made of are
    normalised, and which of all operands these factors are."""

    first: First
    norms: Norms | None
    own: slice

    def made(self, operands: Sequence[Tensor]) -> Made:
        """The matrix, made of its factors among all operands."""
        own = operands[self.own]
        units = None if self.norms is None else Units(own, self.norms)
        return Made(self, units, self.first.values(own if units is None else units.factors))

    def again(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The narrow result computed again, from all factors of the program."""
        own = [factors[k] for k in self.first.reads]
        values = self.first.values(own if self.norms is None else Units(own, self.norms).factors)
        return times_rows(x, self.first.matrix(values))


@dataclass(frozen=True, eq=False)
class Made:
    """The matrix of a share, with all that it was made from."""

    share: Share
    units: Units | None
    values: list[Tensor]

    @property
    def matrix(self) -> Tensor:
        """The matrix itself."""
        return self.share.first.matrix(self.values)

    def gradients(self, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of the factors from that of the matrix."""
        found = self.share.first.gradients(grad, self.values, needs)
        return found if self.units is None else self.units.gradients(found)


@dataclass(eq=False)
class Link:
    """What ties a linear's operation to the joined product that it starts from.

    ``reads`` says that the product's gradients read the input, which then is to be ``brought`` before they are
    computed; this place is common to all that are joined. ``holder`` is what has to live as long as the operation.
    """

    share: Share
    reads: bool
    brought: list[Tensor]
    holder: Any = None


class _Start(torch.autograd.Function):
    """The products of ``x`` with the matrices of several programs, and ``x`` once more if it needs a gradient."""

    @staticmethod
    def forward(ctx: Any, shares: Sequence[Share], brought: Any, x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.shares, ctx.brought, ctx.operands = shares, brought, operands  # the operands are small, and there anyway
        ctx.set_materialize_grads(False)
        matrices = [share.made(operands).matrix for share in shares]
        if len(matrices) == 1:
            parts = [times_rows(x, matrices[0])]
        else:
            parts = times_rows(x, torch.cat(matrices)).split_with_sizes([len(matrix) for matrix in matrices], 1)
        return (*parts, x) if x.requires_grad else tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operands, brought = ctx.operands, ctx.brought
        _, _, on_x, *on_operands = ctx.needs_input_grad
        to_x = grads[-1] if on_x else None
        live = [(share, grad) for share, grad in zip(ctx.shares, grads, strict=False) if grad is not None]
        found: list[Tensor | None] = [None] * len(operands)
        if live:
            made = [share.made(operands) for share, _ in live]
            inner = _side_by_side([grad for _, grad in live])
            if brought:
                parts = times(inner.t(), brought.pop()).split_with_sizes([grad.shape[1] for _, grad in live])
                for its, part in zip(made, parts, strict=True):
                    found[its.share.own] = its.gradients(part, on_operands[its.share.own])
            if on_x:
                matrix = _rows([its.matrix for its in made])
                if to_x is None:
                    to_x = inner @ matrix
                else:  # it comes from linears that keep nothing of it
                    to_x = (to_x.addmm if torch.is_grad_enabled() else to_x.addmm_)(inner, matrix)
        brought.clear()
        return None, None, to_x, *found


def _rows(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat([*matrices])


def _side_by_side(grads: Sequence[Tensor]) -> Tensor:
    """Gradients of narrow results in one matrix, stored as they are: with the narrow sides as rows or as columns."""
    if len(grads) == 1:
        return grads[0]
    if all(grad.stride(0) == 1 for grad in grads):
        return torch.cat([grad.t() for grad in grads]).t()
    return torch.cat([*grads], dim=1)


@dataclass(frozen=True, eq=False)
class Source:
    """One of the first steps that are joined: a program's, and the axes over which its factors are normalised.

    Those with one ``key`` have the very same matrix, and one product serves them.
    """

    first: First
    norms: Norms | None = None
    key: Hashable = None


@dataclass(frozen=True, eq=False)
class Started:
    """The input ``[tokens, inp]``, and for each program its narrow product and its link to it."""

    x: Tensor
    narrow: tuple[Tensor, ...]
    links: tuple[Link, ...]


class Joint:
    """The first steps of several programs on one input as one step.

    >>> from tnpeft import network
    >>> from tnpeft.nn.execute import program
    >>> run = program(network("B[out r] A[r inp] -> out inp"), {"out": 5, "r": 1, "inp": 4}, tokens=1)
    >>> factors = [torch.ones(5, 1), torch.ones(1, 4, requires_grad=True)]
    >>> started = Joint([Source(run.first, key="A")] * 2)([factors, factors], torch.ones(3, 4))
    >>> started.narrow[0] is started.narrow[1], started.narrow[0].T
    (True, tensor([[4., 4., 4.]], grad_fn=<PermuteBackward0>))
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        chosen: dict[Hashable, int] = {}
        for k, source in enumerate(sources):
            chosen.setdefault(k if source.key is None else source.key, k)
        places = {key: place for place, key in enumerate(chosen)}
        self._places = [places[k if source.key is None else source.key] for k, source in enumerate(sources)]
        self._chosen = [*chosen.values()]
        self._shares: list[Share] = []
        at = 0
        for source in (sources[k] for k in self._chosen):
            reads, norms = source.first.reads, source.norms
            own = slice(at, at + len(reads))
            self._shares.append(Share(source.first, None if norms is None else [norms[k] for k in reads], own))
            at = own.stop

    def __call__(self, factors: Sequence[Sequence[Tensor]], x: Tensor) -> Started:
        """Take the steps, of programs with all these factors, on the input ``[tokens, inp]``."""
        both = zip(self._chosen, self._shares, strict=True)
        operands = [factors[k][place] for k, share in both for place in share.first.reads]
        reads = any(operand.requires_grad for operand in operands)
        brought: list[Tensor] = []
        parts = _Start.apply(self._shares, brought, x, *operands)
        links = tuple(Link(self._shares[place], reads, brought) for place in self._places)
        return Started(parts[-1] if x.requires_grad else x, tuple(parts[place] for place in self._places), links)
