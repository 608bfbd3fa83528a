"""The tuner inside PEFT: counts, starts, gradients, dense oracles, files, several adapters, merging."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import torch
from adapter_models import (
    MODELS,
    NETWORKS,
    adapted,
    config,
    logits,
    opt,
    shake,
)  # fmt: skip
from failing_steps import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import close
from safetensors.torch import load_file
from torch import nn

import tnpeft
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.adapters.state import bank_of
from tnpeft.counting import RankWarning
from tnpeft.networks import NetworkError

KEYS = sorted(NETWORKS)


def linears(model: nn.Module) -> dict[str, TensorNetworkLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TensorNetworkLinear)}


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_fused_attention_is_targeted_in_part() -> None:
    model = adapted("lora", MODELS["gpt2"](), target_modules=["c_attn/out:2", "c_attn/out:0"])
    shake(model)
    saved = model.peft_config["default"]
    assert saved.projections == {"c_attn/out:2": 0, "c_attn/out:0": 1}
    found = logits(model, "gpt2")
    delta = next(iter(linears(model).values())).get_delta_weight("default")  # Conv1D keeps [inp, out]
    assert delta.shape == (32, 96)
    assert [bool(delta[:, 32 * k : 32 * (k + 1)].any()) for k in range(3)] == [True, False, True]
    assert close(logits(model.merge_and_unload(), "gpt2"), found)


@pytest.mark.parametrize("replicas", [1, 2])
def test_base_weight_as_a_constant_is_not_copied(replicas: int) -> None:
    line = {"network": "d[layer proj out] ^W[layer proj out inp] -> layer proj out inp", "ranks": {}}
    line |= {"init": {"W": "base", "d": "normal(0.1)"}}
    model = adapted("lora", **line, replicas=replicas)
    held = [*model.named_parameters(), *model.named_buffers()]
    assert {name.rpartition(".")[2] for name, _ in held if "tnpeft_" in name} == {"d"}
    ids = torch.arange(8)[None]
    found = model(input_ids=torch.cat([ids] * replicas)).logits
    for k in range(replicas):
        one = adapted("lora", **line, seed=k)
        torch.testing.assert_close(found[k : k + 1], one(input_ids=ids).logits)
        module = next(module for name, module in linears(one).items() if name.endswith("0.self_attn.q_proj"))
        scale = tnpeft.factors(one)["d"][0, 0]
        assert close(module.get_delta_weight("default"), scale[:, None] * module.base_layer.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_stay_fp32_on_a_half_precision_base(dtype: torch.dtype) -> None:
    model = adapted("mixed", opt().to(dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    shake(model)
    assert logits(model).dtype == dtype
    low = adapted("mixed", opt().to(dtype)).base_model
    low._cast_adapter_dtype("default", autocast_adapter_dtype=False)
    assert {p.dtype for p in low.parameters()} == {dtype}


def test_autocast_runs() -> None:
    model = adapted("mixed")
    shake(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    wanted = logits(model)
    assert float((found.float() - wanted).abs().max()) < 2**-7 * float(wanted.abs().max())


def test_rank_pattern_changes_some_projections() -> None:
    model = adapted("lora", rank_pattern={"v_proj": {"r": 1}})
    shapes = {n.split(".")[-4] + n[-1]: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert shapes == {"q_projB": (32, 3), "q_projA": (3, 32), "v_projB": (32, 1), "v_projA": (1, 32)}


@pytest.mark.parametrize("pattern", [{"v_proj": {"a": 2}}, {"v_proj": {"b": 1}}, {"v_proj": {"a": 3, "b": 2}}])
def test_rank_pattern_leaves_shared_factors_shared(pattern: dict[str, dict[str, int]], tmp_path: Path) -> None:
    model = adapted("mixed", rank_pattern=pattern)
    a, b = pattern["v_proj"].get("a", 3), pattern["v_proj"].get("b", 2)
    shared = 32 * 3 + (32 * a if a != 3 else 0) + 32 * 2 + (32 * b if b != 2 else 0)
    assert trainable(model) == shared + 2 * (3 * 2 + a * b)
    shake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(opt(), tmp_path)), logits(model))


# ---- files


@pytest.mark.parametrize("low", [False, True])
def test_loading_over_bf16_keeps_fp32_values(low: bool, tmp_path: Path) -> None:
    model = adapted("mixed")
    shake(model)
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(opt().to(torch.bfloat16), tmp_path, low_cpu_mem_usage=low)
    for name, value in tnpeft.factors(model).items():
        assert torch.equal(tnpeft.factors(other)[name], value)


def test_config_is_plain_readable_data() -> None:
    its = config("cp", splits={"out": (4, None)}, lr_multiplier={"w": 16})
    again = tnpeft.TensorNetworkConfig(**json.loads(json.dumps(its.to_dict())))
    assert again.factorization == its.factorization
    assert again.to_dict() == its.to_dict()
    for schema in (2, 0, None):
        data = json.loads(json.dumps(its.to_dict()))
        data["network"]["schema"] = schema
        with pytest.raises(NetworkError, match="schema"):
            tnpeft.TensorNetworkConfig(**data)


def test_frozen_factors_are_regenerated_and_checked(tmp_path: Path) -> None:
    model = adapted("vera", seed=5)
    shake(model)
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if name.endswith(".A")]
    assert torch.equal(logits(peft.PeftModel.from_pretrained(opt(), tmp_path)), logits(model))
    settings = tmp_path / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"seed": 5', '"seed": 6'))
    with pytest.raises(NetworkError, match="save_frozen"):
        peft.PeftModel.from_pretrained(opt(), tmp_path)
    kept = adapted("vera", seed=5, save_frozen=True)
    kept.save_pretrained(tmp_path / "kept")
    assert [n for n in load_file(tmp_path / "kept" / "adapter_model.safetensors") if n.endswith(".A")]
    assert torch.equal(logits(peft.PeftModel.from_pretrained(opt(), tmp_path / "kept")), logits(kept))


def test_the_order_of_projections_is_the_users_and_is_saved(tmp_path: Path) -> None:
    line = "B[out r] A[r inp] p[proj r] l[layer r] -> layer proj out inp"
    model = adapted("lora", network=line, target_modules=["v_proj", "q_proj"])
    assert model.peft_config["default"].projections == {"v_proj": 0, "q_proj": 1}
    shake(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(opt(), tmp_path)
    assert torch.equal(tnpeft.factors(again)["p"], tnpeft.factors(model)["p"])
    with pytest.raises(NetworkError, match="other layers"):
        peft.PeftModel.from_pretrained(opt(layers=3), tmp_path)


def test_model_card_says_what_to_import(tmp_path: Path) -> None:
    adapted("lora").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "import peft, tnpeft" in text
    assert "B[layer proj out r]" in text
    adapted("lora").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import peft, tnpeft") == 1


# ---- several adapters


@pytest.mark.parametrize("dora", [("second",), ("default",), ("default", "second")])
def test_magnitudes_belong_to_the_base_weight_whatever_else_is_active(dora: tuple[str, ...]) -> None:
    model = adapted("lora", dora="default" in dora)
    model.add_adapter("second", config("lora", seed=3, dora="second" in dora))
    shake(model, 1), shake(model, 2, "second")
    found = {}
    for order in (("default", "second"), ("second", "default")):
        model.base_model.set_adapter([*order])
        found[order] = logits(model)
        model.merge_adapter()
        assert close(logits(model), found[order])
        model.unmerge_adapter()
    assert close(*found.values())


TERMS = "B[layer proj out r] A[r inp] - C[out s] D[layer proj s inp] -> layer proj out inp"


@pytest.mark.parametrize("key", [*KEYS, "two terms"])
def test_weighted_sum_is_exact(key: str) -> None:
    two: dict[str, Any] = {"network": TERMS, "ranks": {"r": 2, "s": 3}} if key == "two terms" else {}
    key = "lora" if two else key
    model = adapted(key, **two)
    model.add_adapter("second", config(key, seed=3, **two))
    shake(model, 1), shake(model, 2, "second")
    deltas = {n: [m.get_delta_weight(a) for a in ("default", "second")] for n, m in linears(model).items()}
    model.base_model.add_weighted_adapter(["default", "second"], [0.7, -2.0], "sum")
    for name, module in linears(model).items():
        first, second = deltas[name]
        assert close(module.get_delta_weight("sum"), 0.7 * first - 2.0 * second)
    model.set_adapter("sum")
    with pytest.raises(NetworkError, match="exists"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize("family", ["ia3", "randlora"])
def test_a_sum_knows_only_what_the_lines_at_its_sites_name(family: str) -> None:
    """The start of the other line's factor, and a rank that is a rule over another, by the name they have in it."""
    model = adapted("lora")
    model.add_adapter("second", tnpeft.TensorNetworkConfig(network=family, target_modules=["q_proj", "v_proj"]))
    shake(model, 1), shake(model, 2, "second")
    model.base_model.add_weighted_adapter(["default", "second"], [0.7, -2.0], "sum")
    for module in linears(model).values():
        first, second = (module.get_delta_weight(name) for name in ("default", "second"))
        assert close(module.get_delta_weight("sum"), 0.7 * first - 2.0 * second)


