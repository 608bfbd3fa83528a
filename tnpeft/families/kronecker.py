"""Kronecker and Hadamard: products that multiply ranks, so that few parameters reach a high rank."""

from __future__ import annotations

from tnpeft.families.catalogue import family
from tnpeft.families.declare import PAIR, Rank, Split, choose, effective, splits
from tnpeft.networks import Factorization, NetworkError


@family
def lokr(
    rank: Rank = 8, out: Split = PAIR, inp: Split = PAIR, alpha: float | None = None, zero: str = "C"
) -> Factorization:
    """LoKr: a small matrix, Kronecker a large one of low rank.

    Parameters: ``layer*proj*(o1*i1 + r*(o2 + i2))``.
    Start: ``zero="C"`` as in PEFT, ``zero="Q"`` as in LyCORIS; the others Kaiming. Scale: alpha/r. Where PEFT keeps
    the large matrix whole (r at least half its longer side) the line is krona's.
    Source: arXiv 2309.14859 (line as released, count derived).

    >>> print(lokr().network)
    C[layer proj o1 i1] P[layer proj o2 r] Q[layer proj r i2] -> layer proj (o1 o2) (i1 i2)
    """
    choose("zero", zero, ("C", "Q"))
    return Factorization.of(
        "C[layer proj o1 i1] P[layer proj o2 r] Q[layer proj r i2] -> layer proj (o1 o2) (i1 i2)",
        name="lokr",
        ranks={"r": rank},
        splits=splits(out, inp),
        init={"C": "kaiming", "P": "kaiming", "Q": "kaiming", zero: "zeros"},
        scale=effective(alpha, rank),
        source="arXiv 2309.14859 (line as released, count derived)",
    )


@family
def krona(out: Split = PAIR, inp: Split = PAIR, scale: float = 1.0) -> Factorization:
    """KronA: a Kronecker product of two whole matrices; LoKr with its second factor whole.

    Parameters: ``layer*proj*(o1*i1 + o2*i2)``.
    Start: K zero (as in LyCORIS; KronA's own start unknown), C Kaiming. Scale: a plain number.
    Source: arXiv 2212.10650 (line derived).

    >>> print(krona().network)
    C[layer proj o1 i1] K[layer proj o2 i2] -> layer proj (o1 o2) (i1 i2)
    """
    return Factorization.of(
        "C[layer proj o1 i1] K[layer proj o2 i2] -> layer proj (o1 o2) (i1 i2)",
        name="krona",
        splits=splits(out, inp),
        init={"C": "kaiming", "K": "zeros"},
        scale=scale,
        source="arXiv 2212.10650 (line derived)",
    )


@family
def loha(rank: Rank = 8, alpha: float | None = None) -> Factorization:
    """LoHa: the Hadamard product of two low-rank matrices, of rank up to r squared.

    Parameters: ``layer*proj*(r + s)*(out + inp)``.
    Start: A2 zero, the others Kaiming (as in PEFT). Scale: alpha/r.
    Source: arXiv 2108.06098 (line as released, count printed).

    >>> print(loha().network)
    B1[layer proj out r] A1[layer proj r inp] B2[layer proj out s] A2[layer proj s inp] -> layer proj out inp
    """
    return Factorization.of(
        "B1[layer proj out r] A1[layer proj r inp] B2[layer proj out s] A2[layer proj s inp] -> layer proj out inp",
        name="loha",
        ranks={"r": rank, "s": rank},
        init={"B1": "kaiming", "A1": "kaiming", "B2": "kaiming", "A2": "zeros"},
        scale=effective(alpha, rank),
        source="arXiv 2108.06098 (line as released, count printed)",
    )


