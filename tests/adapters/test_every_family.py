"""Every family on every kind of weight: the outputs, gradients and weights of a dense model, or one clear refusal."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor
from weight_kinds import (
    BY_EXPERT,
    CALLED,
    FAMILIES,
    FOUNDING,
    KINDS,
    LINEARS,
    LISTED,
    RAW,
    adapted,
    replaced,
    shake,
)

import tnpeft
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.networks import Factorization, NetworkError

# Lines over experts that are no family's.
OWN = {
    "cp": "w[layer proj r] a[expert r] A[layer proj o1 r] B[layer proj o2 r] C[layer proj i1 r] D[layer proj i2 r] "
    "-> layer proj expert (o1 o2) (i1 i2)",
    "train": "G1[proj out a] G2[layer a b] G3[expert b c] G4[c inp] -> layer proj expert out inp",
    "sum": "B[layer proj expert out r] A[proj r inp] - C[proj out s] D[expert s inp] -> layer proj expert out inp",
    "hira": "^W[layer proj expert out inp] B[layer proj expert out r] A[proj r inp] -> layer proj expert out inp",
    "ia3": "v[layer proj expert out] ^W[layer proj expert out inp] -> layer proj expert out inp",
    "unit": "U[layer proj out r] e[layer proj expert r] V[layer proj inp r] -> layer proj expert out inp",
}


def own(name: str) -> Factorization:
    net = tnpeft.network(OWN[name])
    return Factorization.of(
        net,
        name=f"own_{name}",
        ranks=dict.fromkeys(net.bonds, 2),
        init={"W": "base"} if "^W" in OWN[name] else {},
        unit_norm=("U", "V") if name == "unit" else (),
        scale=0.5,
    )


OVER_EXPERTS = [name for name, f in FAMILIES.items() if "expert" in f.network.indices]
OF_THE_WEIGHT = {  # in constants or starts that all experts would share
    **dict.fromkeys(("hira", "ia3", "glora"), "W0"),
    **{"abba": ("B1", "svd"), "dota": ("G1", "tt_svd"), "mica": ("B", "svd_minor")},
    **dict.fromkeys(("lora_xs", "svft"), ("U", "svd")),
}
SITES = {
    "embedding": "embed (16 x 48)",
    **dict.fromkeys(("parameter", "parameter turned"), "kernel_weight (16 x 16)"),
    **{"attention": "in_proj/out:0 (16 x 16)", "attention apart": "q_proj (16 x 16)"},
    **dict.fromkeys(("opt", "llama", "vit"), "q_proj (32 x 32)"),
    **{"gpt2": "c_attn/out:0 (32 x 32)", "bert": "query (32 x 32)"},
}


def refusal(family: str, kind: str) -> tuple[str, str] | None:
    """What is said, and what to do, where a family has no meaning on a kind of weight; None where it has."""
    if family in OVER_EXPERTS and kind not in BY_EXPERT:
        site = SITES.get(kind, "conv (16 x 16)")
        problem = f"the index 'expert' has no meaning on {site}: it is one matrix, not one for every expert"
        return problem, "leave 'expert' out of the line, or target weights that hold one matrix for every expert"
    if family in OF_THE_WEIGHT and kind in BY_EXPERT:
        what = OF_THE_WEIGHT[family]
        if isinstance(what, str):
            site = "w1" if kind in LISTED else "kernel_weight" if kind in RAW else "experts_gate_up_proj/out:0"
            problem = f"the base weight {what} of {site} is 4 matrices, one for every expert"
            return problem, f"let it carry the index 'expert', as in ^{what}[layer proj expert out inp]"
        problem = f"factor {what[0]!r} serves 4 experts and cannot start as {what[1]!r}"
        return problem, "the base weight differs from expert to expert: let the factor carry expert"
    if (family, kind) == ("lora_xs", "attention apart"):  # whose v_proj is 16 x 8
        return "factor 'U' [out=16 a=16] cannot start as 'svd'", "a rank of at most 8 fits"
    if family in ("cara", "fact_tk", "fact_tt") and kind == "llama":
        return (
            "down_proj (32 x 48) cannot be cut into squares",
            "leave this projection out, or choose a factorization without square slices",
        )
    return None


CASES = [(f, kind) for f in FAMILIES for kind in KINDS]
CASES += [(f"own_{name}", kind) for name in OWN for kind in BY_EXPERT if kind in KINDS]


def base_weights(model: peft.PeftModel) -> dict[str, Tensor]:
    """The weights of the base model by their names there."""
    return {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_outputs_gradients_and_merged_weights(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", False)
    its, f = KINDS[kind], FAMILIES.get(family) or own(family.removeprefix("own_"))
    if (said := refusal(family, kind)) is not None:
        assert family not in FOUNDING
        with pytest.raises(NetworkError) as caught:
            adapted(f, kind)
        assert (caught.value.problem, caught.value.remedy) == said
        return
    base, model = adapted(f, kind)
    x = its.example()
    plain = its.output(base, x).detach()
    if family in FOUNDING:
        size = 0 if kind in (*LINEARS, *CALLED) else 1e-13 * float(plain.abs().max())
        with torch.no_grad():
            assert torch.allclose(its.output(model, x), plain, rtol=0, atol=size)
    held = arrays(model, bank_of(model), "default")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(value.numel() for value in peft.get_peft_model_state_dict(model).values())
    assert count == stored == bank_of(model).layouts["default"].count()
    shake(model, its.spread)
    leaves = {piece: a.detach().clone().requires_grad_(piece.kind == "trainable") for piece, a in held.items()}
    weights = replaced(its, base, model, f, leaves)
    wanted, found = its.output(base, x, weights), its.output(model, x)
    assert (wanted - plain).abs().max() > 1e-6
    # Updates with random factors are large: errors are relative to what the outputs are made of.
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10 * float(wanted.detach().abs().max()))
    if kind == "opt":  # inference has a way of its own
        with torch.no_grad():
            assert torch.allclose(its.output(model, x), wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))
    for result in (wanted, found):
        result.square().mean().backward()
    trained = {piece: leaf for piece, leaf in leaves.items() if piece.kind == "trainable"}
    total = torch.stack([leaf.grad.norm() for leaf in trained.values() if leaf.grad is not None]).norm()
    for piece, leaf in trained.items():
        assert (held[piece].grad - leaf.grad).norm() <= 1e-8 * leaf.grad.norm() + 1e-13 * total, piece
    model.merge_adapter()
    merged = base_weights(model)
    for name, weight in weights.items():
        size = 1e-10 * float(weight.detach().abs().max())
        assert torch.allclose(merged[name], weight, rtol=0, atol=size)
    model.unmerge_adapter()
    restored = base_weights(model)
    for name in weights:
        assert torch.equal(restored[name], base.get_parameter(name))


def test_founding_families_are_refused_nowhere() -> None:
    assert not [(family, kind) for family in FOUNDING for kind in KINDS if refusal(family, kind)]


@pytest.mark.parametrize("kind", ["opt", "gpt2", "embedding", "conv2d grouped", "attention", "mixtral"])
def test_the_oracle_can_fail(kind: str) -> None:
    its, f = KINDS[kind], FAMILIES["lora"]
    base, model = adapted(f, kind)
    shake(model, its.spread)
    values = {piece: array.detach() for piece, array in arrays(model, bank_of(model), "default").items()}
    first, x = next(iter(values)), its.example()
    wrong = {**values, first: values[first] * (1 + 1e-6)}
    with torch.no_grad():
        right, off = (its.output(base, x, replaced(its, base, model, f, v)) for v in (values, wrong))
        found = its.output(model, x)
    limit = 1e-10 * float(right.abs().max())
    assert torch.allclose(found, right, rtol=0, atol=limit)
    assert not torch.allclose(off, right, rtol=0, atol=limit)