CHOICES = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["fc1", "v_proj"]},
    {"target_modules": ["q_proj", "fc2"], "layers_to_transform": [1]},
    {"target_modules": r".*layers\.0\.fc\d"},
]


@settings(max_examples=20)
@given(
    chosen=st.lists(
        st.tuples(st.sampled_from(["lora", "mixed", "shared", "vera"]), st.sampled_from(CHOICES)),
        min_size=2,
        max_size=3,
    )
)
def test_a_weighted_sum_serves_the_sites_of_all(chosen: list[tuple[str, dict[str, object]]]) -> None:
    names, weights = [f"s{k}" for k in range(len(chosen))], [0.7, -2.0, 0.3][: len(chosen)]
    model = opt()
    for k, (name, (key, its)) in enumerate(zip(names, chosen, strict=True)):
        its = config(key, seed=k, **its)
        model = model.add_adapter(name, its) or model if k else peft.get_peft_model(model, its, adapter_name=name)
        shake(model, k, name)
    at = linears(model)
    deltas = {n: {a: m.get_delta_weight(a) for a in names if a in m.updates} for n, m in at.items()}
    model.base_model.add_weighted_adapter(names, weights, "sum")
    for name, module in at.items():
        wanted = sum(weight * deltas[name][a] for a, weight in zip(names, weights, strict=True) if a in deltas[name])
        assert close(module.get_delta_weight("sum"), wanted), name
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["sum"])
        again = peft.PeftModel.from_pretrained(opt(), f"{folder}/sum", adapter_name="sum")
    model.set_adapter("sum")
    assert close(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_odd_about_a_network_is_told_when_it_is_attached(tmp_path: Path) -> None:
    with pytest.warns(RankWarning, match="'r' is 100, but 32 is all"):
        model = adapted("lora", ranks={"r": 100})
    with pytest.warns(UserWarning, match="not zero at the start"):
        adapted("lora", network="A[out r] A[inp r] -> out inp")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RankWarning)
        adapted("lora", network="A[out r] A[inp r] -> out inp", init={"A": "normal(0.1)"})
        model.save_pretrained(tmp_path)
        peft.PeftModel.from_pretrained(opt(), tmp_path)


