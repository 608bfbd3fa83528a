"""Blocks: structured matrices whose blocks are low-rank, shared, circulant or permuted."""

from __future__ import annotations

from tnpeft.families.catalogue import family
from tnpeft.families.declare import PAIR, Rank, Split, effective, splits
from tnpeft.networks import Factorization, NetworkError, SiteRule, network


@family
def gralora(rank: int = 8, k: int = 2, alpha: float | None = None) -> Factorization:
    """GraLoRA: k x k blocks, each a LoRA of rank r/k; the parameters of LoRA and up to k times its rank.

    Parameters: ``layer*proj*o1*i1*a*(o2 + i2)``.
    Start: B zero, A Kaiming. Scale: alpha/r. Raises NetworkError if k does not divide the rank.
    Source: arXiv 2505.20355 (line as released in PEFT, count derived).

    >>> print(gralora(rank=8, k=2).network)
    B[layer proj o1 i1 a o2] A[layer proj o1 i1 a i2] -> layer proj (o1 o2) (i1 i2)
    """
    if rank % k:
        raise NetworkError(f"k={k} does not divide the rank {rank}", remedy="choose a multiple of k as the rank")
    return Factorization.of(
        "B[layer proj o1 i1 a o2] A[layer proj o1 i1 a i2] -> layer proj (o1 o2) (i1 i2)",
        name="gralora",
        ranks={"a": rank // k},
        splits=splits((k, None), (k, None)),
        init={"B": "zeros", "A": "kaiming"},
        scale=effective(alpha, rank),
        source="arXiv 2505.20355 (line as released in PEFT, count derived)",
    )


@family
def miss(rank: int = 8, scale: float = 1.0) -> Factorization:
    """MiSS: one block of r columns, repeated along the input side.

    Parameters: ``layer*proj*out*i2`` with ``i2 = r``.
    Start: D zero. No scale in the release. The number of input features has to be a multiple of the rank.
    Source: arXiv 2409.15371 (line as released in PEFT, count derived).

    >>> print(miss().network)
    D[layer proj out i2] ^J[i1] -> layer proj out (i1 i2)
    """
    return Factorization.of(
        "D[layer proj out i2] ^J[i1] -> layer proj out (i1 i2)",
        name="miss",
        splits=splits(inp=(None, rank)),
        init={"D": "zeros", "J": "ones"},
        scale=scale,
        source="arXiv 2409.15371 (line as released in PEFT, count derived)",
    )


@family
def c3a(block: Rank = "gcd(out, inp, 64)", zero: bool = False, scale: float = 0.01) -> Factorization:
    """C3A: circulant blocks, each given by one vector; full rank at out*inp/block parameters.

    ``block`` has to divide both sides; the constant that lays out a circulant has block cubed entries.

    Parameters: ``layer*proj*o1*i1*c``.
    Start: Xavier as released, so the update is **not zero**; ``zero=True`` starts at zero. Scale: 1/inp as released,
    which varies over the sites of a model: pass it; the default is our choice.
    Source: arXiv 2407.19342 (line as released in PEFT, count printed).

    >>> print(c3a(block=64).network)
    K[layer proj o1 i1 c] ^Circ[o2 i2 c] -> layer proj (o1 o2) (i1 i2)
    """
    return Factorization.of(
        "K[layer proj o1 i1 c] ^Circ[o2 i2 c] -> layer proj (o1 o2) (i1 i2)",
        name="c3a",
        ranks={"c": "o2"},
        splits=splits((None, block), (None, block)),
        init={"K": "zeros" if zero else "xavier", "Circ": "circulant"},
        scale=scale,
        source="arXiv 2407.19342 (line as released in PEFT, count printed)",
    )


@family
def monarch(out: Split = PAIR, inp: Split = PAIR, scale: float = 1.0) -> Factorization:
    """MoRe (Monarch): two block-diagonal matrices with a permutation between, of full rank in general.

    Parameters: ``layer*proj*o1*i1*(o2 + i2)``.
    Start: F zero, R by the variance rule (the release's start is unknown). Scale: a plain number.
    Source: arXiv 2408.17383 (line derived, checked against the released layer).

    >>> print(monarch().network)
    F[layer proj o1 o2 i1] R[layer proj i1 o1 i2] -> layer proj (o1 o2) (i1 i2)
    """
    return Factorization.of(
        "F[layer proj o1 o2 i1] R[layer proj i1 o1 i2] -> layer proj (o1 o2) (i1 i2)",
        name="monarch",
        splits=splits(out, inp),
        init={"F": "zeros"},
        scale=scale,
        source="arXiv 2408.17383 (line derived, checked against the released layer)",
    )


@family
def melora(rank: int = 8, blocks: int = 2, alpha: float | None = None) -> Factorization:
    """MELoRA: small LoRAs along the diagonal: the parameters of LoRA at rank r, and the rank of ``blocks`` times r.

    ``blocks`` has to divide both sides.

    Parameters: ``layer*proj*n*a*(o2 + i2)``.
    Start: B zero, A Kaiming. Scale: alpha/r.
    Source: arXiv 2402.17263 (line derived).

    >>> print(melora().network)
    B[layer proj n o2 a] A[layer proj n a i2] ^I[n m] -> layer proj (n o2) (m i2)
    """
    return Factorization.of(
        "B[layer proj n o2 a] A[layer proj n a i2] ^I[n m] -> layer proj (n o2) (m i2)",
        name="melora",
        ranks={"a": rank},
        splits=splits((blocks, None), (blocks, None)),
        init={"B": "zeros", "A": "kaiming", "I": "eye"},
        scale=effective(alpha, rank),
        source="arXiv 2402.17263 (line derived)",
    )


@family
def bd_lora(
    rank: int = 8, blocks: int = 2, alpha: float | None = None, down: str = "*down_proj|fc2|o_proj|out_proj"
) -> Factorization:
    """BD-LoRA: one side of LoRA block-diagonal, so that it shards without communication.

    The output side has the blocks; on the projections in ``down`` the input side. Raises NetworkError if ``blocks``
    does not divide the rank.

    Parameters: ``layer*proj*n*a*(out + i2)``.
    Parameters: ``layer*proj*n*a*(o2 + inp)``.
    Start: B zero, A Kaiming. Scale: alpha/r.
    Source: huggingface/peft, MetaMathQA comparison (count printed, lines derived).

    >>> for line in bd_lora().lines:
    ...     print(line.network)
    B[layer proj n out a] A[layer proj n a i2] -> layer proj out (n i2)
    B[layer proj n o2 a] A[layer proj n a inp] -> layer proj (n o2) inp
    """
    if rank % blocks:
        raise NetworkError(f"blocks={blocks} does not divide the rank {rank}", remedy="choose a multiple of blocks")
    return Factorization(
        name="bd_lora",
        lines=(
            SiteRule(network("B[layer proj n out a] A[layer proj n a i2] -> layer proj out (n i2)"), down),
            SiteRule(network("B[layer proj n o2 a] A[layer proj n a inp] -> layer proj (n o2) inp")),
        ),
        ranks={"a": rank // blocks},
        splits=splits((blocks, None), (blocks, None)),
        init={"B": "zeros", "A": "kaiming"},
        scale=effective(alpha, rank),
        source="huggingface/peft, MetaMathQA comparison (count printed, lines derived)",
    )
