"""The mean square of an update's first signed step: products of factors averaged over their random entries, exactly.

Entries of a factor that are not all equal count as independent normal numbers, and so do the signs of a step. The
mean of a product is then the sum over all ways to pair equal factors (Isserlis), each pairing identifying the
indices of the two; a factor with all entries equal comes out of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tnpeft.networks import Network
from tnpeft.networks.sizes import Size


@dataclass(frozen=True)
class Entry:
    """The entries of a factor at the start: mean square as stored, in the forward pass, of a unit step of its signs.

    ``value`` is what all entries are, None where they differ.
    """

    stored: Size
    square: Size
    value: float | None = None
    step: Size = 1.0


@dataclass(frozen=True)
class _Use:
    """A factor in a product: what it is equal to, its mean square, its indices."""

    tag: str
    square: Size
    value: float | None
    indices: tuple[str, ...]


Product = tuple[int, tuple[_Use, ...]]  # with its sign


def first_step(
    net: Network, sizes: Mapping[str, Size], entries: Mapping[str, Entry], scale: Size = 1.0
) -> dict[str, Size]:
    """Return by label the mean square that a unit signed step of each trained factor gives to an entry of the update.

    ``scale`` is the update's.

    A factor moves where the others of its term are not zero. Factors move by independent signs, so that what several
    of them do adds up.

    >>> from tnpeft.networks import network
    >>> net = network("B[out r] A[r inp] -> out inp")
    >>> first_step(net, {"out": 8, "r": 2, "inp": 4}, {"B": Entry(0.0, 0.0, 0.0), "A": Entry(0.25, 0.25)})
    {'B': 0.5}
    """
    moved: dict[str, list[Product]] = {}
    for term in net.terms:
        for place, mover in enumerate(term.factors):
            rest = [factor for k, factor in enumerate(term.factors) if k != place]
            if mover.kind != "trainable" or any(entries[net.label(factor)].square == 0 for factor in rest):
                continue
            step = _Use("step of " + mover.name, entries[mover.name].step, None, mover.indices)
            uses = [_Use(f.name, e.square, e.value, f.indices) for f in rest for e in [entries[net.label(f)]]]
            moved.setdefault(mover.name, []).append((term.sign, (step, *uses)))
    return {label: scale**2 * _square(products, net, sizes) for label, products in moved.items()}


def _square(products: Sequence[Product], net: Network, sizes: Mapping[str, Size]) -> Size:
    """The mean over the entries of the update of the mean square of a sum of products."""
    total: Size = 0.0
    for i, one in enumerate(products):
        for j, other in enumerate(products[: i + 1]):
            total = total + (2 if j < i else 1) * _mean(one, other, net, sizes)
    return total


def _mean(one: Product, other: Product, net: Network, sizes: Mapping[str, Size]) -> Size:
    apart = {bond: f"{bond}'" for bond in net.bonds}
    uses = [*one[1], *(_Use(u.tag, u.square, u.value, tuple(apart.get(i, i) for i in u.indices)) for u in other[1])]
    weight: Size = one[0] * other[0]
    groups: dict[str, list[_Use]] = {}
    for use in uses:
        if use.value is not None:
            weight = weight * use.value
        else:
            groups.setdefault(use.tag, []).append(use)
    if any(len(group) % 2 for group in groups.values()):
        return 0.0
    for group in groups.values():
        for use in group[::2]:
            weight = weight * use.square
    free = dict.fromkeys([*net.outer, *(index for use in uses for index in use.indices)])
    total: Size = 0.0
    for pairing in _pairings([*groups.values()]):
        total = total + _entries(free, pairing, net, sizes)
    return weight * total


def _pairings(groups: Sequence[Sequence[_Use]]) -> Iterator[list[tuple[_Use, _Use]]]:
    """All ways to pair the members of every group."""
    left = [group for group in groups if group]
    if not left:
        yield []
        return
    first, *others = left[0]
    for k, partner in enumerate(others):
        rest = [*others[:k], *others[k + 1 :]]
        for pairs in _pairings([rest, *left[1:]]):
            yield [(first, partner), *pairs]


def _entries(
    free: Mapping[str, None], pairing: Sequence[tuple[_Use, _Use]], net: Network, sizes: Mapping[str, Size]
) -> Size:
    """The number of values that the indices take once pairs agree, for each entry of the update."""
    leader = {index: index for index in free}

    def find(index: str) -> str:
        while leader[index] != index:
            index = leader[index]
        return index

    for one, other in pairing:
        for a, b in zip(one.indices, other.indices, strict=True):
            leader[find(a)] = find(b)
    classes: dict[str, list[str]] = {}
    for index in free:
        classes.setdefault(find(index), []).append(index)
    count: Size = 1.0
    for members in classes.values():
        outer = [index for index in members if index in net.outer]
        if not outer:
            count = count * sizes[members[0].rstrip("'")]
        for index in outer[1:]:
            count = count / sizes[index]
    return count
