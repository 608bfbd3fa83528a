"""Hypothesis strategies: networks that mean something, sizes that fit them, factors to fill them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from tnpeft.networks import STACK, Factor, Network, Term
from tnpeft.networks.factor import Kind

Array = NDArray[np.float64]
Item = TypeVar("Item")

_ROWS, _COLS, _BONDS = ("o1", "o2", "o3"), ("i1", "i2", "i3"), ("a", "b", "c", "d")
_MAX_FACTORS, _MAX_TERMS, _MAX_WORK = 6, 3, 1 << 13


@st.composite
def networks(
    draw: st.DrawFn,
    *,
    max_factors: int = _MAX_FACTORS,
    max_terms: int = _MAX_TERMS,
    stack: Sequence[str] = STACK[:2],
    kinds: Sequence[Kind] = ("trainable", "frozen", "constant"),
    tied: bool = False,
    twins: bool = False,
) -> Network:
    """A strategy for networks with rows and columns: sums, groups, hyper and batch indices, scalar factors.

    Args:
        draw: supplied by hypothesis.
        max_factors: factors of all terms together.
        max_terms: terms of the sum.
        stack: stack indices that may stand before the matrix.
        kinds: what the factors may be; at least one factor is trainable.
        tied: let a factor stand twice.
        twins: let the frozen start of the first term be taken off again, as in QuanTA.

    >>> from hypothesis import find
    >>> print(find(networks(), lambda net: len(net.terms) == 2))
    F0[o1 i1] + F1[o1 i1] -> o1 i1
    """
    total = draw(st.integers(1, max_factors))
    count = draw(st.integers(1, min(max_terms, total)))
    cuts = (
        sorted(draw(st.sets(st.integers(1, total - 1), min_size=count - 1, max_size=count - 1))) if count > 1 else []
    )
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    carried = _some(draw, stack)
    rows, cols = (names[: draw(st.integers(1, len(names)))] for names in (_ROWS, _COLS))
    owner = {index: draw(st.integers(0, count - 1)) for index in carried}
    terms = []
    for t, length in enumerate(lengths):
        present = [i for i in carried if owner[i] == t or draw(st.booleans())]
        start = sum(lengths[:t])
        terms.append(_term(draw, t, start, length, [*present, *rows, *cols], kinds))
    if not any(factor.kind == "trainable" for term in terms for factor in term.factors):
        terms[0] = Term((replace(terms[0].factors[0], kind="trainable"), *terms[0].factors[1:]), terms[0].sign)
    if tied and draw(st.booleans()):
        terms = _tie(draw, terms)
    if twins and total + lengths[0] <= max_factors and draw(st.booleans()):
        terms = [*terms, _twin(terms[0])]
    groups = [(index,) for index in draw(st.permutations(carried))]
    return Network(tuple(terms), (*groups, draw(st.permutations(rows).map(tuple)), cols))


def _term(draw: st.DrawFn, place: int, start: int, length: int, outer: Sequence[str], kinds: Sequence[Kind]) -> Term:
    carriers: list[list[str]] = [[] for _ in range(length)]
    for index in outer:
        for f in draw(_holders(length, 1)):
            carriers[f].append(index)
    for index in _some(draw, _BONDS) if length > 1 else ():
        for f in draw(_holders(length, 2)):
            carriers[f].append(index)
    factors = tuple(
        Factor(f"F{start + f}", tuple(draw(st.permutations(indices))), draw(st.sampled_from(kinds)))
        for f, indices in enumerate(carriers)
    )
    return Term(factors, draw(st.sampled_from((1, -1))) if place else 1)


def _holders(length: int, least: int) -> st.SearchStrategy[list[int]]:
    """Which factors of a term carry an index: mostly ``least`` of them, sometimes one or two more."""
    most = st.sampled_from((least, least, least, least + 1, least + 2)).map(lambda n: min(n, length))
    return most.flatmap(lambda n: st.lists(st.integers(0, length - 1), min_size=n, max_size=n, unique=True))


def _some(draw: st.DrawFn, items: Sequence[Item]) -> list[Item]:
    return [item for item in items if draw(st.booleans())]


def _tie(draw: st.DrawFn, terms: list[Term]) -> list[Term]:
    """The terms with one factor replaced by a second use of another one; a trainable factor stays."""
    uses = [factor for term in terms for factor in term.factors]
    pairs = [
        (a, b)
        for k, a in enumerate(uses)
        for b in uses[k + 1 :]
        if len(a.indices) == len(b.indices) and (a.kind == "trainable" or b.kind != "trainable")
    ]
    if not pairs:
        return terms
    first, second = draw(st.sampled_from(pairs))
    again = replace(second, name=first.name, kind=first.kind)
    return [
        Term(tuple(again if factor is second else factor for factor in term.factors), term.sign) for term in terms
    ]


def _twin(term: Term) -> Term:
    """The term with its trainable factors held at their start, and the opposite sign."""
    frozen: dict[Kind, Kind] = {"trainable": "frozen", "frozen": "frozen", "constant": "constant"}
    return Term(tuple(replace(factor, kind=frozen[factor.kind]) for factor in term.factors), -term.sign)


@st.composite
def sizes_for(draw: st.DrawFn, net: Network, *, max_size: int = 4, max_work: int = _MAX_WORK) -> dict[str, int]:
    """A strategy for sizes of every index, size 1 included; uses of one factor get one shape.

    The product of all sizes stays within ``max_work``, so that brute force is quick.

    >>> from hypothesis import find
    >>> from tnpeft.networks import network
    >>> find(sizes_for(network("U[out a] U[inp a] -> out inp")), lambda sizes: sizes["inp"] > 1)
    {'out': 2, 'a': 1, 'inp': 2}
    """
    found: dict[str, int] = {}
    work = max_work
    for members in equal_indices(net):
        limit = max(size for size in range(1, max_size + 1) if size ** len(members) <= work)
        size = draw(st.integers(1, limit))
        work //= size ** len(members)
        found |= dict.fromkeys(members, size)
    return {index: found[index] for index in net.indices}


def equal_indices(net: Network) -> list[list[str]]:
    """The indices in classes that must have one size, because a factor stands twice with different indices.

    >>> from tnpeft.networks import network
    >>> equal_indices(network("U[out a] U[inp a] -> out inp"))
    [['out', 'inp'], ['a']]
    """
    leader = {index: index for index in net.indices}
    first: dict[str, tuple[str, ...]] = {}
    for factor in net.uses():
        for index, other in zip(factor.indices, first.setdefault(factor.name, factor.indices), strict=True):
            old, new = leader[index], leader[other]
            leader = {i: new if chief == old else chief for i, chief in leader.items()}
    classes: dict[str, list[str]] = {}
    for index, chief in leader.items():
        classes.setdefault(chief, []).append(index)
    return list(classes.values())


def factors_for(net: Network, sizes: Mapping[str, int]) -> st.SearchStrategy[dict[str, Array]]:
    """A strategy for standard normal float64 arrays, one per factor label (``~G`` for a frozen twin of ``G``).

    >>> from hypothesis import find
    >>> from tnpeft.networks import network
    >>> line = network("B[out r] A[r inp] -> out inp")
    >>> {k: v.shape for k, v in find(factors_for(line, {"out": 3, "r": 2, "inp": 4}), lambda f: True).items()}
    {'B': (3, 2), 'A': (2, 4)}
    """
    return st.integers(0, 2**32 - 1).map(lambda seed: random_factors(net, sizes, seed))


def random_factors(net: Network, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Standard normal float64 arrays, one per factor label, from a seed.

    >>> from tnpeft.networks import network
    >>> random_factors(network("A[out inp] -> out inp"), {"out": 2, "inp": 3})["A"].shape
    (2, 3)
    """
    generator = np.random.default_rng(seed)
    return {net.label(f): generator.standard_normal([sizes[i] for i in f.indices]) for f in net.factors}