def test_weighted_sum_refuses_what_is_none() -> None:
    model = adapted("lora")
    with pytest.raises(NetworkError, match="combination_type is 'svd'"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum", "svd")
    model.add_adapter("tiles", config("cp"))
    with pytest.raises(NetworkError, match="differ in lines, outputs or splits"):
        model.base_model.add_weighted_adapter(["default", "tiles"], [1.0, 1.0], "sum")
    own = {"network": "B[out r] A[r inp] -> out inp", "target_modules": ["q_proj"]}  # every layer has the same update
    model.add_adapter("first", config("lora", **own, layers_to_transform=[0]))
    model.add_adapter("both", config("lora", **own))
    with pytest.raises(
        NetworkError, match=r"'first' has no site at .*layers\.1.*q_proj, and all its factors are shared"
    ):
        model.base_model.add_weighted_adapter(["both", "first"], [1.0, 1.0], "sum")
    for name, changes in {"head": {"modules_to_save": ["fc1"]}, "tokens": {"trainable_token_indices": [3]}}.items():
        model.add_adapter(name, config("lora", **changes))
        with pytest.raises(NetworkError, match=f"{name!r} trains modules, tokens or biases"):
            model.base_model.add_weighted_adapter(["default", name], [1.0, 1.0], "sum")
    assert "sum" not in {*model.peft_config, *bank_of(model).layouts}


@pytest.mark.parametrize("own", [False, True])  # a model of transformers, or PEFT's
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["fc1"], "trainable_token_indices": [3, 5]}])
def test_hotswap_changes_values_and_nothing_else(own: bool, more: dict[str, Any], tmp_path: Path) -> None:
    one, two = opt() if own else adapted("mixed", **more), adapted("mixed", **more)
    if own:
        one.add_adapter(config("mixed", **more))
    for seed, model in enumerate((one, two)):
        shake(model, seed)
        for parameter in model.parameters():
            parameter.data += 0.01 * (seed + 1) * parameter.requires_grad
    two.save_pretrained(tmp_path)
    identities = {n: id(p) for n, p in one.named_parameters()}
    assert not torch.equal(logits(one), logits(two))
    tnpeft.hotswap(one, str(tmp_path))
    assert torch.equal(logits(one), logits(two))
    assert {n: id(p) for n, p in one.named_parameters()} == identities
    adapted("mixed" if more else "lora").save_pretrained(tmp_path)
    with refused(one, "another trainable_token_indices" if more else "another network"):
        tnpeft.hotswap(one, str(tmp_path))


