"""Trees and circuits: hierarchical Tucker, and gates over pairs of digits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from tnpeft.families.catalogue import family
from tnpeft.families.declare import PAIR, STACK, Rank, Split, bonds, digits, factor, line, separate, splits, spread
from tnpeft.networks import Factorization
from tnpeft.networks.factor import Group


@family
def hierarchical_tucker(
    ranks: Rank | Sequence[Rank] = 4,
    out: Split = PAIR,
    inp: Split = PAIR,
    modes: Sequence[str] = (),
    stack: Sequence[str] = STACK,
    scale: float = 1.0,
) -> Factorization:
    """Hierarchical Tucker: a balanced binary tree over modes, rows and columns, with a matrix at every leaf.

    A stack index in ``modes`` is a leaf of the tree; each value of the others has a tensor of its own. Neighbours are
    joined in pairs, level by level, until two nodes are left for the root.

    Parameters: ``layer*proj*(o1*a + o2*b + i1*c + i2*d + a*b*e + c*d*f + e*f)``.
    Start: the root R zero, the rest by the variance rule.
    Source: textbook form (derived).

    >>> print(hierarchical_tucker(stack=()).network)
    U1[o1 a] U2[o2 b] U3[i1 c] U4[i2 d] T1[a b e] T2[c d f] R[e f] -> (o1 o2) (i1 i2)
    """
    per, rows, cols = separate(stack, modes), digits("out", out), digits("inp", inp)
    leaves = (*modes, *rows, *cols)
    names = bonds(2 * len(leaves) - 2)
    factors = [factor(f"U{k + 1}", *per, leaf, names[k]) for k, leaf in enumerate(leaves)]
    level, fresh, node = list(names[: len(leaves)]), iter(names[len(leaves) :]), 0
    while len(level) > 2:
        parents = []
        for left, right in zip(level[::2], level[1::2], strict=False):
            node += 1
            parents.append(next(fresh))
            factors.append(factor(f"T{node}", *per, left, right, parents[-1]))
        level = parents + level[2 * len(parents) :]
    return Factorization.of(
        line([*factors, factor("R", *per, *level)], stack, rows, cols),
        name="hierarchical_tucker",
        ranks=spread(ranks, names),
        splits=splits(out, inp),
        init={"R": "zeros"},
        scale=scale,
        source="textbook form (derived)",
    )


@family
def quanta(out: Split = (None,) * 3, inp: Split = (None,) * 3, scale: float = 1.0) -> Factorization:
    """QuanTA: a circuit of gates, one for every pair of digits, minus its frozen start.

    Gates run over the pairs from the last digits to the first; a digit has its column size until its last gate gives
    it its row size (so that rectangular matrices need no padding, unlike in the release).

    Parameters: ``layer*proj*(a*b*i2*i3 + c*o3*i1*b + o1*o2*c*a)``.
    Start: Kaiming; the difference from the frozen twin is zero. No scale in the release.
    Source: arXiv 2406.00132 (line as released, counts derived).

    >>> print(quanta().network)  # doctest: +NORMALIZE_WHITESPACE
    G32[layer proj a b i2 i3] G31[layer proj c o3 i1 b] G21[layer proj o1 o2 c a]
        - ~G32[layer proj a b i2 i3] ~G31[layer proj c o3 i1 b] ~G21[layer proj o1 o2 c a]
        -> layer proj (o1 o2 o3) (i1 i2 i3)
    """
    rows, cols = digits("out", out), digits("inp", inp)
    gates, ranks = _circuit(rows, cols)
    factors = [factor(name, *STACK, *legs) for name, legs in gates.items()]
    return Factorization.of(
        line([*factors, "-", *(f"~{text}" for text in factors)], STACK, rows, cols),
        name="quanta",
        ranks=ranks,
        splits=splits(out, inp),
        init=dict.fromkeys(gates, "kaiming"),
        scale=scale,
        source="arXiv 2406.00132 (line as released, counts derived)",
    )


def _circuit(rows: Group, cols: Group) -> tuple[dict[str, Group], dict[str, str]]:
    """The legs of every gate (two new, two old), and each inner bond's size: that of its digit's column index."""
    count = len(cols)
    pairs = sorted(combinations(range(count), 2), key=lambda pair: (-pair[1], -pair[0]))
    fresh = iter(bonds(count * (count - 2)))
    wires, left = list(cols), [count - 1] * count
    gates: dict[str, Group] = {}
    sizes: dict[str, str] = {}
    for low, high in pairs:
        old = (wires[low], wires[high])
        for digit in (low, high):
            left[digit] -= 1
            wires[digit] = next(fresh) if left[digit] else rows[digit]
            if left[digit]:
                sizes[wires[digit]] = cols[digit]
        gates[f"G{high + 1}{low + 1}"] = (wires[low], wires[high], *old)
    return gates, sizes
