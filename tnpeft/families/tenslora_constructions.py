"""TensLoRA: which indices of the stacked updates become modes of one tensor, and which core joins them."""

from __future__ import annotations

from collections.abc import Sequence

from tnpeft.families.catalogue import family
from tnpeft.families.declare import STACK, Rank, bonds, choose, factor, line, separate, spread
from tnpeft.networks import Factorization
from tnpeft.networks.factor import Group

MODES = {
    "att": ("head",),
    "qkv": ("proj",),
    "depth": ("layer",),
    "att_qkv": ("head", "proj"),
    "att_depth": ("head", "layer"),
    "qkv_depth": ("proj", "layer"),
    "att_qkv_depth": ("head", "proj", "layer"),
}


@family
def tenslora(
    construction: str = "qkv_depth",
    ranks: Rank | Sequence[Rank] = 4,
    core: str = "tucker",
    heads: str = "true",
    scale: float = 1.0,
) -> Factorization:
    """TensLoRA: one tensor over the sides of the matrix and the modes of a construction, separate ones over the rest.

    Constructions: att, qkv, depth, att_qkv, att_depth, qkv_depth, att_qkv_depth. Ranks are given in the order input,
    output (inside a head if heads are a mode), head, projection, layer. ``core`` is ``"tucker"``, ``"cp"`` (one rank)
    or ``"tt"`` (a chain in that order, one rank fewer; our addition). ``heads="interleaved"`` is the released layout,
    in which a head is every H-th output feature; ``"true"`` keeps heads contiguous, as models have them.

    Parameters: ``a*b*c*d + a*inp + b*out + c*proj + d*layer``.
    Start: the Tucker core, or else U1, zero; the others orthogonal. Scale: a plain number, not divided by the rank.
    Source: arXiv 2509.19391 (lines, start and formula as released; "tt" our reading).

    >>> print(tenslora("qkv_depth", ranks=(8, 8, 3, 8)).network)
    G[a b c d] U1[inp a] U2[out b] U3[proj c] U4[layer d] -> layer proj out inp
    >>> print(tenslora("att", core="cp", heads="interleaved").network)
    ^w[r] U1[layer proj inp r] U2[layer proj dim r] U3[layer proj head r] -> layer proj (dim head) inp
    """
    modes = MODES[choose("construction", construction.lower(), MODES)]
    choose("core", core, ("tucker", "cp", "tt"))
    choose("heads", heads, ("true", "interleaved"))
    per = separate(STACK, [mode for mode in modes if mode != "head"])
    by_head = "head" in modes
    sides = ("inp", "dim" if by_head else "out", *modes)
    labels = [f"U{k}" for k in range(1, len(sides) + 1)]
    names: Group
    joints: list[Group]
    if core == "cp":
        names = ("r",)
        joints = [names] * len(sides)
        factors, zero = ["^w[r]"], "U1"
    elif core == "tt":
        names = bonds(len(sides) - 1)
        joints = [names[max(k - 1, 0) : k + 1] for k in range(len(sides))]
        factors, zero = [], "U1"
    else:
        names = bonds(len(sides))
        joints = [(bond,) for bond in names]
        factors, zero = [factor("G", *per, *names)], "G"
    factors += [factor(label, *per, side, *joint) for label, side, joint in zip(labels, sides, joints, strict=True)]
    rows = ("out",) if not by_head else ("head", "dim") if heads == "true" else ("dim", "head")
    return Factorization.of(
        line(factors, STACK, rows, ("inp",)),
        name="tenslora",
        ranks=spread(ranks, names),
        init={**dict.fromkeys(labels, "orthogonal"), zero: "zeros", **({"w": "ones"} if core == "cp" else {})},
        scale=scale,
        source='arXiv 2509.19391 (lines, start and formula as released; "tt" our reading)',
    )
