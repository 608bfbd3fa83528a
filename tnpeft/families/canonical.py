"""Canonical polyadic (CP): sums of rank-one tensors, one hyper-bond through every factor."""

from __future__ import annotations

from collections.abc import Sequence

from tnpeft.families.catalogue import family
from tnpeft.families.declare import (
    PAIR,
    STACK,
    Rank,
    Split,
    choose,
    digits,
    effective,
    factor,
    line,
    separate,
    splits,
)
from tnpeft.networks import Factorization, SiteRule, network

_QKV = "q_proj|k_proj|v_proj|query|key|value|q|k|v|qkv/*|c_attn/*"


@family
def cp(
    rank: Rank = 21,
    out: Split = PAIR,
    inp: Split = PAIR,
    modes: Sequence[str] = (),
    stack: Sequence[str] = STACK,
    unit_norm: bool = True,
    scale: float = 1.0,
) -> Factorization:
    """CP adapters with fine parameter steps: normalised components over split sides, an amplitude for each.

    A stack index in ``modes`` is a mode of the tensor; each value of the others has a tensor of its own.

    Parameters: ``layer*proj*r*(1 + o1 + o2 + i1 + i2)``.
    Start: the amplitudes w zero (the only choice with unit factors), the sides by the variance rule: columns of
    length one. They have unit norm, taken in the forward.
    Source: arXiv 2606.00428 (193 per component at 32 x 64 x 32 x 64 printed, line secondary, start unknown).

    >>> print(cp(rank=21, out=(32, 64), inp=(32, 64)).network)  # doctest: +NORMALIZE_WHITESPACE
    w[layer proj r] A[layer proj o1 r] B[layer proj o2 r] C[layer proj i1 r] D[layer proj i2 r]
        -> layer proj (o1 o2) (i1 i2)
    """
    per, rows, cols = separate(stack, modes), digits("out", out), digits("inp", inp)
    sides = (*rows, *cols, *modes)
    labels = "ABCD" if len(sides) == 4 else [f"U{k}" for k in range(1, len(sides) + 1)]
    factors = [factor(name, *per, mode, "r") for name, mode in zip(labels, sides, strict=True)]
    return Factorization.of(
        line([factor("w", *per, "r"), *factors], stack, rows, cols),
        name="cp",
        ranks={"r": rank},
        splits=splits(out, inp),
        init={"w": "zeros"},
        scale=scale,
        unit_norm=tuple(labels) if unit_norm else (),
        source="arXiv 2606.00428 (193 per component at 32 x 64 x 32 x 64 printed, line secondary, start unknown)",
    )


@family
def lorta(rank: int = 8, heads: str = "inp", per: Sequence[str] = (), alpha: float | None = None) -> Factorization:
    """LoRTA: one CP tensor for the whole model, with modes for heads, projections and layers.

    ``heads="inp"`` splits the input side (the released PEFT fork), ``heads="out"`` the output side (the released
    Lit-GPT fork). ``per=("proj",)`` or ``("layer",)``: the ablation with one tensor for each projection or layer.

    Parameters: ``r*(out + dim + head + proj + layer)``.
    Start: B zero, A uniform on 1/sqrt(r), the gates uniform on sqrt(6/r). Scale: alpha/r.
    Source: arXiv 2410.04060 (lines, start and formula as released; the paper's own orientation unknown).

    >>> print(lorta(rank=4).network)
    A[out r] B[dim r] H[head r] P[proj r] L[layer r] -> layer proj out (head dim)
    >>> print(lorta(heads="out").network)
    A[inp r] B[dim r] H[head r] P[proj r] L[layer r] -> layer proj (head dim) inp
    """
    split_rows = choose("heads", heads, ("inp", "out")) == "out"
    separate(STACK, per)
    modes = {"A": "inp" if split_rows else "out", "B": "dim", "H": "head", "P": "proj", "L": "layer"}
    kept = {name: mode for name, mode in modes.items() if mode not in per}
    split = ("head", "dim")
    gate = f"uniform({(6 / rank) ** 0.5})"
    return Factorization.of(
        line(
            (factor(name, *per, mode, "r") for name, mode in kept.items()),
            STACK,
            split if split_rows else ("out",),
            ("inp",) if split_rows else split,
        ),
        name="lorta",
        ranks={"r": rank},
        init={"A": f"uniform({rank**-0.5})", "B": "zeros", **{name: gate for name in "HPL" if name in kept}},
        scale=effective(alpha, rank),
        source="arXiv 2410.04060 (lines, start and formula as released; the paper's own orientation unknown)",
    )


@family
def cara(rank: Rank = 16, heads: str = _QKV, scale: float = 1.0) -> Factorization:
    """CaRA: one CP tensor for queries, keys and values with their heads, one for all else cut into squares.

    ``heads`` lists the projections of the first line.

    Parameters: ``r*(1 + layer*proj + inp + head + dim)``.
    Parameters: ``r*(1 + layer*proj + inp + out)``.
    Start: A2 and P2 zero, A3, A4 and P3 orthogonal, the weights one, A1 and P1 by the variance rule.
    Scale: a plain number for each data set.
    Source: OpenReview vexHifrbJg (lines as released, which of P2 and P3 is the input side is our reading).

    >>> for line in cara().lines:
    ...     print(line.network)
    w[r] A1[layer proj r] A2[inp r] A3[head r] A4[dim r] -> layer proj (head dim) inp
    v[r] P1[layer proj r] P2[inp r] P3[out r] -> layer proj out inp
    """
    attention = "w[r] A1[layer proj r] A2[inp r] A3[head r] A4[dim r] -> layer proj (head dim) inp"
    return Factorization(
        name="cara",
        lines=(
            SiteRule(network(attention), heads),
            SiteRule(network("v[r] P1[layer proj r] P2[inp r] P3[out r] -> layer proj out inp")),
        ),
        ranks={"r": rank},
        init={
            "w": "ones",
            "v": "ones",
            "A2": "zeros",
            "P2": "zeros",
            "A3": "orthogonal",
            "A4": "orthogonal",
            "P3": "orthogonal",
        },
        scale=scale,
        square=True,
        source="OpenReview vexHifrbJg (lines as released, which of P2 and P3 is the input side is our reading)",
    )
