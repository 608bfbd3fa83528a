"""Diagonal: trained vectors on the bonds or sides of matrices that are frozen, shared or the base weight itself."""

from __future__ import annotations

from tnpeft.families.catalogue import family
from tnpeft.families.declare import Rank, effective
from tnpeft.networks import Factorization, SiteRule, network


@family
def vera(rank: Rank = 256, d_initial: float = 0.1) -> Factorization:
    """VeRA: two trained vectors at every site around frozen random matrices that all sites share.

    Parameters: ``layer*proj*(out + r)``.
    Start: b zero, d constant ``d_initial``, the frozen matrices Kaiming. No scale.
    Source: arXiv 2310.11454 (line as released, counts printed).

    >>> print(vera().network)
    b[layer proj out] ~B[out r] d[layer proj r] ~A[r inp] -> layer proj out inp
    """
    return Factorization.of(
        "b[layer proj out] ~B[out r] d[layer proj r] ~A[r inp] -> layer proj out inp",
        name="vera",
        ranks={"r": rank},
        init={"b": "zeros", "d": f"constant({d_initial})", "B": "kaiming", "A": "kaiming"},
        source="arXiv 2310.11454 (line as released, counts printed)",
    )


@family
def randlora(rank: Rank = 32, alpha: float | None = None) -> Factorization:
    """RandLoRA: full rank from ceil(min(out, inp)/r) frozen random products, each scaled on two bonds.

    The trained vectors sit on the short side, so there is one line for ``out >= inp`` and its transpose for the rest.
    PEFT pairs n and a of its frozen bases in another order: the same updates after relabelling B's entries.

    Parameters: ``layer*proj*n*(a + inp)``.
    Parameters: ``layer*proj*n*(a + out)``.
    Start: lam zero, the bases by the variance rule, gam ones (PEFT has 1/min(out, inp) on bases of spread 1: the same
    updates up to scale). Scale: alpha/r.
    Source: arXiv 2502.00987 (lines as released in PEFT, count derived).

    >>> for line in randlora().lines:
    ...     print(line.sites, "|", line.network)
    out>=inp | ~B[out n a] lam[layer proj a n] ~A[a inp] gam[layer proj n inp] -> layer proj out inp
    out<inp | ~BT[inp n a] lamT[layer proj a n] ~AT[a out] gamT[layer proj n out] -> layer proj out inp
    """
    tall = "~B[out n a] lam[layer proj a n] ~A[a inp] gam[layer proj n inp] -> layer proj out inp"
    wide = "~BT[inp n a] lamT[layer proj a n] ~AT[a out] gamT[layer proj n out] -> layer proj out inp"
    return Factorization(
        name="randlora",
        lines=(SiteRule(network(tall), "out>=inp"), SiteRule(network(wide), "out<inp")),
        ranks={"a": rank, "n": "ceildiv(min(out, inp), a)"},
        init={"lam": "zeros", "lamT": "zeros", "gam": "ones", "gamT": "ones"},
        scale=effective(alpha, rank),
        source="arXiv 2502.00987 (lines as released in PEFT, count derived)",
    )


@family
def ia3(inputs: str = "fc2|down_proj") -> Factorization:
    """IA3: a trained vector times the base weight, on its outputs, on the inputs of the projections in ``inputs``.

    The vector here is the difference from one, so that zero is the start; biases are not scaled.

    Parameters: ``layer*proj*inp``.
    Parameters: ``layer*proj*out``.
    Source: arXiv 2205.05638 (line derived; as in PEFT but for biases).

    >>> for line in ia3().lines:
    ...     print(line.sites, "|", line.network)
    fc2|down_proj | v[layer proj inp] ^W0[layer proj out inp] -> layer proj out inp
    * | u[layer proj out] ^W0[layer proj out inp] -> layer proj out inp
    """
    return Factorization(
        name="ia3",
        lines=(
            SiteRule(network("v[layer proj inp] ^W0[layer proj out inp] -> layer proj out inp"), inputs),
            SiteRule(network("u[layer proj out] ^W0[layer proj out inp] -> layer proj out inp")),
        ),
        init={"u": "zeros", "v": "zeros", "W0": "base"},
        source="arXiv 2205.05638 (line derived; as in PEFT but for biases)",
    )


@family
def refta(rank: Rank = 15) -> Factorization:
    """ReFTA: two trained sides that all layers share, weighted by a fixed transform over depth; VeRA mirrored.

    Parameters: ``proj*a*(out + inp)``.
    Start: A zero, B by the variance rule, u a discrete cosine transform over depth (our choice; the release starts
    from the leading components of the transformed weights and subtracts them; its B has one column more, for the
    bias).
    Source: ReFTA, CVPR 2026, code jzheng20/ReFTA (line derived from the code, counts derived).

    >>> print(refta().network)
    A[proj out a] ^u[layer a] B[proj a inp] -> layer proj out inp
    """
    return Factorization.of(
        "A[proj out a] ^u[layer a] B[proj a inp] -> layer proj out inp",
        name="refta",
        ranks={"a": rank},
        init={"A": "zeros", "u": "dct"},
        source="ReFTA, CVPR 2026, code jzheng20/ReFTA (line derived from the code, counts derived)",
    )


@family
def svft(rank: Rank = "min(out, inp)", scale: float = 1.0) -> Factorization:
    """SVFT, plain: a trained change of each singular value, between the base weight's own singular vectors.

    The variants of the paper train further entries between the vectors; with all of them the line is lora_xs.

    Parameters: ``layer*proj*r``.
    Start: m zero. Scale: a plain number.
    Source: arXiv 2405.19597 (line derived).

    >>> print(svft().network)
    ^U[layer proj out r] m[layer proj r] ^V[layer proj r inp] -> layer proj out inp
    """
    return Factorization.of(
        "^U[layer proj out r] m[layer proj r] ^V[layer proj r inp] -> layer proj out inp",
        name="svft",
        ranks={"r": rank},
        init={"U": "svd(0)", "m": "zeros", "V": "svd(0)"},
        scale=scale,
        source="arXiv 2405.19597 (line derived)",
    )


@family
def tied_lora(rank: Rank = 8, alpha: float | None = None) -> Factorization:
    """Tied-LoRA: one trained pair of matrices for all sites, two trained vectors at every site; VeRA trained.

    Parameters: ``layer*proj*(out + r) + r*(out + inp)``.
    Start: B zero, the rest by the variance rule (the release's start was not seen). Scale: alpha/r.
    Source: arXiv 2311.09578 (line derived).

    >>> print(tied_lora().network)
    b[layer proj out] B[out r] d[layer proj r] A[r inp] -> layer proj out inp
    """
    return Factorization.of(
        "b[layer proj out] B[out r] d[layer proj r] A[r inp] -> layer proj out inp",
        name="tied_lora",
        ranks={"r": rank},
        init={"B": "zeros"},
        scale=effective(alpha, rank),
        source="arXiv 2311.09578 (line derived)",
    )
