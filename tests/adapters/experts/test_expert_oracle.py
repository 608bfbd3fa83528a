"""Every family on fused experts of every layout against a dense oracle: weights replaced by base plus an einsum."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_models import CONFIGS, KeepDouble, attached, mixture, region, site_update, tokens
from torch import Tensor, nn
from torch.func import functional_call

import tnpeft
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.layout import ParameterSpec
from tnpeft.networks import Factorization, NetworkError
from tnpeft.nn.init.philox import normal

NOT_IN_A_MODEL = {"lotra": "basis", "tuka": "scene"}
# Lines with the base weight, or parts of it, in factors that all experts would share.
OF_THE_WEIGHT = sorted(
    name
    for name in tnpeft.families.names()
    if any(str(start).startswith(("base", "svd", "tt_svd")) for start in tnpeft.families.get(name)().init.values())
)
LINES = {
    "cp": "w[layer proj r] a[expert r] A[layer proj o1 r] B[layer proj o2 r] C[layer proj i1 r] D[layer proj i2 r] "
    "-> layer proj expert (o1 o2) (i1 i2)",
    "train": "G1[proj out a] G2[layer a b] G3[expert b c] G4[c inp] -> layer proj expert out inp",
    "sum": "B[layer proj expert out r] A[proj r inp] - C[proj out s] D[expert s inp] -> layer proj expert out inp",
    "hira": "^W[layer proj expert out inp] B[layer proj expert out r] A[proj r inp] -> layer proj expert out inp",
    "ia3": "v[layer proj expert out] ^W[layer proj expert out inp] -> layer proj expert out inp",
}


def every() -> dict[str, Factorization]:
    """The families that have a meaning on experts, and lines of our own over them."""
    found = {name: tnpeft.families.get(name)() for name in tnpeft.families.names() if name not in NOT_IN_A_MODEL}
    found = {name: f for name, f in found.items() if name not in OF_THE_WEIGHT}
    ranks = dict.fromkeys("rsabc", 2)
    for name, line in LINES.items():
        init = {"W": "base"} if "^W" in line else {}
        bonds = {bond: ranks[bond] for bond in tnpeft.network(line).bonds if bond in ranks}
        found[f"own_{name}"] = Factorization.of(line, ranks=bonds, init=init, scale=0.5)
    found["own_unit"] = Factorization.of(
        "U[layer proj out r] e[layer proj expert r] V[layer proj inp r] -> layer proj expert out inp",
        ranks={"r": 3},
        unit_norm=["U", "V"],
    )
    return found


FAMILIES = every()


def shaken(base: nn.Module, f: Factorization, **options: object) -> nn.Module:
    model = attached(base, f, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                values = torch.from_numpy(normal(parameter.numel(), 0, name)).reshape(parameter.shape)
                parameter.copy_(0.5 * values)
    return model


def replaced(
    kind: str, base: nn.Module, model: nn.Module, f: Factorization, values: dict[ParameterSpec, Tensor]
) -> dict[str, Tensor]:
    """Every adapted Parameter with the updates of its sites added."""
    weights: dict[str, Tensor] = {}
    for place in bank_of(model).layouts["default"].site_layouts:
        name = place.site.module
        stored = base.get_parameter(name).detach()
        own = stored.mT if kind == "gpt_oss" else stored
        where = region(kind, place.site, own)
        update = torch.zeros_like(own)
        update = update.index_put([torch.arange(len(own))[:, None, None], *where[1:]],
                                  site_update(place, values, f, own[where]))  # fmt: skip
        weights[name] = weights.get(name, stored) + (update.mT if kind == "gpt_oss" else update)
    return weights


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "qwen2_moe"])  # which is stored as qwen3_moe
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_gradients_and_merged_weights(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", False)
    base, f = mixture(kind).double(), FAMILIES[family]
    model = shaken(base, f)
    held = arrays(model, bank_of(model), "default")
    leaves = {piece: a.detach().clone().requires_grad_(piece.kind == "trainable") for piece, a in held.items()}
    with KeepDouble():
        weights = replaced(kind, base, model, f, leaves)
        wanted = functional_call(base, weights, (tokens(),)).logits
        found = model(tokens()).logits
        plain = base(tokens()).logits
        for output in (wanted, found):
            output.square().mean().backward()
    assert (wanted - plain).abs().max() > 1e-6
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10 * float(wanted.detach().abs().max()))
    trained = {piece: leaf for piece, leaf in leaves.items() if piece.kind == "trainable"}
    total = torch.stack([leaf.grad.norm() for leaf in trained.values() if leaf.grad is not None]).norm()
    for piece, leaf in trained.items():
        assert (held[piece].grad - leaf.grad).norm() <= 1e-8 * leaf.grad.norm() + 1e-12 * total, piece
    model.merge_adapter()
    for name, weight in weights.items():
        path, _, own = name.rpartition(".")
        merged = model.base_model.model.get_parameter(f"{path}.base_layer.{own}")
        assert torch.allclose(merged, weight, rtol=0, atol=1e-10 * float(weight.detach().abs().max()))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_identity_at_the_start_and_counts(kind: str, implementation: str) -> None:
    base = mixture(kind, implementation)
    for f in (tnpeft.families.shared_outer_lora(rank=2), tnpeft.families.expert_cp(3), FAMILIES["tucker"]):
        model = attached(base, f)
        exact = implementation == "grouped_mm"  # the others multiply the same rows one by one, or elsewhere in memory
        for grad in (False, True):
            with torch.set_grad_enabled(grad), torch.no_grad() if not grad else torch.enable_grad():
                found, plain = model(tokens()).logits, base(tokens()).logits
            assert torch.equal(found, plain) if exact else torch.allclose(found, plain, atol=1e-5)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        stored = sum(p.numel() for p in model.state_dict().values() if p.dtype) and sum(
            value.numel() for name, value in model.state_dict().items() if ".tnpeft_" in name
        )
        assert trained == stored == tnpeft.parameters(f, model=base.config, targets=["experts"])
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, base(tokens()).logits)


@pytest.mark.parametrize("family", OF_THE_WEIGHT)
def test_what_comes_from_the_base_weight_carries_the_index_expert(family: str) -> None:
    model = mixture()
    names = [name for name, _ in model.named_parameters()]
    reasons = r"one for every expert|serves 4 experts and cannot start as|serves \d sites"
    with pytest.raises(NetworkError, match=reasons):
        attached(model, tnpeft.families.get(family)())
    assert names == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("start", ["svd", "tt_svd"])
def test_a_start_from_the_weight_of_every_expert(start: str) -> None:
    line = "U[layer proj expert out r] V[layer proj expert r inp] -> layer proj expert out inp"
    base = mixture("gpt_oss")
    f = Factorization.of(line, ranks={"r": "min(out, inp)"}, init=dict.fromkeys("UV", start))
    model = attached(base, f)
    down = base.get_parameter("model.layers.1.mlp.experts.down_proj").mT
    for name, weight in (("down_proj", down), ("gate_up_proj", base.model.layers[1].mlp.experts.gate_up_proj.mT)):
        adapted = model.base_model.model.model.layers[1].mlp.experts.get_submodule(name)
        assert torch.allclose(adapted.get_delta_weight("default").mT, weight, atol=1e-5)


def test_the_oracle_can_fail() -> None:
    base, f = mixture().double(), FAMILIES["expert_cp"]
    model = shaken(base, f)
    values = {piece: array.detach() for piece, array in arrays(model, bank_of(model), "default").items()}
    first = next(iter(values))
    wrong = {**values, first: values[first] * (1 + 1e-6)}
    with KeepDouble(), torch.no_grad():
        right, off = (
            functional_call(copy.deepcopy(base), replaced("mixtral", base, model, f, v), (tokens(),)).logits
            for v in (values, wrong)
        )
        found = model(tokens()).logits
    limit = 1e-10 * float(right.abs().max())
    assert torch.allclose(found, right, rtol=0, atol=limit)
    assert not torch.allclose(off, right, rtol=0, atol=limit)
