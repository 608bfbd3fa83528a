"""The tuner inside PEFT: counts, starts, gradients, dense oracles, files, several adapters, merging."""

from __future__ import annotations

import copy
import json
import pickle
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
    TARGETS,
    adapted,
    config,
    inputs,
    logits,
    opt,
    shake,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import close, dense
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


# ---- start


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("key", KEYS)
def test_identity_at_start_and_gradient_reaches(key: str, name: str) -> None:
    base = MODELS[name]()
    before = logits(base, name)
    model = adapted(key, base, target_modules=TARGETS[name])
    assert torch.equal(logits(model, name), before)
    model(**inputs(name)).logits.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all("tnpeft_" in n for n in grads)
    assert any(bool(g.abs().max() > 0) for g in grads.values() if g is not None)
    shake(model)
    model.zero_grad()
    model(**inputs(name)).logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("key", KEYS)
def test_count_is_trainable_is_stored(key: str, tmp_path: Path) -> None:
    model = adapted(key, target_modules=["q_proj", "v_proj", "fc1"])
    layout = bank_of(model).layouts["default"]
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert layout.count() == trainable(model) == sum(value.numel() for value in stored.values())
    assert sum(p.size for p in layout.parameters if p.kind == "trainable") == layout.count()


def test_counts_agree_with_the_published_ones() -> None:
    f = tnpeft.families.get("cp")(rank=1, out=(32, 64), inp=(32, 64))
    assert tnpeft.parameters(f, model="facebook/opt-1.3b", targets=["q_proj", "v_proj"]) == 9264


def test_only_adapter_parameters_train() -> None:
    model = adapted("mixed").train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    shake(model)
    optimizer = torch.optim.SGD(tnpeft.parameter_groups(model, lr=0.1))
    model(**inputs()).logits.square().mean().backward()
    before = tnpeft.factors(model)
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(not torch.equal(value, before[name]) for name, value in tnpeft.factors(model).items())


# ---- dense oracles


@pytest.mark.parametrize("key", KEYS)
def test_delta_is_the_einsum_of_the_factors(key: str) -> None:
    model = adapted(key)
    shake(model)
    factors = tnpeft.factors(model)
    for name in model.peft_config["default"].factorization.unit_norm:
        axis = {"A": 2, "B": 2, "C": 2, "D": 2}[name]
        factors[name] = factors[name] / factors[name].norm(dim=axis, keepdim=True)
    f = model.peft_config["default"].factorization
    stack = f.scale * dense(f.network, factors).float()
    for name, module in linears(model).items():
        layer, proj = int(name.split("layers.")[1].split(".")[0]), ["q_proj", "v_proj"].index(name.split(".")[-1])
        assert close(module.get_delta_weight("default"), stack[layer, proj])


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("key", KEYS)
def test_forward_is_the_base_with_the_delta_added(key: str, name: str) -> None:
    model = adapted(key, MODELS[name](), target_modules=TARGETS[name])
    shake(model)
    found = logits(model, name)
    with model.disable_adapter():
        without = logits(model, name)
    plain = MODELS[name]()
    assert torch.equal(without, logits(plain, name))
    for path, module in linears(model).items():
        weight = plain.get_submodule(path.removeprefix("base_model.model.")).weight
        weight.data += module.get_delta_weight("default")
    assert close(found, logits(plain, name)), (found - logits(plain, name)).abs().max()
    assert not close(found, without)


def test_square_slices_serve_both_sides() -> None:
    line = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
    model = adapted("lora", network=line, square=True, target_modules=["fc1", "fc2", "q_proj"])
    shake(model)
    layout = bank_of(model).layouts["default"]
    assert {p.site.proj for p in layout.site_layouts} == {
        "q_proj",
        "fc1/out:0",
        "fc1/out:1",
        "fc2/inp:0",
        "fc2/inp:1",
    }
    found = logits(model)
    assert close(logits(model.merge_and_unload()), found)


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


