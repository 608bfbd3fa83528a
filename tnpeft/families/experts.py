"""Experts: one matrix for every expert of a mixture, and what the experts share."""

from __future__ import annotations

from collections.abc import Sequence

from tnpeft.families.catalogue import family
from tnpeft.families.declare import Rank, effective, spread
from tnpeft.networks import Factorization, SiteRule, network

_DOWN = "*down_proj|fc2|w2|c_proj|output"


@family
def shared_outer_lora(rank: Rank = 8, alpha: float | None = None, down: str = _DOWN) -> Factorization:
    """Shared-outer LoRA: LoRA over experts that share the side towards the model's hidden state.

    All experts share the input side of gate and up and the output side of ``down``; the other side is each expert's.
    On a linear, which is one expert, it is LoRA.

    Parameters: ``layer*proj*r*(out + expert*inp)``.
    Parameters: ``layer*proj*r*(expert*out + inp)``.
    Start: B zero, A Kaiming. Scale: alpha/r.
    Source: thinking-machines-lab/tinker-cookbook (counts printed, lines derived).

    >>> for line in shared_outer_lora().lines:
    ...     print(line.network)
    B[layer proj out r] A[layer proj expert r inp] -> layer proj expert out inp
    B[layer proj expert out r] A[layer proj r inp] -> layer proj expert out inp
    """
    return Factorization(
        name="shared_outer_lora",
        lines=(
            SiteRule(network("B[layer proj out r] A[layer proj expert r inp] -> layer proj expert out inp"), down),
            SiteRule(network("B[layer proj expert out r] A[layer proj r inp] -> layer proj expert out inp")),
        ),
        ranks={"r": rank},
        init={"B": "zeros", "A": "kaiming"},
        scale=effective(alpha, rank),
        source="thinking-machines-lab/tinker-cookbook (counts printed, lines derived)",
    )


@family
def expert_lora(rank: Rank = 8, alpha: float | None = None) -> Factorization:
    """LoRA over experts: two thin matrices for every expert, as PEFT's ``target_parameters`` has it.

    Parameters: ``layer*proj*expert*r*(out + inp)``.
    Start: B zero, A Kaiming. Scale: alpha/r.
    Source: arXiv 2106.09685, in PEFT for fused experts (line as released).

    >>> print(expert_lora().network)
    B[layer proj expert out r] A[layer proj expert r inp] -> layer proj expert out inp
    """
    return Factorization.of(
        "B[layer proj expert out r] A[layer proj expert r inp] -> layer proj expert out inp",
        name="expert_lora",
        ranks={"r": rank},
        init={"B": "zeros", "A": "kaiming"},
        scale=effective(alpha, rank),
        source="arXiv 2106.09685, in PEFT for fused experts (line as released)",
    )


@family
def expert_cp(rank: Rank = 64, scale: float = 1.0) -> Factorization:
    """CP over experts: two sides that all experts share, and a vector for each; rank r in every expert.

    Parameters: ``layer*proj*r*(out + expert + inp)``.
    Start: e zero, so that an expert that is never routed to has no update; U and V by the variance rule.
    Source: textbook form (derived).

    >>> print(expert_cp().network)
    U[layer proj out r] e[layer proj expert r] V[layer proj inp r] -> layer proj expert out inp
    """
    return Factorization.of(
        "U[layer proj out r] e[layer proj expert r] V[layer proj inp r] -> layer proj expert out inp",
        name="expert_cp",
        ranks={"r": rank},
        init={"e": "zeros"},
        scale=scale,
        source="textbook form (derived)",
    )


@family
def expert_tucker(ranks: Rank | Sequence[Rank] = 32, scale: float = 1.0) -> Factorization:
    """Tucker over experts: two sides that all experts share, and a small core for each.

    ``families.tucker(stack=("layer", "proj", "expert"), modes=["expert"])`` has one core and a matrix over experts.

    Parameters: ``layer*proj*(a*out + expert*a*b + b*inp)``.
    Start: G zero, so that an expert that is never routed to has no update; U and V by the variance rule.
    Source: textbook form (derived).

    >>> print(expert_tucker().network)
    U[layer proj out a] G[layer proj expert a b] V[layer proj inp b] -> layer proj expert out inp
    """
    return Factorization.of(
        "U[layer proj out a] G[layer proj expert a b] V[layer proj inp b] -> layer proj expert out inp",
        name="expert_tucker",
        ranks=spread(ranks, ("a", "b")),
        init={"G": "zeros"},
        scale=scale,
        source="textbook form (derived)",
    )
