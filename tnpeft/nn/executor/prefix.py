"""The leading steps of a program apart from the others: what can be shared, or needs no saved input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tnpeft.nn.executor.kernels import Einsum2, Instruction, Layout, Linear, View, view
from tnpeft.nn.executor.listing import Listing


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