def test_base_weight_as_a_constant_is_not_copied() -> None:
    line = "d[layer proj out] ^W[layer proj out inp] -> layer proj out inp"
    model = adapted("lora", network=line, ranks={}, init={"W": "base"})
    assert not [n for n, _ in model.named_buffers() if "tnpeft" in n]
    shake(model)
    module = next(module for name, module in linears(model).items() if name.endswith("0.self_attn.q_proj"))
    scale = tnpeft.factors(model)["d"][0, 0]
    assert close(module.get_delta_weight("default"), scale[:, None] * module.base_layer.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_stay_fp32_on_a_half_precision_base(dtype: torch.dtype) -> None:
    model = adapted("mixed", opt().to(dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    shake(model)
    assert torch.equal(torch.stack([*tnpeft.factors(model).values()][:1]), torch.stack([tnpeft.factors(model)["U"]]))
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


def test_dropout_acts_in_training_only() -> None:
    model = adapted("lora", dropout=0.5)
    shake(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(logits(model), logits(model))


def test_dora_normalises_the_rows() -> None:
    model = adapted("lora", dora=True)
    start = logits(opt())
    assert close(logits(model), start)
    shake(model)
    module = next(iter(linears(model).values()))
    with torch.no_grad():
        module.tnpeft_magnitude["default"].mul_(1.5)
    weight = module.base_layer.weight + module._delta("default")
    wanted = 1.5 * module.base_layer.weight.norm(dim=1, keepdim=True) * weight / weight.norm(dim=1, keepdim=True)
    assert close(module.base_layer.weight + module.get_delta_weight("default"), wanted)
    found = logits(model)
    assert close(logits(model.merge_and_unload()), found)


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


@pytest.mark.parametrize("key", KEYS)
def test_save_load_save_gives_the_same_bytes(key: str, tmp_path: Path) -> None:
    model = adapted(key)
    shake(model)
    found = logits(model)
    model.save_pretrained(tmp_path / "one")
    other = peft.PeftModel.from_pretrained(opt(), tmp_path / "one", adapter_name="other")
    assert torch.equal(logits(other), found)
    other.save_pretrained(tmp_path / "two")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / "other" / file).read_bytes()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": {"r": 10**12}}, "elements"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": 0}, "zero for ever"),
        ({"ranks": 4}, "ranks is 4"),
        ({"unit_norm": ["A", "B"]}, "unit norm, and starts at zero"),
        ({"network": "~B[out r] ~A[r inp] -> out inp"}, "nothing to train"),
        ({"dropout": 1.0}, "dropout"),
        ({"seed": -1}, "seed"),
        ({"bias": "some"}, "bias"),
        ({"network": 3}, "network"),
        ({"network": "no_such_family"}, "family"),
        ({"network": {"schema": 1}}, "lines"),
        ({"init": {"B": "zeros", "A": "zeros"}}, "zero"),
        ({"ranks": {"r": 0}}, "size"),
        ({"rank_pattern": {"v_proj": 1}}, "rank pattern"),
        ({"rank_pattern": {"v_proj": {"q": 1}}}, "not a bond"),
        ({"rank_pattern": {"V_proj": {"r": 1}}}, "names 'V_proj'.*\n.*are q_proj, v_proj$"),
        ({"rank_pattern": {"q_proj | k_proj": {"r": 1}}}, "names 'k_proj'"),
        ({"rank_pattern": {"*_proj": {"r": 1}, "v_proj": {"r": 2}}}, "'v_proj' is never used"),
        ({"rank_pattern": {"q_proj": {"r": 1}}, "square": True, "target_modules": ["fc1"]}, "are fc1/out:0"),
    ],
)
def test_hostile_values_are_refused(change: dict[str, object], message: str) -> None:
    base = opt()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(NetworkError, match=message):
        adapted("lora", base, **change)
    assert [name for name, _ in base.named_modules()] == before


