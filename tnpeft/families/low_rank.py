"""Low rank: a product of thin matrices at every site, and what some of them share or freeze."""

from __future__ import annotations

from tnpeft.families.catalogue import family
from tnpeft.families.declare import Rank, effective
from tnpeft.networks import Factorization, NetworkError


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


@family
def mica(rank: Rank = 8, alpha: float | None = None) -> Factorization:
    """MiCA: LoRA with the output side frozen at the base weight's left singular vectors of the least values.

    Parameters: ``layer*proj*r*inp``.
    Start: A zero. Scale: alpha/r.
    Source: arXiv 2604.01694 (line and start as released in PEFT, count printed).

    >>> print(mica().network)
    ^B[layer proj out r] A[layer proj r inp] -> layer proj out inp
    """
    return Factorization.of(
        "^B[layer proj out r] A[layer proj r inp] -> layer proj out inp",
        name="mica",
        ranks={"r": rank},
        init={"B": "svd_minor(0)", "A": "zeros"},
        scale=effective(alpha, rank),
        source="arXiv 2604.01694 (line and start as released in PEFT, count printed)",
    )


@family
def stella(rank: Rank = 8, alpha: float | None = None) -> Factorization:
    """StelLA: MoSLoRA's line with orthonormal sides.

    The release keeps the sides orthonormal in its optimizer; here they are so at the start only.

    Parameters: ``layer*proj*(a*out + a*b + b*inp)``.
    Start: U and V orthonormal, S the identity, so the update is **not zero**. Scale: alpha/r.
    Source: arXiv 2510.01938 (line and start secondary, count derived).

    >>> print(stella().network)
    U[layer proj out a] S[layer proj a b] V[layer proj b inp] -> layer proj out inp
    """
    return Factorization.of(
        "U[layer proj out a] S[layer proj a b] V[layer proj b inp] -> layer proj out inp",
        name="stella",
        ranks={"a": rank, "b": rank},
        init={"U": "orthogonal", "S": "eye", "V": "orthogonal"},
        scale=effective(alpha, rank),
        source="arXiv 2510.01938 (line and start secondary, count derived)",
    )


@family
def rasa(rank: int = 8, shared: int = 1, alpha: float | None = None) -> Factorization:
    """RaSA: of each layer's rank a part is its own, a part goes into a pool that all layers use.

    ``shared`` ranks of every layer make the pool, ``rank - shared`` stay; both are weighted by a vector at each site.
    Raises NetworkError unless ``shared`` is between 1 and ``rank - 1``.

    Parameters: ``layer*proj*(a*(out + 1 + inp) + c) + proj*c*(out + inp)``.
    Start: B and U zero, the rest by the variance rule (the release's start was not seen). Scale: alpha/r.
    Source: arXiv 2503.12576 (line derived, the extent of the sharing secondary).

    >>> print(rasa().network)  # doctest: +NORMALIZE_WHITESPACE
    B[layer proj out a] d[layer proj a] A[layer proj a inp] + U[proj out c] e[layer proj c] V[proj c inp]
        -> layer proj out inp
    """
    if not 0 < shared < rank:
        raise NetworkError(f"shared={shared} of the rank {rank}", remedy=f"choose between 1 and {rank - 1}")
    return Factorization.of(
        "B[layer proj out a] d[layer proj a] A[layer proj a inp] + U[proj out c] e[layer proj c] V[proj c inp] "
        "-> layer proj out inp",
        name="rasa",
        ranks={"a": rank - shared, "c": f"{shared} * layer"},
        init={"B": "zeros", "U": "zeros"},
        scale=effective(alpha, rank),
        source="arXiv 2503.12576 (line derived, the extent of the sharing secondary)",
    )


@family
def pera(rank: Rank = 8, alpha: float | None = None) -> Factorization:
    """PERA: LoRA and the entrywise squares of its columns and rows, weighted; squares at no further matrix.

    The release has cross terms of different columns too: the same with one more pair of factors.

    Parameters: ``layer*proj*r*(out + inp + 1)``.
    Start: B zero, A Kaiming, h ones (our choice). Scale: alpha/r.
    Source: arXiv 2604.11841 (line secondary, count derived).

    >>> print(pera().network)  # doctest: +NORMALIZE_WHITESPACE
    B[layer proj out r] A[layer proj r inp]
        + h[layer proj r] B[layer proj out r] B[layer proj out r] A[layer proj r inp] A[layer proj r inp]
        -> layer proj out inp
    """
    pair = "B[layer proj out r] A[layer proj r inp]"
    square = "h[layer proj r] B[layer proj out r] B[layer proj out r] A[layer proj r inp] A[layer proj r inp]"
    return Factorization.of(
        f"{pair} + {square} -> layer proj out inp",
        name="pera",
        ranks={"r": rank},
        init={"B": "zeros", "A": "kaiming", "h": "ones"},
        scale=effective(alpha, rank),
        source="arXiv 2604.11841 (line secondary, count derived)",
    )
