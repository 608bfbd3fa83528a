"""Published chains: LoRETTA, TT-LoRA, MetaTT and TensorGuide, each a tensor train laid in its own order."""

from __future__ import annotations

from collections.abc import Sequence

from tnpeft.families.catalogue import family
from tnpeft.families.declare import STACK, Rank, Split, bonds, digits, effective, line, splits, spread
from tnpeft.families.trains import chain
from tnpeft.networks import Factorization

_FOUR: Split = (None,) * 4


@family
def loretta(
    rank: int = 8,
    bottleneck: tuple[int, int, int] = (2, 2, 2),
    out: Split = _FOUR,
    inp: Split = _FOUR,
    alpha: float | None = None,
) -> Factorization:
    """LoRETTA_rep: both sides of LoRA as tensor trains; the bottleneck is cut into three digits a, b, c.

    One core of each half holds the last feature digit and the first bottleneck digit, as in the release.

    Parameters: ``layer*proj*(i1*w + w*i2*x + x*i3*y + y*i4*a*z + z*b*c
    + a*b*d + d*c*o1*e + e*o2*f + f*o3*g + g*o4)``.
    Start: B5 zero, the rest by the variance rule (the paper prints none). Scale: alpha over the bottleneck.
    Source: arXiv 2402.11417 (line derived from the release, order of the second half our reading).

    >>> print(loretta().network)  # doctest: +NORMALIZE_WHITESPACE
    A1[layer proj i1 w] A2[layer proj w i2 x] A3[layer proj x i3 y] A4[layer proj y i4 a z] A5[layer proj z b c]
        B1[layer proj a b d] B2[layer proj d c o1 e] B3[layer proj e o2 f] B4[layer proj f o3 g] B5[layer proj g o4]
        -> layer proj (o1 o2 o3 o4) (i1 i2 i3 i4)
    """
    halves = (
        *chain([("i1",), ("i2",), ("i3",), ("i4", "a"), ("b", "c")], "wxyz", STACK, "A"),
        *chain([("a", "b"), ("c", "o1"), ("o2",), ("o3",), ("o4",)], "defg", STACK, "B"),
    )
    a, b, c = bottleneck
    return Factorization.of(
        line(halves, STACK, digits("out", (None,) * 4), digits("inp", (None,) * 4)),
        name="loretta",
        ranks={**dict.fromkeys("wxyzdefg", rank), "a": a, "b": b, "c": c},
        splits=splits(out, inp),
        init={"B5": "zeros"},
        scale=effective(alpha, a * b * c),
        source="arXiv 2402.11417 (line derived from the release, order of the second half our reading)",
    )


@family
def tt_lora(
    ranks: Rank | Sequence[Rank] = 5, out: Split = _FOUR, inp: Split = _FOUR, alpha: float = 1.0, zero: bool = False
) -> Factorization:
    """TT-LoRA: one tensor train for the whole update, input digits first and in reverse order.

    Parameters: ``layer*proj*(i4*a + a*i3*b + b*i2*c + c*i1*d + d*o1*e + e*o2*f + f*o3*g + g*o4)``.
    Start: every core Kaiming, so the update is **not zero**; ``zero=True`` zeroes the last. Scale: alpha itself.
    Source: arXiv 2408.01008 (line and start as released, count derived).

    >>> print(tt_lora(out=(None, None), inp=(None, None)).network)  # doctest: +NORMALIZE_WHITESPACE
    C1[layer proj i2 a] C2[layer proj a i1 b] C3[layer proj b o1 c] C4[layer proj c o2]
        -> layer proj (o1 o2) (i1 i2)
    """
    rows, cols = digits("out", out), digits("inp", inp)
    sides = [(side,) for side in (*reversed(cols), *rows)]
    names = bonds(len(sides) - 1)
    labels = [f"C{k}" for k in range(1, len(sides) + 1)]
    return Factorization.of(
        line(chain(sides, names, STACK, "C"), STACK, rows, cols),
        name="tt_lora",
        ranks=spread(ranks, names),
        splits=splits(out, inp),
        init={**dict.fromkeys(labels, "kaiming"), **({labels[-1]: "zeros"} if zero else {})},
        scale=alpha,
        source="arXiv 2408.01008 (line and start as released, count derived)",
    )