@pytest.mark.parametrize("kind", ["truncated", "shape", "missing", "line"])
def test_damaged_files_leave_the_model_unchanged(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    adapted("mixed").save_pretrained(tmp_path)
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    values = load_file(file)
    first = sorted(values)[0]
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "line":
        data = json.loads(settings.read_text())
        data["network"]["ranks"]["a"] = 2
        settings.write_text(json.dumps(data))
    else:
        values[first] = torch.zeros(2, 2)
        save_file({n: v for n, v in values.items() if kind == "shape" or n != first}, file)
    base = opt()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(NetworkError):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names
    model = adapted("lora")
    with pytest.raises(NetworkError):
        model.load_adapter(tmp_path, "second")
    assert [*model.peft_config] == [*bank_of(model).layouts] == ["default"]


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


@pytest.mark.parametrize("key", KEYS)
def test_a_second_adapter_trains_as_many_and_leaves_nothing(key: str) -> None:
    model = adapted(key)
    count, names = trainable(model), [n for n, _ in model.named_parameters()]
    shake(model)
    first = logits(model)
    model.add_adapter("second", config(key, seed=3))
    assert trainable(model) == count
    model.set_adapter("second")
    assert trainable(model) == count
    assert torch.equal(logits(model), logits(opt()))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert [n for n, _ in model.named_parameters()] == names
    assert not [n for n, _ in model.named_buffers() if "second" in n]
    assert all("second" not in module.updates for module in linears(model).values())
    assert model.get_model_status().active_adapters == ["default"]


def test_several_active_adapters_add_up() -> None:
    model = adapted("lora")
    model.add_adapter("second", config("lora", seed=3))
    shake(model, 1), shake(model, 2, "second")
    model.base_model.set_adapter(["default", "second"])
    found = logits(model)
    assert close(logits(model.merge_and_unload()), found)


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


def test_mixed_batches_give_each_row_its_adapter() -> None:
    model = adapted("mixed")
    model.add_adapter("second", config("mixed", seed=3))
    shake(model, 1), shake(model, 2, "second")
    rows = {"default": logits(model)}
    model.set_adapter("second")
    rows["second"] = logits(model)
    with model.disable_adapter():
        rows["__base__"] = logits(model)
    for pair in (["default", "second"], ["__base__", "default"], ["second", "__base__"]):
        mixed = logits(model, adapter_names=pair)
        assert all(close(mixed[k], rows[name][k]) for k, name in enumerate(pair))
    with pytest.raises(NetworkError, match="unknown adapter"):
        logits(model, adapter_names=["default", "third"])


@pytest.mark.parametrize("key", KEYS)
def test_weighted_sum_is_exact(key: str) -> None:
    model = adapted(key)
    model.add_adapter("second", config(key, seed=3))
    shake(model, 1), shake(model, 2, "second")
    deltas = {n: [m.get_delta_weight(a) for a in ("default", "second")] for n, m in linears(model).items()}
    model.base_model.add_weighted_adapter(["default", "second"], [0.7, -2.0], "sum")
    for name, module in linears(model).items():
        first, second = deltas[name]
        assert close(module.get_delta_weight("sum"), 0.7 * first - 2.0 * second)
    model.set_adapter("sum")
    with pytest.raises(NetworkError, match="exists"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")


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


def test_hotswap_changes_values_and_nothing_else(tmp_path: Path) -> None:
    from tnpeft.adapters import hotswap

    one, two = adapted("mixed"), adapted("mixed")
    shake(one, 1), shake(two, 2)
    two.save_pretrained(tmp_path)
    identities = {n: id(p) for n, p in one.named_parameters()}
    hotswap(one, str(tmp_path))
    assert torch.equal(logits(one), logits(two))
    assert {n: id(p) for n, p in one.named_parameters()} == identities
    with pytest.raises(NetworkError, match="another network"):
        hotswap(adapted("lora"), str(tmp_path))


def test_hotswap_takes_what_is_trained_besides_or_refuses(tmp_path: Path) -> None:
    from tnpeft.adapters import hotswap

    more: dict[str, Any] = {"modules_to_save": ["fc1"], "trainable_token_indices": [3, 5]}
    one, two = adapted("mixed", **more), adapted("mixed", **more)
    with torch.no_grad():
        for seed, model in enumerate((one, two)):
            shake(model, seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * (seed + 1))
    two.save_pretrained(tmp_path)
    hotswap(one, str(tmp_path))
    assert torch.equal(logits(one), logits(two))
    adapted("mixed").save_pretrained(tmp_path)
    with pytest.raises(NetworkError, match="another trainable_token_indices"):
        hotswap(one, str(tmp_path))
    assert torch.equal(logits(one), logits(two))


def test_an_adapter_called_as_a_factor_is_refused() -> None:
    model = adapted("lora")
    with pytest.raises(NetworkError, match="one of the factors"):
        model.add_adapter("B", config("lora"))
    assert [*model.peft_config] == ["default"]


@pytest.mark.parametrize("name", ["my.adapter", "tnpeft_factors"])
def test_adapter_names_that_no_file_could_hold_are_refused(name: str) -> None:
    base = opt()
    with pytest.raises(NetworkError, match="no adapter can be called"):
        peft.get_peft_model(base, config("lora"), adapter_name=name)
    assert [n for n, _ in base.named_modules()] == [n for n, _ in opt().named_modules()]


# ---- merging


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge_restore_the_weights_bit_for_bit(key: str, dtype: torch.dtype) -> None:
    model = adapted(key, opt().to(dtype))
    model.add_adapter("second", config(key, seed=3))
    shake(model, 1), shake(model, 2, "second")
    found = logits(model)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    model.merge_adapter(["default"])
    assert bool((logits(model) - found).abs().max() <= 64 * torch.finfo(dtype).eps * found.abs().max())
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    assert model.get_model_status().merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert torch.equal(logits(model), found)


def test_merging_in_turn_equals_merging_at_once() -> None:
    one, two = (adapted("lora", opt().to(torch.bfloat16)) for _ in range(2))
    for model in (one, two):
        model.add_adapter("second", config("lora", seed=3))
        shake(model, 1), shake(model, 2, "second")
    one.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        one.merge_adapter(["second"])
    two.merge_adapter(["default", "second"])
    assert all(torch.equal(v, two.state_dict()[n]) for n, v in one.state_dict().items())


def test_safe_merge_refuses_and_changes_nothing() -> None:
    model = adapted("lora")
    shake(model)
    found = {n: v.clone() for n, v in model.state_dict().items()}
    last = [*linears(model).values()][-1]
    with torch.no_grad():
        last.tnpeft_factors["default"].get("B")[0, 0] = float("inf")
    with pytest.raises(NetworkError, match="not a number"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(v, found[n]) for n, v in model.state_dict().items() if "tnpeft" not in n)
    assert not any(module.merged for module in linears(model).values())


def test_disabling_a_merged_adapter_gives_the_base_model() -> None:
    model = adapted("lora")
    shake(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(opt()))


def test_unload_leaves_the_base_model() -> None:
    model = adapted("mixed")
    shake(model)
    model.merge_adapter()
    plain = model.unload()
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in opt().named_modules()]
    assert all(torch.equal(v, opt().state_dict()[n]) for n, v in plain.state_dict().items())
    assert not plain._forward_pre_hooks


# ---- copies, casts, factors


def test_copies_and_casts_keep_sharing() -> None:
    model = adapted("mixed")
    shake(model)
    found, count = logits(model), len({p.data_ptr() for p in model.parameters()})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), found)
        assert len({p.data_ptr() for p in twin.parameters()}) == count
        assert all(m.bank is bank_of(twin) for m in linears(twin).values())
        assert bank_of(twin) is not bank_of(model)
        shake(twin, 9)
        assert torch.equal(logits(model), found)
    model.double().float()
    assert len({p.data_ptr() for p in model.parameters()}) == count
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize("key", KEYS)
def test_set_factors_is_the_inverse_of_factors(key: str) -> None:
    one, two = adapted(key), adapted(key)
    shake(one)
    tnpeft.set_factors(two, tnpeft.factors(one))
    assert torch.equal(logits(one), logits(two))
    with pytest.raises(NetworkError, match="no factor"):
        tnpeft.set_factors(two, {"Z": torch.zeros(1)})
    name, value = next(iter(tnpeft.factors(one).items()))
    with pytest.raises(NetworkError, match="shape"):
        tnpeft.set_factors(two, {name: value[None]})


