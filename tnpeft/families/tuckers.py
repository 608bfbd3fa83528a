"""Tucker: a core with a matrix for each mode, and the adapters that share its sides over sites."""

from __future__ import annotations

from collections.abc import Sequence

from tnpeft.families.catalogue import family
from tnpeft.families.declare import (
    PAIR,
    STACK,
    WHOLE,
    Rank,
    Split,
    bonds,
    choose,
    digits,
    effective,
    factor,
    line,
    separate,
    splits,
    spread,
)
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
def tucker(
    ranks: Rank | Sequence[Rank] = 8,
    out: Split = WHOLE,
    inp: Split = WHOLE,
    modes: Sequence[str] = (),
    stack: Sequence[str] = STACK,
    scale: float = 1.0,
) -> Factorization:
    """Tucker over any digits of the sides and any stack indices: a core and a matrix for each mode.

    A stack index in ``modes`` is a mode of the tensor; each value of the others has a tensor of its own. Ranks are
    given in the order rows, columns, modes.

    Parameters: ``layer*proj*(a*b + a*out + b*inp)``.
    Start: the core G zero, the sides by the variance rule.
    Source: textbook form (derived).

    >>> print(tucker().network)
    G[layer proj a b] U1[layer proj out a] U2[layer proj inp b] -> layer proj out inp
    >>> print(tucker((8, 8, 3), modes=["proj"], stack=["proj"]).network)
    G[a b c] U1[out a] U2[inp b] U3[proj c] -> proj out inp
    """
    per, rows, cols = separate(stack, modes), digits("out", out), digits("inp", inp)
    sides = (*rows, *cols, *modes)
    letters = bonds(len(sides))
    matrices = (
        factor(f"U{k}", *per, side, bond) for k, (side, bond) in enumerate(zip(sides, letters, strict=True), 1)
    )
    return Factorization.of(
        line([factor("G", *per, *letters), *matrices], stack, rows, cols),
        name="tucker",
        ranks=spread(ranks, letters),
        splits=splits(out, inp),
        init={"G": "zeros"},
        scale=scale,
        source="textbook form (derived)",
    )


@family
def block_term(
    ranks: Rank | Sequence[Rank] = 4,
    blocks: Rank = 2,
    out: Split = WHOLE,
    inp: Split = WHOLE,
    modes: Sequence[str] = (),
    stack: Sequence[str] = STACK,
    scale: float = 1.0,
) -> Factorization:
    """Block terms: a sum of ``blocks`` Tucker tensors, CP and Tucker at its two ends.

    Options as for :func:`tucker`.

    Parameters: ``layer*proj*block*(a*b + a*out + b*inp)``.
    Start: the cores G zero, the sides by the variance rule.
    Source: textbook form (derived).

    >>> print(block_term().network)
    G[layer proj block a b] U1[layer proj block out a] U2[layer proj block inp b] -> layer proj out inp
    """
    per, rows, cols = separate(stack, modes), digits("out", out), digits("inp", inp)
    sides = (*rows, *cols, *modes)
    letters = bonds(len(sides))
    matrices = (
        factor(f"U{k}", *per, "block", side, bond)
        for k, (side, bond) in enumerate(zip(sides, letters, strict=True), 1)
    )
    return Factorization.of(
        line([factor("G", *per, "block", *letters), *matrices], stack, rows, cols),
        name="block_term",
        ranks={**spread(ranks, letters), "block": blocks},
        splits=splits(out, inp),
        init={"G": "zeros"},
        scale=scale,
        source="textbook form (derived)",
    )


@family
def lotr(rank: Rank = 8, per: Sequence[str] = (), alpha: float | None = None) -> Factorization:
    """LoTR: two sides that all sites share, a small core at every site.

    ``per=("proj",)`` gives every projection a pair of sides of its own, as the paper is said to have it.

    Parameters: ``a*out + layer*proj*a*b + b*inp``.
    Start: G zero, the sides standard normal. Scale: alpha/r.
    Source: arXiv 2402.01376 (line and start as released).

    >>> print(lotr().network)
    U[out a] G[layer proj a b] V[inp b] -> layer proj out inp
    """
    separate(STACK, per)
    return Factorization.of(
        line(
            [factor("U", *per, "out", "a"), "G[layer proj a b]", factor("V", *per, "inp", "b")],
            STACK,
            ("out",),
            ("inp",),
        ),
        name="lotr",
        ranks={"a": rank, "b": rank},
        init={"U": "normal(1)", "G": "zeros", "V": "normal(1)"},
        scale=effective(alpha, rank),
        source="arXiv 2402.01376 (line and start as released)",
    )


@family
def fact_tt(rank: Rank = 16, scale: float = 1.0) -> Factorization:
    """FacT-TT: LoTR with one pair of sides for the whole model, every linear cut into squares.

    Parameters: ``a*out + layer*proj*a*b + b*inp``.
    Start: V zero, U and S Kaiming. Scale: a plain number for each data set.
    Source: arXiv 2212.03145 (line, start and formula as released; 8K for ViT-B at r = 4 printed).

    >>> print(fact_tt().network)
    V[out a] S[layer proj a b] U[inp b] -> layer proj out inp
    """
    return Factorization.of(
        "V[out a] S[layer proj a b] U[inp b] -> layer proj out inp",
        name="fact_tt",
        ranks={"a": rank, "b": rank},
        init={"V": "zeros", "S": "kaiming", "U": "kaiming"},
        scale=scale,
        square=True,
        source="arXiv 2212.03145 (line, start and formula as released; 8K for ViT-B at r = 4 printed)",
    )