@family
def metatt_4d(ranks: Rank | Sequence[Rank] = 8, alpha: float = 1.0) -> Factorization:
    """MetaTT-4D: one tensor train for the whole model, from input over layer and projection to output.

    Parameters: ``inp*a + a*layer*b + b*proj*c + c*out``.
    Start: the output end zero, the rest by the variance rule (the paper's start is unknown). Scale: alpha.
    Source: arXiv 2506.09105 (line and counts derived, no code known).

    >>> print(metatt_4d().network)
    G1[inp a] G2[layer a b] G3[proj b c] G4[c out] -> layer proj out inp
    """
    return Factorization.of(
        "G1[inp a] G2[layer a b] G3[proj b c] G4[c out] -> layer proj out inp",
        name="metatt_4d",
        ranks=spread(ranks, ("a", "b", "c")),
        init={"G4": "zeros"},
        scale=alpha,
        source="arXiv 2506.09105 (line and counts derived, no code known)",
    )


@family
def metatt_5d(ranks: Rank | Sequence[Rank] = 8, alpha: float = 1.0) -> Factorization:
    """MetaTT-5D: MetaTT-4D with a core for the attention heads of the output side.

    Parameters: ``inp*a + a*layer*b + b*proj*c + c*head*d + d*dim``.
    Start: the output end zero, the rest by the variance rule (the paper's start is unknown). Scale: alpha.
    Source: arXiv 2506.09105 (line and counts derived, no code known).

    >>> print(metatt_5d().network)
    G1[inp a] G2[layer a b] G3[proj b c] G4[head c d] G5[d dim] -> layer proj (head dim) inp
    """
    return Factorization.of(
        "G1[inp a] G2[layer a b] G3[proj b c] G4[head c d] G5[d dim] -> layer proj (head dim) inp",
        name="metatt_5d",
        ranks=spread(ranks, ("a", "b", "c", "d")),
        init={"G5": "zeros"},
        scale=alpha,
        source="arXiv 2506.09105 (line and counts derived, no code known)",
    )


@family
def tensor_guide(rank: int = 8, bond: int = 8, noise: int = 8, alpha: float | None = None) -> Factorization:
    """TensorGuide-like: one tensor train, fed with frozen noise at every site, emits both factors of a LoRA.

    The source says that two correlated low-rank matrices come from one tensor train driven by Gaussian noise; its
    split and its cores are not known. **Our reading**: the cores G1 and G2 serve both factors (each stands twice);
    U and V are the ends that turn their signal into rows and columns.

    Parameters: ``n*a + a*m*b + b*out + d*inp``.
    Start: U zero (a zero in a core that stands twice would be a dead start), the rest by the variance rule.
    Scale: alpha/r.
    Source: arXiv 2506.16456 (abstract printed, line our reading).

    >>> print(tensor_guide().network)  # doctest: +NORMALIZE_WHITESPACE
    ~Y[layer proj r n m] G1[n a] G2[a m b] U[b out] ~Z[layer proj r p q] G1[p c] G2[c q d] V[d inp]
        -> layer proj out inp
    """
    return Factorization.of(
        "~Y[layer proj r n m] G1[n a] G2[a m b] U[b out] ~Z[layer proj r p q] G1[p c] G2[c q d] V[d inp]"
        " -> layer proj out inp",
        name="tensor_guide",
        ranks={"r": rank, "n": noise, "m": noise, "a": bond, "b": bond, "p": "n", "q": "m", "c": "a", "d": "b"},
        init={"Y": "normal(1)", "Z": "normal(1)", "U": "zeros"},
        scale=effective(alpha, rank),
        source="arXiv 2506.16456 (abstract printed, line our reading)",
    )
