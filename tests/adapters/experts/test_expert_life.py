"""Adapters of fused experts in every implementation: counted, mixed, with magnitudes, compiled, recomputed."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import weight_kinds
from adapter_models import row_by_row, shake
from expert_models import CONFIGS, attached, logits, mixture, tokens
from failing_steps import refused
from oracles import dense
from torch import Tensor, nn

import tnpeft
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.networks import NetworkError, SiteRule

KINDS = ["mixtral", "gpt_oss"]
SHARED = tnpeft.families.shared_outer_lora(rank=2)
CP = tnpeft.families.expert_cp(3)
IMPLEMENTATIONS = ["eager", "grouped_mm"]


def shaken(base: nn.Module, network: Any = SHARED, seed: int = 0, **options: Any) -> peft.PeftModel:
    model = attached(base, network, **options)
    shake(model, seed)
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens()).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alike(one: dict[str, Tensor], two: dict[str, Tensor], limit: float = 1e-5) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value - two[name]).norm() <= limit * (1e-6 + two[name].norm()), name


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "batched_mm"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_identity_at_the_start_and_counts(kind: str, implementation: str) -> None:
    base = mixture(kind, implementation)
    for f in (tnpeft.families.shared_outer_lora(rank=2), tnpeft.families.expert_cp(3), tnpeft.families.tucker()):
        model = attached(base, f)
        exact = implementation == "grouped_mm"  # the others multiply the same rows one by one, or elsewhere in memory
        for grad in (False, True):
            with torch.set_grad_enabled(grad), torch.no_grad() if not grad else torch.enable_grad():
                found, plain = model(tokens()).logits, base(tokens()).logits
            assert torch.equal(found, plain) if exact else torch.allclose(found, plain, atol=1e-5)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        stored = sum(value.numel() for name, value in model.state_dict().items() if ".tnpeft_" in name)
        assert trained == stored == tnpeft.parameters(f, model=base.config, targets=["experts"])
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, base(tokens()).logits)


def test_beside_a_merged_adapter_starts_are_of_the_weight_before_the_merge() -> None:
    line = "B[layer proj expert out r] A[layer proj expert r inp] -> layer proj expert out inp"
    config = tnpeft.TensorNetworkConfig(
        network=line, ranks={"r": 2}, init={"A": "svd", "B": "zeros"}, target_modules=["experts"]
    )
    model = shaken(mixture(), CP)
    wanted = tnpeft.factors(peft.get_peft_model(mixture(), config))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", config)
    assert all(torch.equal(value, wanted[name]) for name, value in tnpeft.factors(model, "second").items())


@pytest.mark.parametrize("kind", ["gpt_oss", "list of experts"])
@pytest.mark.parametrize("start", ["svd", "tt_svd"])
def test_a_start_from_the_weight_of_every_expert(start: str, kind: str) -> None:
    line = "U[layer proj expert out r] V[layer proj expert r inp] -> layer proj expert out inp"
    f = tnpeft.Factorization.of(line, ranks={"r": "min(out, inp)"}, init=dict.fromkeys("UV", start))
    base, model = weight_kinds.attached(kind, network=f)
    layers = {name: m for name, m in model.get_base_model().named_modules() if getattr(m, "updates", None)}
    assert len(layers) == (4 if kind == "gpt_oss" else 2 * 3 * 4)
    for name, layer in layers.items():
        weight = base.get_parameter(name if kind == "gpt_oss" else f"{name}.weight")
        assert torch.allclose(layer.get_delta_weight("default"), weight, atol=1e-5)


def test_a_file_of_other_experts_is_refused_and_nothing_is_attached(tmp_path: Path) -> None:
    shaken(mixture()).save_pretrained(tmp_path)
    with refused(base := mixture("olmoe", num_experts=6), None):
        peft.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_switched_and_added_up_under_grouped_mm(kind: str) -> None:
    base = mixture(kind, "grouped_mm")
    model = shaken(base)
    outputs = {"default": logits(model)}
    model.add_adapter("second", tnpeft.TensorNetworkConfig(network=CP, target_modules=["experts"]))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(base))
    shake(model, 1, "second")
    outputs["second"] = logits(model)
    model.base_model.set_adapter([*outputs])
    outputs["sum"] = logits(model)
    assert not torch.allclose(outputs["sum"], outputs["default"], atol=1e-3)
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    for name, wanted in outputs.items():
        model.set_adapter(name)
        assert torch.allclose(logits(model), wanted, rtol=0, atol=1e-4 if name == "sum" else 0)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_of_several_adapters(kind: str, implementation: str) -> None:
    base = mixture(kind, implementation)
    model = shaken(base)
    model.add_adapter(
        "second", tnpeft.TensorNetworkConfig(network=CP, target_modules=["experts_gate_up_proj"], dora=True)
    )
    shake(model, 1, "second")
    batch, names = tokens(4, 5), ["second", "default", "__base__", "second"]
    with torch.no_grad():
        found = model(batch, adapter_names=names).logits
    assert torch.allclose(found, row_by_row(model, names, lambda k: model(batch).logits[k : k + 1]), atol=1e-4)
    model.merge_adapter()
    with pytest.raises(NetworkError, match="merged"), torch.no_grad():
        model(batch, adapter_names=names)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_the_rows_in_training_alone(kind: str) -> None:
    base = mixture(kind)
    plain, dropped = shaken(base), shaken(base, dropout=0.5)
    assert torch.equal(logits(dropped), logits(plain))
    torch.manual_seed(0)
    rows = [dropped.train()(tokens()).logits for _ in range(2)]
    assert not torch.allclose(*rows)
    # Linear in a single last layer: the mean over many masks is the output without.
    experts = dropped.base_model.model.model.layers[1].mlp.experts
    x = torch.randn(3, 32)
    groups = tnpeft.nn.executor.groups.Groups(torch.tensor([0, 0, 2]), 4)
    with torch.no_grad():
        many = torch.stack([experts.get_submodule("gate_up_proj")(x, groups) for _ in range(4000)])
        exact = experts.eval().get_submodule("gate_up_proj")(x, groups)
    assert (many.mean(0) - exact).abs().max() < 6 * many.std(0).max() / 4000**0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", [0.0, 1e-9])  # with and without the base output at hand
def test_dora_against_the_rescaled_weights(kind: str, drop: float) -> None:
    base = mixture(kind)
    model = attached(base, SHARED, dora=True, dropout=drop)
    assert torch.allclose(logits(model), logits(base), atol=1e-5)
    shake(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value.mul_(1 + 0.3 * torch.rand_like(value))
    assert sum("magnitude" in name for name, p in model.named_parameters() if p.requires_grad) == 4
    merged = copy.deepcopy(model)
    wanted = logits(model)
    for layer in merged.base_model.model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            weight = layer.mlp.experts.get_submodule(name)
            turned = (lambda m: m.mT) if kind == "gpt_oss" else (lambda m: m)
            updated = turned(weight.weight) + weight._delta("default")
            rescaled = updated / updated.norm(dim=-1, keepdim=True) * weight.tnpeft_magnitude["default"][..., None]
            assert torch.allclose(
                turned(weight.get_delta_weight("default")), rescaled - turned(weight.weight), atol=1e-5
            )
    merged.merge_adapter()
    assert torch.allclose(logits(merged), wanted, atol=1e-4)
    grads = step(model.train())
    assert all(bool(value.any()) for name, value in grads.items() if "magnitude" in name)


@pytest.mark.parametrize("kind", ["mixtral", "list of experts"])
def test_dora_is_saved_and_merged(kind: str, tmp_path: Path) -> None:
    targets = ["experts_gate_up_proj/out:0"] if kind == "mixtral" else ["experts"]  # a slice, too
    its = weight_kinds.KINDS[kind]
    base, model = weight_kinds.attached(kind, network=SHARED, dora=True, target_modules=targets)
    shake(model)
    x = its.example()
    wanted = its.output(model, x).detach()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(its.output(again, x), wanted)
    model.merge_adapter()
    assert torch.allclose(its.output(model, x), wanted, rtol=0, atol=1e-10 * (1 + float(wanted.abs().max())))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler's own
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_with_a_break_at_the_experts(implementation: str) -> None:
    base = mixture("mixtral", implementation, num_hidden_layers=1)
    model = shaken(base).train()
    wanted, out = step(model), logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(tokens()).logits.square().mean().backward()
    model.zero_grad()
    compiled(tokens()).logits.square().mean().backward()
    alike({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, wanted, 1e-4)
    with torch.no_grad():
        assert torch.allclose(compiled(tokens()).logits, out, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_and_autocast(implementation: str) -> None:
    base = mixture("mixtral", implementation)
    exact = logits(shaken(base))
    half = shaken(base.bfloat16())
    trained = {p.dtype for p in half.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert (logits(half).float() - exact).abs().max() < 0.05 * exact.abs().max()
    step(half.train())
    whole = shaken(mixture("mixtral", implementation))
    with torch.autocast("cpu", torch.bfloat16):
        found = whole(tokens()).logits
        found.float().square().mean().backward()
    assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_factors_are_read_set_and_grouped() -> None:
    model = shaken(mixture("qwen3_moe"))
    held = tnpeft.factors(model)
    assert held["B#4x16x2"].shape == (2, 2, 4, 16, 2)
    wanted = logits(model)
    tnpeft.set_factors(model, {name: value * 0 for name, value in held.items()})
    assert torch.equal(logits(model), logits(mixture("qwen3_moe")))
    tnpeft.set_factors(model, held)
    assert torch.equal(logits(model), wanted)
    groups = tnpeft.parameter_groups(model, relative_step=1e-2)
    assert sum(len(group["params"]) for group in groups) == len([p for p in model.parameters() if p.requires_grad])
    assert {group["name"] for group in groups} == {"A", "B"}
    measured = tnpeft.parameter_groups(model, relative_step=1e-2, rule="measured", batch=tokens())
    assert all(0 < group["lr"] < 10 for group in measured)
    fresh = attached(mixture("qwen3_moe"), CP)
    rows = tnpeft.coordinate_check(fresh, tokens()).rows
    assert {row.factor for row in rows if row.measured > 0} == {"e"}
    assert all(0.2 < row.measured / row.predicted < 8 for row in rows if row.measured > 0)


def test_what_is_explained() -> None:
    model = shaken(mixture("qwen3_moe")).train()
    text = tnpeft.explain(model)
    assert not any(text.unmatched.values())
    assert {(row.site, row.experts, row.out, row.inp, row.path) for row in text.rows} == {
        ("experts_gate_up_proj/out:0", 4, 16, 32, "fused"),
        ("experts_gate_up_proj/out:1", 4, 16, 32, "fused"),
        ("experts_down_proj", 4, 32, 16, "fused"),
    }
    assert {row.reason for row in text.rows} == {"rows are grouped by expert"}
    assert "4 x 16 x 32" in str(text)
    model.merge_adapter()
    assert {row.path for row in tnpeft.explain(model).rows} == {"merged"}
    assert tnpeft.explain(shaken(mixture(), dropout=0.1).train()).rows[0].reason == "dropout in training"


@pytest.mark.parametrize(
    ("target", "sites"),
    [
        ("experts_down_proj", {"experts_down_proj"}),
        ("experts_gate_up_proj", {"experts_gate_up_proj"}),
        ("experts.down_proj", {"experts_down_proj"}),
        ("experts_gate_up_proj/out:1", {"experts_gate_up_proj/out:1"}),
        (r".*\.1\.mlp\.experts", {"experts_gate_up_proj/out:0", "experts_gate_up_proj/out:1", "experts_down_proj"}),
    ],
)
def test_targets(target: str, sites: set[str]) -> None:
    base = mixture("qwen3_moe")
    model = attached(base, CP, targets=target if "*" in target else (target,))
    rows = tnpeft.explain(model).rows
    assert {row.site for row in rows} == sites
    assert len(rows) == len(sites) * (1 if "*" in target else 2)
    if "*" not in target and target != "experts.down_proj":
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == tnpeft.parameters(CP, model=base.config, targets=[target])


def test_experts_beside_linears_and_without_a_card() -> None:
    base = mixture("qwen3_moe")
    line = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
    lines = SiteRule(tnpeft.network(line), "q_proj"), *CP.lines
    both = dataclasses.replace(CP, name="both", lines=lines)
    mixed = shaken(base, both, targets=["q_proj", "experts"])
    assert {row.site for row in tnpeft.explain(mixed).rows} >= {"q_proj", "experts_down_proj"}
    assert not torch.equal(logits(mixed), logits(base))
    left = attached(base, CP, exclude_modules=["experts.down_proj"])
    assert {row.site.partition("/")[0] for row in tnpeft.explain(left).rows} == {"experts_gate_up_proj"}

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = copy.deepcopy(base.model.layers[0].mlp.experts)

        def forward(self, x: Tensor) -> Tensor:
            index = torch.tensor([[0, 1]]).expand(len(x), 2)
            return self.experts(x, index, torch.full((len(x), 2), 0.5))

    unknown = nn.Sequential(Block(), Block())
    model = peft.get_peft_model(unknown, tnpeft.TensorNetworkConfig(network=CP, target_modules=["experts"]))
    assert [site.proj for site in tnpeft.adapters.targets.select(nn.Sequential(), {}).sites] == []
    assert {row.site for row in tnpeft.explain(model).rows} == {
        "gate_up_proj/out:0",
        "gate_up_proj/out:1",
        "down_proj",
    }
    shake(model)
    model(torch.randn(3, 32)).sum().backward()


@pytest.mark.parametrize("family", ["shared_outer_lora", "expert_cp", "own_hira"])
def test_beside_experts_a_linear_is_one_expert(family: str, tmp_path: Path) -> None:
    base = mixture().double()
    hira = "^W[layer proj expert out inp] B[layer proj expert out r] A[proj r inp] -> layer proj expert out inp"
    own = {"network": hira, "ranks": {"r": 2}, "init": {"W": "base"}}
    options = own if family == "own_hira" else {"network": tnpeft.families.get(family)(2)}
    model = attached(base, options.pop("network"), ("experts", "q_proj", "embed_tokens"), **options).double()
    shake(model)
    factors, names = tnpeft.factors(model), ("q_proj", "embed_tokens")
    assert all(value.isfinite().all() for value in factors.values())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == bank_of(model).layouts["default"].count()
    for path in (name for name, _ in base.named_modules() if name.endswith(names)):
        layer = model.base_model.model.get_submodule(path)
        [item] = layer.updates["default"]
        held = arrays(model, bank_of(model), "default")
        values = {label: held[param].detach() for label, param in item.site_layout.parameters.items()}
        wanted = item.scale * dense(item.site_layout.network, values)[0]
        found = layer.get_delta_weight("default")
        assert torch.allclose(found.T if path.endswith("embed_tokens") else found, wanted, rtol=0, atol=1e-12)
    found = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), found)
    model.merge_adapter()
    assert torch.allclose(logits(model), found, rtol=0, atol=1e-5 * float(found.abs().max()))
