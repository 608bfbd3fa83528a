"""Low rank: a product of thin matrices at every site, and what some of them share or freeze."""

from __future__ import annotations

from tnpeft.families.catalogue import family
from tnpeft.families.declare import Rank, effective
from tnpeft.networks import Factorization


@family
def lora(rank: Rank = 8, alpha: float | None = None, rslora: bool = False) -> Factorization:
    """LoRA: two thin matrices at every site.

    Parameters: ``layer*proj*r*(out + inp)``.
    Start: B zero, A Kaiming. Scale: alpha/r, with ``rslora`` alpha/sqrt(r).
    Source: arXiv 2106.09685 (line and start printed).

    >>> print(lora(rank=4).network)
    B[layer proj out r] A[layer proj r inp] -> layer proj out inp
    """
    return Factorization.of(
        "B[layer proj out r] A[layer proj r inp] -> layer proj out inp",
        name="lora",
        ranks={"r": rank},
        init={"B": "zeros", "A": "kaiming"},
        scale=effective(alpha, rank, rslora),
        source="arXiv 2106.09685 (line and start printed)",
    )


@family
def lora_fa(rank: Rank = 8, alpha: float | None = None) -> Factorization:
    """LoRA-FA: LoRA with the input side frozen at its random start.

    Parameters: ``layer*proj*r*out``.
    Start: B zero, A Kaiming. Scale: alpha/r.
    Source: arXiv 2308.03303 (line derived, count printed).

    >>> print(lora_fa().network)
    B[layer proj out r] ~A[layer proj r inp] -> layer proj out inp
    """
    return Factorization.of(
        "B[layer proj out r] ~A[layer proj r inp] -> layer proj out inp",
        name="lora_fa",
        ranks={"r": rank},
        init={"B": "zeros", "A": "kaiming"},
        scale=effective(alpha, rank),
        source="arXiv 2308.03303 (line derived, count printed)",
    )


@family
def lora_xs(rank: Rank = 16, alpha: float | None = None) -> Factorization:
    """LoRA-XS: a small square matrix between the leading singular vectors of the base weight.

    Parameters: ``layer*proj*a*b``.
    Start: R normal with spread 1e-5, so the update is small but **not zero**. Scale: alpha/r.
    Source: arXiv 2405.17604 (line and start as released, count derived).

    >>> print(lora_xs().network)
    ^U[layer proj out a] R[layer proj a b] ^V[layer proj b inp] -> layer proj out inp
    """
    return Factorization.of(
        "^U[layer proj out a] R[layer proj a b] ^V[layer proj b inp] -> layer proj out inp",
        name="lora_xs",
        ranks={"a": rank, "b": rank},
        init={"U": "svd", "V": "svd", "R": "normal(1e-5)"},
        scale=effective(alpha, rank),
        source="arXiv 2405.17604 (line and start as released, count derived)",
    )


@family
def moslora(rank: Rank = 8, alpha: float | None = None) -> Factorization:
    """MoSLoRA: LoRA with a trained mixer between its two sides; the same updates as LoRA.

    Parameters: ``layer*proj*(a*out + a*b + b*inp)``.
    Start: B zero, M and A Kaiming. Scale: alpha/r.
    Source: arXiv 2406.11909 (line derived).

    >>> print(moslora().network)
    B[layer proj out a] M[layer proj a b] A[layer proj b inp] -> layer proj out inp
    """
    return Factorization.of(
        "B[layer proj out a] M[layer proj a b] A[layer proj b inp] -> layer proj out inp",
        name="moslora",
        ranks={"a": rank, "b": rank},
        init={"B": "zeros", "M": "kaiming", "A": "kaiming"},
        scale=effective(alpha, rank),
        source="arXiv 2406.11909 (line derived)",
    )


@family
def nola(rank: Rank = 8, basis: Rank = 64, alpha: float | None = None) -> Factorization:
    """NOLA: each side of LoRA a trained combination of frozen random matrices that all sites share.

    Parameters: ``layer*proj*(m + n)``.
    Start: x zero, the rest by the variance rule (our choice: the released offset of A is left out). Scale: alpha/r.
    Source: arXiv 2310.02556 (line derived).

    >>> print(nola().network)
    x[layer proj m] ~Bb[m out a] y[layer proj n] ~Ab[n a inp] -> layer proj out inp
    """
    return Factorization.of(
        "x[layer proj m] ~Bb[m out a] y[layer proj n] ~Ab[n a inp] -> layer proj out inp",
        name="nola",
        ranks={"m": basis, "n": basis, "a": rank},
        init={"x": "zeros"},
        scale=effective(alpha, rank),
        source="arXiv 2310.02556 (line derived)",
    )