# ---- merging


@pytest.mark.parametrize("key", KEYS)
def test_merging_in_turn_equals_merging_at_once_and_rounds_little(key: str) -> None:
    one, two = (adapted(key, opt().to(torch.bfloat16)) for _ in range(2))
    for model in (one, two):
        model.add_adapter("second", config(key, seed=3))
        shake(model, 1), shake(model, 2, "second")
    found = logits(one)
    one.merge_adapter(["default"])
    assert close(logits(one), found, 64)
    with pytest.warns(UserWarning, match="additionally merging second"):
        one.merge_adapter(["second"])
    two.merge_adapter(["default", "second"])
    assert all(torch.equal(v, two.state_dict()[n]) for n, v in one.state_dict().items())


# ---- copies, casts, factors


def test_learning_rates_follow_the_multipliers() -> None:
    model = adapted("mixed", lr_multiplier={"G": 16})
    groups = {group["name"]: group for group in tnpeft.parameter_groups(model, lr=0.5, weight_decay=0.1)}
    assert {name: group["lr"] for name, group in groups.items()} == {"U": 0.5, "G": 8.0, "V": 0.5}
    assert sum(p.numel() for group in groups.values() for p in group["params"]) == trainable(model)
    assert all(group["weight_decay"] == 0.1 for group in groups.values())


IN_A_MODEL = [n for n in tnpeft.families.names() if set(tnpeft.families.get(n)().network.stack) <= {"layer", "proj"}]


@pytest.mark.parametrize("family", IN_A_MODEL)
def test_every_family_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = adapted("lora", network=family, ranks=None)
    shake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(opt(), tmp_path)), logits(model))
