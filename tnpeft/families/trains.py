"""Chains: tensor trains, rings and trains of matrices over any digits and stack indices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from tnpeft.families.catalogue import family
from tnpeft.families.declare import (
    PAIR,
    STACK,
    Rank,
    Split,
    bonds,
    digits,
    factor,
    line,
    separate,
    splits,
    spread,
)
from tnpeft.networks import Factorization, NetworkError


def chain(
    carried: Sequence[Sequence[str]], names: Sequence[str], per: Sequence[str] = (), label: str = "G"
) -> list[str]:
    """Factors of a chain: the k-th holds its own indices between the bonds to its neighbours.

    With as many bonds as factors the chain closes to a ring.

    >>> chain([["o1"], ["o2"], ["inp"]], ["a", "b"])
    ['G1[o1 a]', 'G2[a o2 b]', 'G3[b inp]']
    """
    ring = len(names) == len(carried)
    left = [(names[-1],) if ring else (), *((bond,) for bond in names)]
    right = [*((bond,) for bond in names), ()]
    return [factor(f"{label}{k + 1}", *per, *left[k], *own, *right[k]) for k, own in enumerate(carried)]


def _of_digits(
    name: str,
    ranks: Rank | Sequence[Rank],
    out: Split,
    inp: Split,
    modes: Sequence[str],
    stack: Sequence[str],
    scale: float,
    *,
    closed: bool,
) -> Factorization:
    """A chain with one digit or mode at each factor, ``closed`` to a ring or not."""
    per, rows, cols = separate(stack, modes), digits("out", out), digits("inp", inp)
    sides = [(side,) for side in (*rows, *modes, *cols)]
    names = bonds(len(sides) - (not closed))
    return Factorization.of(
        line(chain(sides, names, per), stack, rows, cols),
        name=name,
        ranks=spread(ranks, names),
        splits=splits(out, inp),
        init={"G1": "zeros"},
        scale=scale,
        source="textbook form (derived)",
    )


@family
def tensor_train(
    ranks: Rank | Sequence[Rank] = 8,
    out: Split = PAIR,
    inp: Split = PAIR,
    modes: Sequence[str] = (),
    stack: Sequence[str] = STACK,
    scale: float = 1.0,
) -> Factorization:
    """Tensor train: a chain over the digits of the rows, the modes of the stack and the digits of the columns.

    A stack index in ``modes`` is a mode of the tensor; each value of the others has a tensor of its own.

    Parameters: ``layer*proj*(o1*a + a*o2*b + b*i1*c + c*i2)``.
    Start: the first factor zero, the rest by the variance rule.
    Source: textbook form (derived).

    >>> print(tensor_train().network)
    G1[layer proj o1 a] G2[layer proj a o2 b] G3[layer proj b i1 c] G4[layer proj c i2] -> layer proj (o1 o2) (i1 i2)
    >>> print(tensor_train(out=(None,), inp=(None,), modes=["layer", "proj"]).network)
    G1[out a] G2[a layer b] G3[b proj c] G4[c inp] -> layer proj out inp
    """
    return _of_digits("tensor_train", ranks, out, inp, modes, stack, scale, closed=False)


@family
def tensor_ring(
    ranks: Rank | Sequence[Rank] = 4,
    out: Split = PAIR,
    inp: Split = PAIR,
    modes: Sequence[str] = (),
    stack: Sequence[str] = STACK,
    scale: float = 1.0,
) -> Factorization:
    """Tensor ring: a tensor train whose ends are joined; options as for :func:`tensor_train`.

    Parameters: ``layer*proj*(d*o1*a + a*o2*b + b*i1*c + c*i2*d)``.
    Start: the first factor zero, the rest by the variance rule.
    Source: textbook form (derived).

    >>> print(tensor_ring().network)  # doctest: +NORMALIZE_WHITESPACE
    G1[layer proj d o1 a] G2[layer proj a o2 b] G3[layer proj b i1 c] G4[layer proj c i2 d]
        -> layer proj (o1 o2) (i1 i2)
    """
    return _of_digits("tensor_ring", ranks, out, inp, modes, stack, scale, closed=True)


@family
def tt_matrix(
    ranks: Rank | Sequence[Rank] = 8,
    out: Split = PAIR,
    inp: Split = PAIR,
    modes: Sequence[str] = (),
    stack: Sequence[str] = STACK,
    scale: float = 1.0,
) -> Factorization:
    """Tensor train of matrices (MPO): a chain whose factors each hold a row digit and a column digit.

    Stack indices in ``modes`` stand at the head of the chain, one factor each.

    Parameters: ``layer*proj*(o1*i1*a + a*o2*i2)``.
    Start: the first factor zero, the rest by the variance rule.
    Source: textbook form (derived).

    >>> print(tt_matrix().network)
    G1[layer proj o1 i1 a] G2[layer proj a o2 i2] -> layer proj (o1 o2) (i1 i2)
    """
    per, rows, cols = separate(stack, modes), digits("out", out), digits("inp", inp)
    pairs = [tuple(filter(None, pair)) for pair in zip_longest(rows, cols)]
    sides = [*((mode,) for mode in modes), *pairs]
    names = bonds(len(sides) - 1)
    return Factorization.of(
        line(chain(sides, names, per), stack, rows, cols),
        name="tt_matrix",
        ranks=spread(ranks, names),
        splits=splits(out, inp),
        init={"G1": "zeros"},
        scale=scale,
        source="textbook form (derived)",
    )


@family
def dota(
    ranks: Rank | Sequence[Rank] = 8, out: Split = (None,) * 3, inp: Split = (None,) * 3, scale: float = 1.0
) -> Factorization:
    """DoTA: a train of matrices that starts at the one of the base weight, minus its frozen start.

    Parameters: ``layer*proj*(o1*i1*a + a*o2*i2*b + b*o3*i3)``.
    Start: the TT-SVD of the base weight; the difference from the frozen twin is zero.
    Source: arXiv 2412.20891 (line derived, no code known).

    >>> print(dota(out=(None, None), inp=(None, None)).network)  # doctest: +NORMALIZE_WHITESPACE
    G1[layer proj o1 i1 a] G2[layer proj a o2 i2] - ~G1[layer proj o1 i1 a] ~G2[layer proj a o2 i2]
        -> layer proj (o1 o2) (i1 i2)
    """
    rows, cols = digits("out", out), digits("inp", inp)
    if len(rows) != len(cols):
        raise NetworkError(
            f"{len(rows)} row digits and {len(cols)} column digits", remedy="give both sides as many digits"
        )
    names = bonds(len(rows) - 1)
    factors = chain(list(zip(rows, cols, strict=True)), names, STACK)
    return Factorization.of(
        line([*factors, "-", *(f"~{text}" for text in factors)], STACK, rows, cols),
        name="dota",
        ranks=spread(ranks, names),
        splits=splits(out, inp),
        init={f"G{k}": "tt_svd" for k in range(1, len(rows) + 1)},
        scale=scale,
        source="arXiv 2412.20891 (line derived, no code known)",
    )


@family
def lora_edge(
    ranks: Rank | Sequence[Rank] = (8, 8, 2), kernel: Sequence[int] | None = None, scale: float = 1.0
) -> Factorization:
    """LoRA-Edge: a chain over a convolution's kernel of which the output core alone is trained.

    ``kernel`` is its height and width where no layer tells; a linear is a kernel of one tap. In the release the chain
    is the base kernel's own at the start, but for the output core.

    Parameters: ``layer*proj*out*a``.
    Start: G1 zero; the release takes the frozen cores from a TT-SVD of the kernel, here they are orthonormal at
    random (our choice).
    Source: arXiv 2511.03765 (line derived from the abstract, where it is printed in words).

    >>> print(lora_edge().network)  # doctest: +NORMALIZE_WHITESPACE
    G1[layer proj out a] ^G2[layer proj a inp b] ^G3[layer proj b kh c] ^G4[layer proj c kw]
        -> layer proj out (inp kh kw)
    """
    return Factorization.of(
        "G1[layer proj out a] ^G2[layer proj a inp b] ^G3[layer proj b kh c] ^G4[layer proj c kw] "
        "-> layer proj out (inp kh kw)",
        name="lora_edge",
        ranks=spread(ranks, ("a", "b", "c")),
        splits={} if kernel is None else splits(inp=(None, *kernel)),
        init={"G1": "zeros", "G2": "orthogonal", "G3": "orthogonal", "G4": "orthogonal"},
        scale=scale,
        source="arXiv 2511.03765 (line derived from the abstract, where it is printed in words)",
    )
