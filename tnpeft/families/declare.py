"""Helpers of declarations: digits of a split, names of bonds, ranks over bonds, factors as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt
from string import ascii_lowercase

from tnpeft.networks import NetworkError
from tnpeft.networks.factor import Group
from tnpeft.networks.sizes import check_size

Rank = int | str  # a whole number, or a rule over sizes such as "min(out, inp)"
Split = Sequence[int | str | None]  # sizes of the digits of a side; None is deduced

STACK = ("layer", "proj")
PAIR: Split = (None, None)
WHOLE: Split = (None,)


def digits(side: str, sizes: Split) -> Group:
    """Names of the digits of a split side: ``o1 o2`` for ``out``; a side that is not split keeps its name.

    >>> digits("out", (32, 64)), digits("inp", (None,))
    (('o1', 'o2'), ('inp',))
    """
    if not sizes:
        raise NetworkError(f"{side}=() names no digit", remedy=f"pass {side}=(None,) to leave this side whole")
    return (side,) if len(sizes) == 1 else tuple(f"{side[0]}{k}" for k in range(1, len(sizes) + 1))


def splits(out: Split = WHOLE, inp: Split = WHOLE) -> dict[str, tuple[int | str | None, ...]]:
    """The ``splits`` of a Factorization: the sides whose digits have sizes of their own.

    >>> splits(out=(32, None))
    {'out': (32, None)}
    """
    given = {"out": tuple(out), "inp": tuple(inp)}
    return {side: sizes for side, sizes in given.items() if any(size is not None for size in sizes)}


def bonds(count: int) -> Group:
    """Names for ``count`` bonds: letters, and numbered ones when they run out.

    >>> bonds(3)
    ('a', 'b', 'c')
    """
    letters = tuple(ascii_lowercase)
    return letters[:count] if count <= len(letters) else tuple(f"r{k}" for k in range(1, count + 1))


def spread(ranks: Rank | Sequence[Rank], names: Sequence[str]) -> dict[str, Rank]:
    """The rank of every bond: one for all, or one each.

    Raises:
        NetworkError: the numbers of ranks and bonds differ.

    >>> spread(8, ("a", "b")), spread((8, 3), ("a", "b"))
    ({'a': 8, 'b': 8}, {'a': 8, 'b': 3})
    """
    if isinstance(ranks, int | str):
        return dict.fromkeys(names, ranks)
    if len(ranks) != len(names):
        raise NetworkError(
            f"{len(ranks)} ranks are given for the {len(names)} bonds {', '.join(names)}",
            remedy="give one rank for all bonds, or one for each",
        )
    return dict(zip(names, ranks, strict=True))


def factor(name: str, *indices: str) -> str:
    """A factor as text, such as ``B[out r]``."""
    return f"{name}[{' '.join(indices)}]"


def line(factors: Iterable[str], stack: Sequence[str], rows: Group, cols: Group) -> str:
    """A line as text, its sides fused where they have several digits.

    >>> line(["A[layer o1 o2 inp]"], ("layer",), ("o1", "o2"), ("inp",))
    'A[layer o1 o2 inp] -> layer (o1 o2) inp'
    """
    groups = (f"({' '.join(group)})" if len(group) > 1 else group[0] for group in (rows, cols))
    return f"{' '.join(factors)} -> {' '.join((*stack, *groups))}"


def separate(stack: Sequence[str], modes: Sequence[str]) -> Group:
    """Return the stack indices that are not modes: every factor carries them, so each value has a tensor of its own.

    Raises:
        NetworkError: a mode is not a stack index.

    >>> separate(("layer", "proj"), ("layer",))
    ('proj',)
    """
    unknown = [mode for mode in modes if mode not in stack]
    if unknown:
        raise NetworkError(f"unknown mode {unknown[0]!r}", remedy=f"choose modes from {', '.join(stack) or 'none'}")
    return tuple(index for index in stack if index not in modes)


def choose(what: str, value: str, options: Iterable[str]) -> str:
    """``value`` if it is one of the options.

    Raises:
        NetworkError: it is not.

    >>> choose("heads", "true", ("true", "interleaved"))
    'true'
    """
    known = tuple(options)
    if value not in known:
        raise NetworkError(f"{what}={value!r} is unknown", remedy=f"use one of {', '.join(known)}")
    return value


def effective(alpha: float | None, rank: Rank, rslora: bool = False) -> float:
    """The effective scale of the alpha rules: alpha/r, or alpha/sqrt(r) (arXiv 2312.03732); no alpha means alpha = r.

    Raises:
        NetworkError: rank or alpha is not such a number, or the scale is to depend on a rank that depends on sizes.

    >>> effective(16, 8), effective(None, 8), effective(16, 4, rslora=True)
    (2.0, 1.0, 8.0)
    """
    if isinstance(rank, int):
        check_size("rank", rank)
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise NetworkError(f"alpha is {alpha!r}", remedy="pass a number, or leave it out")
        return (rank if alpha is None else alpha) / (sqrt(rank) if rslora else rank)
    if alpha is not None or rslora:
        raise NetworkError(
            f"the rank {rank!r} is a rule over sizes, so that alpha over it varies over the sites",
            remedy="pass a whole number as the rank, or leave alpha and rslora out",
        )
    return 1.0