@family
def hira(rank: Rank = 8, scale: float = 1.0) -> Factorization:
    """HiRA: the Hadamard product of the base weight and a low-rank matrix.

    Parameters: ``layer*proj*r*(out + inp)``.
    Start: B zero, A Kaiming. No scale in the release.
    Source: OpenReview TwJrTz9cRS (line as released in PEFT, count derived).

    >>> print(hira().network)
    ^W0[layer proj out inp] B[layer proj out r] A[layer proj r inp] -> layer proj out inp
    """
    return Factorization.of(
        "^W0[layer proj out inp] B[layer proj out r] A[layer proj r inp] -> layer proj out inp",
        name="hira",
        ranks={"r": rank},
        init={"W0": "base", "B": "zeros", "A": "kaiming"},
        scale=scale,
        source="OpenReview TwJrTz9cRS (line as released in PEFT, count derived)",
    )


@family
def kradapter(out: Split = PAIR, scale: float = 1.0) -> Factorization:
    """KRAdapter: a column-wise Kronecker (Khatri-Rao) product, of full rank in general.

    Parameters: ``layer*proj*inp*(o1 + o2)``.
    Start: U zero, V by the variance rule (the release's start is unknown). Scale: a plain number.
    Source: arXiv 2508.00230 (line derived, checked against the released layer).

    >>> print(kradapter().network)
    U[layer proj o1 inp] V[layer proj o2 inp] -> layer proj (o1 o2) inp
    """
    return Factorization.of(
        "U[layer proj o1 inp] V[layer proj o2 inp] -> layer proj (o1 o2) inp",
        name="kradapter",
        splits=splits(out),
        init={"U": "zeros"},
        scale=scale,
        source="arXiv 2508.00230 (line derived, checked against the released layer)",
    )


@family
def abba(rank: int = 8, scale: float = 1.0) -> Factorization:
    """ABBA: LoHa at half the rank in each pair, one pair from the base weight: the parameters of LoRA.

    Raises NetworkError if the rank is odd.

    Parameters: ``layer*proj*(r + s)*(out + inp)``.
    Start: B1 and A1 the best approximation of the base weight, B2 zero, A2 Kaiming. Scale: a plain number (our
    choice: the release's rule was not seen).
    Source: arXiv 2505.14238 (line and start secondary).

    >>> print(abba(rank=16).network)
    B1[layer proj out r] A1[layer proj r inp] B2[layer proj out s] A2[layer proj s inp] -> layer proj out inp
    """
    if rank % 2:
        raise NetworkError(f"the rank {rank} is odd", remedy="choose an even rank: each pair gets half of it")
    return Factorization.of(
        "B1[layer proj out r] A1[layer proj r inp] B2[layer proj out s] A2[layer proj s inp] -> layer proj out inp",
        name="abba",
        ranks={"r": rank // 2, "s": rank // 2},
        init={"B1": "svd(0.5)", "A1": "svd(0.5)", "B2": "zeros", "A2": "kaiming"},
        scale=scale,
        source="arXiv 2505.14238 (line and start secondary)",
    )


@family
def glora(rank: Rank = 8, scale: float = 1.0) -> Factorization:
    """GLoRA with low-rank paths: HiRA and LoRA side by side; the paths of the bias are left out.

    Parameters: ``layer*proj*(r + s)*(out + inp)``.
    Start: B1 and B2 zero, A1 and A2 Kaiming. No scale in the release.
    Source: arXiv 2306.07967 (line and start as released in PEFT, count printed).

    >>> print(glora().network)  # doctest: +NORMALIZE_WHITESPACE
    ^W0[layer proj out inp] B1[layer proj out r] A1[layer proj r inp] + B2[layer proj out s] A2[layer proj s inp]
        -> layer proj out inp
    """
    return Factorization.of(
        "^W0[layer proj out inp] B1[layer proj out r] A1[layer proj r inp] + B2[layer proj out s] "
        "A2[layer proj s inp] -> layer proj out inp",
        name="glora",
        ranks={"r": rank, "s": rank},
        init={"W0": "base", "B1": "zeros", "A1": "kaiming", "B2": "zeros", "A2": "kaiming"},
        scale=scale,
        source="arXiv 2306.07967 (line and start as released in PEFT, count printed)",
    )
