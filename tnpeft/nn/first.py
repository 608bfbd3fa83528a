"""The first step of a program on its own: where linears read one input, they take theirs together.

Three narrow products of one input are one narrow product, and so are their shares of its gradient. The input is not
kept for that: a linear that sends back a gradient brings along the input, which it keeps anyway. So any of the
linears may be left out, run backward on its own, or be computed again by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tnpeft.nn.flow import Flow, pull
from tnpeft.nn.lower import Body, Lowered
from tnpeft.nn.operations import Product, Side, times
from tnpeft.nn.stages import stages
from tnpeft.nn.units import Norms, all_from_normalised, all_normalised

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
        False,
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


@dataclass(eq=False)
class Link:
    """What ties a linear's operation to the joined product that it starts from.

    ``norms`` are the axes over which the factors that its matrix is made of are normalised. ``reads`` says that the
    product's gradients read the input, which then is to be ``brought`` before they are computed; this place is common
    to all that are joined. ``holder`` is whatever has to live as long as the operation.
    """

    first: First
    norms: Norms | None
    reads: bool
    brought: list[Tensor]
    holder: Any = None

    def own(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """The factors that the matrix is made of, out of all."""
        return [factors[k] for k in self.first.reads]

    def values(self, own: Sequence[Tensor]) -> list[Tensor]:
        """These factors, normalised, and what is made of them."""
        return self.first.values(own if self.norms is None else all_normalised(own, self.norms))

    def gradients(
        self, grad: Tensor, own: Sequence[Tensor], values: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Their gradients from that of the matrix."""
        found = self.first.gradients(grad, values, needs)
        return found if self.norms is None else all_from_normalised(found, own, self.norms)

    def again(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The narrow result computed again."""
        return times(x, self.first.matrix(self.values(self.own(factors))).t())


class _Start(torch.autograd.Function):
    """The products of ``x`` with the matrices of several programs, and ``x`` once more if it needs a gradient."""

    @staticmethod
    def forward(ctx: Any, links: Sequence[Link], x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.links, ctx.operands = links, operands  # the operands are small, and there anyway
        ctx.set_materialize_grads(False)
        both = zip(links, _parts(links, operands), strict=True)
        matrices = [link.first.matrix(link.values(own)) for link, own in both]
        parts = times(x, _rows(matrices).t()).split([len(matrix) for matrix in matrices], dim=1)
        return (*parts, x) if x.requires_grad else parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        links: Sequence[Link] = ctx.links
        _, on_x, *on_operands = ctx.needs_input_grad
        to_x = grads[-1] if on_x else None
        live = {k: grad for k, grad in enumerate(grads[: len(links)]) if grad is not None}
        found: list[list[Tensor | None]] = [[None] * len(link.first.reads) for link in links]
        if live:
            operands, needs = _parts(links, ctx.operands), _parts(links, on_operands)
            values = {k: links[k].values(operands[k]) for k in live}
            inner, brought = _side_by_side([*live.values()]), links[0].brought
            if brought:
                parts = times(inner.t(), brought.pop()).split([grad.shape[1] for grad in live.values()])
                for k, part in zip(live, parts, strict=True):
                    found[k] = links[k].gradients(part, operands[k], values[k], needs[k])
            if on_x:
                matrix = _rows([links[k].first.matrix(values[k]) for k in live])
                if to_x is None:
                    to_x = inner @ matrix
                else:  # it comes from linears that keep nothing of it
                    to_x = (to_x.addmm if torch.is_grad_enabled() else to_x.addmm_)(inner, matrix)
        links[0].brought.clear()
        return None, to_x, *(grad for its in found for grad in its)


def _parts(links: Sequence[Link], operands: Sequence[Any]) -> list[list[Any]]:
    """The operands of each program."""
    parts, at = [], 0
    for link in links:
        parts.append([*operands[at : at + len(link.first.reads)]])
        at += len(link.first.reads)
    return parts


def _rows(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat([*matrices])


def _side_by_side(grads: Sequence[Tensor]) -> Tensor:
    """Gradients of narrow results in one matrix, stored as they are: with the narrow sides as rows or as columns."""
    if all(grad.stride(0) == 1 for grad in grads):
        return _rows([grad.t() for grad in grads]).t()
    return grads[0] if len(grads) == 1 else torch.cat([*grads], dim=1)


@dataclass(frozen=True, eq=False)
class Source:
    """What one of the joined first steps is made of: a program's step, all its factors, and their normalisation.

    Those with one ``key`` have the very same matrix, and one product serves them.
    """

    first: First
    factors: Sequence[Tensor]
    norms: Norms | None = None
    key: Hashable = None


@dataclass(frozen=True, eq=False)
class Started:
    """The input ``[tokens, inp]``, and for each program its narrow product and its link to it."""

    x: Tensor
    narrow: tuple[Tensor, ...]
    links: tuple[Link, ...]


def start(sources: Sequence[Source], x: Tensor) -> Started:
    """Take the first steps of several programs on one input ``[tokens, inp]``.

    >>> from tnpeft import network
    >>> from tnpeft.nn.execute import program
    >>> run = program(network("B[out r] A[r inp] -> out inp"), {"out": 5, "r": 1, "inp": 4})
    >>> factors = [torch.ones(5, 1), torch.ones(1, 4, requires_grad=True)]
    >>> begun = start([Source(run.first, factors, key="A"), Source(run.first, factors, key="A")], torch.ones(3, 4))
    >>> begun.narrow[0] is begun.narrow[1], begun.narrow[0].T
    (True, tensor([[4., 4., 4.]], grad_fn=<PermuteBackward0>))
    """
    chosen: dict[Hashable, int] = {}
    for k, source in enumerate(sources):
        chosen.setdefault(source.key if source.key is not None else k, k)
    read = [[sources[k].factors[place] for place in sources[k].first.reads] for k in chosen.values()]
    reads = any(tensor.requires_grad for own in read for tensor in own)
    brought: list[Tensor] = []
    links = [
        Link(its.first, None if its.norms is None else [its.norms[k] for k in its.first.reads], reads, brought)
        for its in sources
    ]
    joined = [replace(links[k]) for k in chosen.values()]  # the others may get a holder, which may hold the product
    parts = _Start.apply(joined, x, *(tensor for own in read for tensor in own))
    places = {key: place for place, key in enumerate(chosen)}
    at = [places[k if source.key is None else source.key] for k, source in enumerate(sources)]
    return Started(parts[-1] if x.requires_grad else x, tuple(parts[place] for place in at), tuple(links))