def test_shared_gradient_is_the_sum_of_the_layers() -> None:
    model = adapted("mixed").double()
    shake(model)
    model(**inputs()).logits.square().sum().backward()
    shared = bank_of(model).tnpeft_factors["default"].get("U")
    parts = torch.zeros_like(shared)
    step = 1e-5
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(shared.shape, generator=generator, dtype=shared.dtype)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            shared += sign * step * direction
            values.append(model(**inputs()).logits.square().sum())
            shared -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert parts.shape == shared.shape
    assert abs(float((shared.grad * direction).sum() - slope)) <= 1e-6 * abs(float(slope))


def test_learning_rates_follow_the_multipliers() -> None:
    model = adapted("mixed", lr_multiplier={"G": 16})
    groups = {group["name"]: group for group in tnpeft.parameter_groups(model, lr=0.5, weight_decay=0.1)}
    assert {name: group["lr"] for name, group in groups.items()} == {"U": 0.5, "G": 8.0, "V": 0.5}
    assert sum(p.numel() for group in groups.values() for p in group["params"]) == trainable(model)
    assert all(group["weight_decay"] == 0.1 for group in groups.values())


IN_A_MODEL = [n for n in tnpeft.families.names() if set(tnpeft.families.get(n)().network.stack) <= {"layer", "proj"}]