@family
def fact_tk(rank: Rank = 16, scale: float = 1.0) -> Factorization:
    """FacT-TK: FacT-TT with its cores tied through a third mode that counts the squares of the model.

    Parameters: ``a*out + a*b*c + layer*proj*c + b*inp``.
    Start: V zero, U Kaiming, C and P Xavier. Scale: a plain number for each data set.
    Source: arXiv 2212.03145 (line, start and formula as released).

    >>> print(fact_tk().network)
    V[out a] C[a b c] P[layer proj c] U[inp b] -> layer proj out inp
    """
    return Factorization.of(
        "V[out a] C[a b c] P[layer proj c] U[inp b] -> layer proj out inp",
        name="fact_tk",
        ranks={"a": rank, "b": rank, "c": rank},
        init={"V": "zeros", "C": "xavier", "P": "xavier", "U": "kaiming"},
        scale=scale,
        square=True,
        source="arXiv 2212.03145 (line, start and formula as released)",
    )


@family
def lotra(
    ranks: Rank | Sequence[Rank] = (8, 8, 4), stack: Sequence[str] = ("layer", "basis"), scale: float = 1.0
) -> Factorization:
    """LoTRA: Tucker updates of weights with a third mode, the basis functions of a Kolmogorov-Arnold layer.

    ``basis`` is a stack index without a meaning in a transformer: this line is for counting, planning and fitting.

    Parameters: ``layer*(a*b*c + a*out + b*inp + c*basis)``.
    Start: the core G zero, the sides by the variance rule (our choice).
    Source: arXiv 2502.06153 (Tucker of a third-order tensor printed, line derived).

    >>> print(lotra().network)
    G[layer a b c] U[layer out a] V[layer inp b] W[layer basis c] -> layer basis out inp
    """
    per = separate(stack, ["basis"])
    sides = {"U": ("out", "a"), "V": ("inp", "b"), "W": ("basis", "c")}
    factors = [factor(name, *per, *indices) for name, indices in {"G": ("a", "b", "c"), **sides}.items()]
    return Factorization.of(
        line(factors, stack, ("out",), ("inp",)),
        name="lotra",
        ranks=spread(ranks, ("a", "b", "c")),
        init={"G": "zeros"},
        scale=scale,
        source="arXiv 2502.06153 (Tucker of a third-order tensor printed, line derived)",
    )


@family
def tera(
    reading: str = "H1",
    ranks: Rank | Sequence[Rank] | None = None,
    out: Split = PAIR,
    inp: Split = PAIR,
    scale: float = 1.0,
) -> Factorization:
    """TeRA-like: a frozen random Tucker network that all sites share, with trained diagonals at every site.

    Where the diagonals sit is not known. ``reading="H1"`` puts them on the bonds, ``"H2"`` on the modes; by default
    every bond is as wide as its mode, where both readings count the same.

    Parameters: ``layer*proj*(a + b + c + d)``.
    Start: the first diagonal zero, the others by the variance rule (the source prints none). Scale: a plain number.
    Source: arXiv 2509.03234 (outline printed, frozen core secondary, line our reading).

    >>> for reading in ("H1", "H2"):
    ...     print(str(tera(reading, out=(None,), inp=(None,)).network))
    ~G[a b] ~X1[out a] x1[layer proj a] ~Y1[inp b] y1[layer proj b] -> layer proj out inp
    ~G[a b] ~X1[out a] x1[layer proj out] ~Y1[inp b] y1[layer proj inp] -> layer proj out inp
    """
    on_bond = choose("reading", reading, ("H1", "H2")) == "H1"
    rows, cols = digits("out", out), digits("inp", inp)
    sides = (*rows, *cols)
    letters = bonds(len(sides))
    labels = [f"{side}{k}" for side, group in (("x", rows), ("y", cols)) for k in range(1, len(group) + 1)]
    factors = [factor("~G", *letters)]
    for label, side, bond in zip(labels, sides, letters, strict=True):
        factors += [factor(f"~{label.upper()}", side, bond), factor(label, *STACK, bond if on_bond else side)]
    return Factorization.of(
        line(factors, STACK, rows, cols),
        name="tera",
        ranks=dict(zip(letters, sides, strict=True)) if ranks is None else spread(ranks, letters),
        splits=splits(out, inp),
        init={labels[0]: "zeros"},
        scale=scale,
        source="arXiv 2509.03234 (outline printed, frozen core secondary, line our reading)",
    )


@family
def tuka(ranks: Rank | Sequence[Rank] = (8, 8, 4, 2), scale: float = 1.0) -> Factorization:
    """TuKA: a Tucker tensor at every site with two task modes, one row for each scene and each environment.

    Ranks are given in the order output, input, scene, environment.

    Parameters: ``layer*proj*(a*b*c*d + a*out + b*inp + c*scene + d*env)``.
    Start: the core G zero, the sides by the variance rule (our choice).
    Source: arXiv 2603.14276 (line secondary).

    >>> print(tuka().network)  # doctest: +NORMALIZE_WHITESPACE
    G[layer proj a b c d] U1[layer proj out a] U2[layer proj inp b] S[layer proj scene c] E[layer proj env d]
        -> layer proj scene env out inp
    """
    return Factorization.of(
        "G[layer proj a b c d] U1[layer proj out a] U2[layer proj inp b] S[layer proj scene c] E[layer proj env d] "
        "-> layer proj scene env out inp",
        name="tuka",
        ranks=spread(ranks, ("a", "b", "c", "d")),
        init={"G": "zeros"},
        scale=scale,
        source="arXiv 2603.14276 (line secondary)",
    )


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
