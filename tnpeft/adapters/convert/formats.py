"""The table of formats: how stored names belong to sites, and how stored tensors are the factors of a line.

Every entry also has the update as its own project computes it, written out without the line: a conversion is
believed only if the two agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from tnpeft.adapters.convert.lines import Array, parse
from tnpeft.networks import Network, network

Raw = Mapping[str, Array]


@dataclass(frozen=True)
class Packing:
    """One way to store the update of a site.

    ``tensors`` maps the end of a stored name to the factor it holds, with its axes in stored order; those in
    ``shared`` are stored once for all sites, larger than a site needs, and first cut to the sizes of the axes named
    there; ``update`` is the project's own formula, ``[*stack, out, inp]`` without the scale.
    """

    method: str
    line: str
    tensors: Mapping[str, str]
    update: Callable[[Raw], Array]
    shared: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def network(self) -> Network:
        """The line as a network, its stack included."""
        return network(self.line)

    @cached_property
    def site(self) -> Network:
        """The network of one site; the index ``expert`` stays."""
        return self.network.select(*(index for index in self.network.stack if index in ("layer", "proj")))

    def fits(self, stored: Mapping[str, Tensor]) -> bool:
        """True if these are the tensors of a site in this packing, by their names and numbers of axes."""
        own = {name for name in self.tensors if name not in self.shared}
        if own != set(stored):
            return False
        for name, tensor in stored.items():
            axes = parse(self.tensors[name])[1]
            if tensor.ndim != len(axes) or any(not g and n != 1 for g, n in zip(axes, tensor.shape, strict=True)):
                return False
        return True


_SITE = "-> layer proj out inp"
_EXPERT = "-> layer proj expert out inp"
_LORA = f"B[layer proj out r] A[layer proj r inp] {_SITE}"
_LOHA = f"B1[layer proj out r] A1[layer proj r inp] B2[layer proj out s] A2[layer proj s inp] {_SITE}"
_OWN_EXPERTS = f"B[layer proj expert out r] A[layer proj expert r inp] {_EXPERT}"


def _lora(t: Raw) -> Array:
    """Batched over experts, if there are any; a side that they share has one entry or no such axis."""
    return np.matmul(t["lora_B.weight"], t["lora_A.weight"])


def _target_parameters(t: Raw) -> Array:
    a, b, experts = t["lora_A.weight"], t["lora_B.weight"], int(t["experts"])
    b_of = b.reshape(b.shape[0], -1, experts)
    return np.stack([b_of[:, :, e] @ a.reshape(experts, -1, a.shape[1])[e] for e in range(experts)])


def _kohya(t: Raw) -> Array:
    down, up = t["lora_down.weight"], t["lora_up.weight"]
    return up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)


def _loha(t: Raw) -> Array:
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def _lokr(t: Raw) -> Array:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return np.kron(w1, w2)


def _vera(t: Raw) -> Array:
    b, d = t["vera_lambda_b"], t["vera_lambda_d"]
    return np.asarray((b[:, None] * t["vera_B"]) @ (d[:, None] * t["vera_A"]))


def _randlora(t: Raw) -> Array:
    lam, gam, a, b = t["randlora_lambda"], t["randlora_gamma"], t["randlora_A"], t["randlora_B"]
    scaled = (lam[:, :, None] * gam[None]) * a  # [a n short]
    return np.asarray(b.reshape(b.shape[0], -1) @ scaled.reshape(-1, scaled.shape[2]))  # [long short]


_HADA = {"hada_w1_a": "B1[out r]", "hada_w1_b": "A1[r inp]", "hada_w2_a": "B2[out s]", "hada_w2_b": "A2[s inp]"}
_LEFT = (  # Kronecker factors, whole or as a product
    ("C[layer proj o1 i1]", {"lokr_w1": "C[o1 i1]"}),
    ("C1[layer proj o1 q] C2[layer proj q i1]", {"lokr_w1_a": "C1[o1 q]", "lokr_w1_b": "C2[q i1]"}),
)
_RIGHT = (
    ("P[layer proj o2 r] Q[layer proj r i2]", {"lokr_w2_a": "P[o2 r]", "lokr_w2_b": "Q[r i2]"}),
    ("K[layer proj o2 i2]", {"lokr_w2": "K[o2 i2]"}),
)
_KRONECKER = tuple(
    Packing("LoKr", f"{first} {second} -> layer proj (o1 o2) (i1 i2)", {**left, **right}, _lokr)
    for first, left in _LEFT
    for second, right in _RIGHT
)

# The packings of PEFT's folders by its own name of the method.
PEFT: Mapping[str, tuple[Packing, ...]] = {
    "LORA": (
        Packing("LoRA", _LORA, {"lora_A.weight": "A[r inp]", "lora_B.weight": "B[out r]"}, _lora),
        Packing(
            "LoRA over target_parameters",
            _OWN_EXPERTS,
            {"lora_A.weight": "A[(expert r) inp]", "lora_B.weight": "B[out (r expert)]"},
            _target_parameters,
        ),
    ),
    "LOHA": (Packing("LoHa", _LOHA, _HADA, _loha),),
    "LOKR": _KRONECKER,
    "VERA": (
        Packing(
            "VeRA",
            f"b[layer proj out] ~B[out r] d[layer proj r] ~A[r inp] {_SITE}",
            {"vera_lambda_b": "b[out]", "vera_B": "B[out r]", "vera_lambda_d": "d[r]", "vera_A": "A[r inp]"},
            _vera,
            shared={"vera_B": "B[out r]", "vera_A": "A[r inp]"},
        ),
    ),
    "RANDLORA": tuple(  # tall matrices, then wide ones: its vectors sit on the shorter side
        Packing(
            "RandLoRA",
            f"~B{t}[{long} n a] lam{t}[layer proj a n] ~A{t}[a {short}] gam{t}[layer proj n {short}] {_SITE}",
            {
                "randlora_B": f"B{t}[{long} (a n)]",
                "randlora_lambda": f"lam{t}[a n]",
                "randlora_A": f"A{t}[a 1 {short}]",
                "randlora_gamma": f"gam{t}[n {short}]",
            },
            update,
            shared={"randlora_B": f"B{t}[{long} n a]", "randlora_A": f"A{t}[a 1 {short}]"},
        )
        for t, long, short, update in (
            ("", "out", "inp", _randlora),
            ("T", "inp", "out", lambda tensors: _randlora(tensors).T),
        )
    ),
}
LORA, NESTED = PEFT["LORA"]  # the second is that of ``target_parameters``
ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha", "RANDLORA": "randlora_alpha"}  # of a configuration

# Adapters over experts as three-dimensional tensors, a side that all share with one entry or none.
PER_EXPERT = Packing(
    "LoRA per expert",
    _OWN_EXPERTS,
    {"lora_A.weight": "A[expert r inp]", "lora_B.weight": "B[expert out r]"},
    _lora,
)
SHARED_OUTER: tuple[Packing, ...] = tuple(
    Packing("shared-outer LoRA", line, {"lora_A.weight": a, "lora_B.weight": b}, _lora)
    for line, a, b in (
        (f"B[layer proj expert out r] A[layer proj r inp] {_EXPERT}", "A[1 r inp]", "B[expert out r]"),
        (f"B[layer proj out r] A[layer proj expert r inp] {_EXPERT}", "A[expert r inp]", "B[1 out r]"),
        (f"B[layer proj expert out r] A[layer proj r inp] {_EXPERT}", "A[r inp]", "B[expert out r]"),
        (f"B[layer proj out r] A[layer proj expert r inp] {_EXPERT}", "A[expert r inp]", "B[out r]"),
    )
)

# Single files of image trainers.
KOHYA: tuple[Packing, ...] = tuple(
    Packing("LoRA", _LORA, {"lora_down.weight": a, "lora_up.weight": b}, _kohya)
    for a, b in (("A[r inp]", "B[out r]"), ("A[r inp 1 1]", "B[out r 1 1]"))
)
LYCORIS: tuple[Packing, ...] = (Packing("LoHa", _LOHA, _HADA, _loha), *_KRONECKER)

TARGETS: Mapping[str, tuple[Packing, ...]] = {
    "peft": tuple(packing for packings in PEFT.values() for packing in packings),
    "lora": (LORA,),
    "per_expert": (PER_EXPERT, LORA),
    "shared_outer": (*SHARED_OUTER[:2], LORA),
    "kohya": KOHYA[:1],
    "lycoris": (*KOHYA[:1], *LYCORIS),
}