@pytest.mark.parametrize("family", IN_A_MODEL)
def test_every_family_attaches_trains_saves_and_merges(family: str, tmp_path: Path) -> None:
    model = adapted("lora", network=family, ranks=None)
    count = bank_of(model).layouts["default"].count()
    magnitude = float((logits(model) - logits(opt())).abs().max())
    shake(model)
    model(**inputs()).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    found = logits(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in stored.values()) == count == trainable(model)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(opt(), tmp_path)), found)
    assert close(logits(model.merge_and_unload()), found, roundings=512)
    assert magnitude >= 0


def test_adapters_of_other_targets_and_networks_live_side_by_side(tmp_path: Path) -> None:
    model = adapted("mixed")
    model.add_adapter("second", config("shared", target_modules=["fc1", "v_proj"]))
    shake(model, 1), shake(model, 2, "second")
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path)
    alone = peft.PeftModel.from_pretrained(opt(), tmp_path / "second")
    assert torch.equal(logits(alone), second)
    alone.load_adapter(tmp_path, "default_again")
    alone.set_adapter("default_again")
    assert torch.equal(logits(alone), first)
    alone.delete_adapter("default")
    assert {*bank_of(alone, "default_again").layouts} == {"default_again"}
    assert torch.equal(logits(alone), first)


def test_a_classification_head_is_trained_and_saved(tmp_path: Path) -> None:
    def classifier() -> nn.Module:
        from transformers import OPTForSequenceClassification

        torch.manual_seed(0)
        return OPTForSequenceClassification(opt().config).eval()

    model = peft.get_peft_model(classifier(), config("mixed", task_type="SEQ_CLS"))
    assert any("score" in name for name, p in model.named_parameters() if p.requires_grad)
    shake(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_one_configuration_serves_models_of_several_depths() -> None:
    its = config("mixed")
    for layers in (2, 3):
        model = peft.get_peft_model(opt(layers=layers), its)
        assert set(model.peft_config["default"].layers.values()) == set(range(layers))


def test_twins_start_at_zero_and_merge() -> None:
    line = "G[layer proj out r] H[r inp] - ~G[layer proj out r] ~H[r inp] -> layer proj out inp"
    model = adapted("lora", network=line, ranks={"r": 3})
    assert close(logits(model), logits(opt()), roundings=8)
    shake(model)
    found = logits(model)
    assert close(logits(model.merge_and_unload()), found)
