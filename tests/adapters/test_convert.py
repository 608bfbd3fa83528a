"""Converting adapters: round trips of drawn adapters of every format, what PEFT computes, and hostile files."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapter_models import llama, opt
from expert_models import mixture
from safetensors.torch import load_file, save_file
from torch import nn

import tnpeft
from tnpeft.adapters.convert import formats, run
from tnpeft.adapters.convert.lines import pack, parse, unpack
from tnpeft.networks import AdapterFileError, ConfigError

TENSORS = "adapter_model.safetensors"
IDS = torch.arange(10).reshape(2, 5)
DRAWS = 50


def drawn(method: str, rng: random.Random) -> peft.PeftConfig:
    """A configuration of the method with drawn ranks, alphas and targets; scales that differ are powers of two."""
    targets = rng.sample(["q_proj", "v_proj", "k_proj", "fc1", "fc2"], rng.randint(1, 4))
    rank, alpha = rng.choice([1, 2, 4]), rng.choice([1, 3, 8, 16])
    if method == "LoRA":
        pattern = {rng.choice(["layers.1.self_attn.q_proj", "fc1", "v_proj"]): 2 * rank} if rng.random() < 0.5 else {}
        return peft.LoraConfig(r=rank, lora_alpha=alpha, rank_pattern=pattern, target_modules=targets)
    if method == "rsLoRA":
        return peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=True, target_modules=targets)
    if method == "DoRA":
        return peft.LoraConfig(r=rank, lora_alpha=alpha, use_dora=True, target_modules=targets)
    if method == "LoHa":
        return peft.LoHaConfig(r=rank, alpha=alpha, target_modules=targets)
    if method == "LoKr":
        options = {"decompose_both": rng.random() < 0.5, "decompose_factor": rng.choice([-1, 2, 4])}
        return peft.LoKrConfig(r=rank, alpha=alpha, target_modules=targets, **options)
    if method == "VeRA":
        return peft.VeraConfig(r=4 * rank, projection_prng_key=rng.randint(0, 99), target_modules=targets)
    if method == "RandLoRA":
        return peft.RandLoraConfig(r=2 * rank, randlora_alpha=alpha, target_modules=targets)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"][: rng.randint(1, 2)]
    also = rng.choice([[], ["q_proj"]])
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=also, target_parameters=experts)


def trained(config: peft.PeftConfig, base: nn.Module, seed: int) -> Any:
    """An adapted model whose trainable parameters are all drawn."""
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) / 3
    return model


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.detach()


METHODS = ["LoRA", "rsLoRA", "DoRA", "LoHa", "LoKr", "VeRA", "RandLoRA", "target_parameters"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_round_trips_of_drawn_peft_adapters(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        peft.PeftModel, "create_or_update_model_card", lambda *_: None
    )  # it takes as long as the rest
    make = mixture if method == "target_parameters" else opt
    base = make()
    for seed in range(DRAWS):
        base = make() if method == "target_parameters" else base  # unloading would turn its parameters round
        rng = random.Random(f"{method}{seed}")
        model = trained(drawn(method, rng), base, seed)
        reloaded = seed % 10 == 0  # the bits of every file are compared below
        wanted = logits(model) if reloaded else None
        folder = tmp_path / str(seed)
        model.save_pretrained(folder / "peft")
        model.unload()
        there = tnpeft.convert(folder / "peft", folder / "lines", model=base)
        back = tnpeft.convert(folder / "lines", folder / "back", to="peft", model=base)
        before, after = load_file(folder / "peft" / TENSORS), load_file(folder / "back" / TENSORS)
        shared = {name for name in before if name.endswith(("randlora_A", "randlora_B"))}
        assert set(before) - shared == set(after) - shared
        for name, value in after.items():  # scales that a rank pattern sets apart are powers of two
            used = value != 0 if name.endswith(("randlora_A", "randlora_B")) else torch.ones_like(value, dtype=bool)
            assert before[name].shape == value.shape
            assert torch.equal(before[name][used], value[used]), (name, there, back)
        if reloaded:
            loaded = peft.PeftModel.from_pretrained(make(), folder / "back").eval()
            assert torch.equal(logits(loaded), wanted)
            if method != "target_parameters":
                loaded = peft.PeftModel.from_pretrained(make(), folder / "lines").eval()
                assert torch.allclose(logits(loaded), wanted, atol=1e-5)
        shutil.rmtree(folder)


def state(kind: str, rng: random.Random, seed: int) -> dict[str, torch.Tensor]:
    """A trainer's file: drawn ranks and shapes in the names of kohya and LyCORIS."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for name in ("self_attn_q_proj", "mlp_fc1"):
            out, inp, rank, o1 = (rng.choice(its) for its in ([12, 16, 24], [8, 12, 18], [1, 2, 3], [2, 4]))
            low = {"a": (out, rank), "b": (rank, inp)}
            if kind == "kohya":
                sizes = {"lora_up.weight": low["a"], "lora_down.weight": low["b"]}
            elif kind == "loha":
                sizes = {f"hada_w{k}_{side}": shape for k in (1, 2) for side, shape in low.items()}
            elif rng.random() < 0.4:
                sizes = {"lokr_w1": (o1, 2), "lokr_w2": (out // o1, inp // 2)}
            else:
                sizes = {"lokr_w1": (o1, 2), "lokr_w2_a": (out // o1, rank), "lokr_w2_b": (rank, inp // 2)}
            prefix = f"lora_te_text_model_encoder_layers_{layer}_{name}"
            tensors |= {f"{prefix}.{end}": torch.randn(shape, generator=generator) for end, shape in sizes.items()}
            if "lokr_w2" not in sizes:
                tensors[f"{prefix}.alpha"] = torch.tensor(float(rng.choice([1, 2, 4]) * rank))
    return tensors


@pytest.mark.parametrize(("kind", "to"), [("kohya", "kohya"), ("loha", "lycoris"), ("lokr", "lycoris")])
def test_round_trips_of_drawn_trainers_files(kind: str, to: str, tmp_path: Path) -> None:
    for seed in range(DRAWS):
        rng = random.Random(f"{kind}{seed}")
        before = state(kind, rng, seed)
        path = tmp_path / f"{seed}.safetensors"
        save_file(before, path)
        tnpeft.convert(path, tmp_path / f"{seed}-back.safetensors", to=to)
        after = load_file(tmp_path / f"{seed}-back.safetensors")
        assert set(after) == set(before)
        assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_trainers_file_becomes_an_adapter_of_a_model(tmp_path: Path) -> None:
    base, flat = opt(), {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        name = f"lora_te_model_decoder_layers_{layer}_self_attn_q_proj"
        flat[f"{name}.lora_up.weight"] = torch.randn(32, 2, generator=generator)
        flat[f"{name}.lora_down.weight"] = torch.randn(2, 32, generator=generator)
        flat[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(flat, tmp_path / "kohya.safetensors")
    tnpeft.convert(tmp_path / "kohya.safetensors", tmp_path / "lines", model=base)
    tnpeft.convert(tmp_path / "lines", tmp_path / "peft", to="peft")
    weight = base.model.decoder.layers[1].self_attn.q_proj.weight.detach().clone()
    merged = peft.PeftModel.from_pretrained(opt(), tmp_path / "peft").merge_and_unload()
    update = 0.5 * flat[f"{name}.lora_up.weight"] @ flat[f"{name}.lora_down.weight"]
    assert torch.allclose(merged.model.decoder.layers[1].self_attn.q_proj.weight, weight + update, atol=1e-6)
    with pytest.raises(ConfigError, match="no linear that lora_te_model"):
        tnpeft.convert(tmp_path / "kohya.safetensors", tmp_path / "other", model=llama())


def three_dimensional(shared: str, seed: int, folder: Path) -> None:
    """A folder with adapters over experts as 3-D tensors; ``shared`` names the side that all experts share."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rank, experts = rng.choice([1, 2, 4]), rng.choice([2, 3, 5])
    tensors = {}
    for layer in range(2):
        for name, out, inp in (("gate_up_proj", 20, 8), ("down_proj", 8, 10)):
            path = f"base_model.model.model.layers.{layer}.mlp.experts.{name}"
            outer = {"": "", "outer": "A" if name == "gate_up_proj" else "B"}[shared]
            lead = {side: 1 if side == outer else experts for side in "AB"}
            tensors[f"{path}.lora_A.weight"] = torch.randn(lead["A"], rank, inp, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(lead["B"], out, rank, generator=generator)
    peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["experts"]).save_pretrained(folder)
    save_file(tensors, folder / TENSORS)


@pytest.mark.parametrize("shared", ["", "outer"])
def test_round_trips_of_drawn_adapters_over_experts(shared: str, tmp_path: Path) -> None:
    to = "shared_outer" if shared else "per_expert"
    for seed in range(DRAWS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        three_dimensional(shared, seed, folder / "a")
        tnpeft.convert(folder / "a", folder / "lines")
        tnpeft.convert(folder / "lines", folder / "back", to=to)
        before, after = load_file(folder / "a" / TENSORS), load_file(folder / "back" / TENSORS)
        assert set(before) == set(after)
        assert all(torch.equal(before[name], value) for name, value in after.items())
        tnpeft.convert(folder / "a", folder / "peft", to="peft")  # a shared side is repeated for every expert
        tnpeft.convert(folder / "peft", folder / "own", to="per_expert")
        own = load_file(folder / "own" / TENSORS)
        for name, value in before.items():
            assert torch.equal(own[name], value.expand(own[name].shape)), name
        shutil.rmtree(folder)


def test_our_file_names_the_axes(tmp_path: Path) -> None:
    from safetensors import safe_open

    three_dimensional("outer", 0, tmp_path / "a")
    tnpeft.convert(tmp_path / "a", tmp_path / "lines")
    with safe_open(tmp_path / "lines" / TENSORS, framework="pt") as file:
        axes = json.loads(file.metadata()["tnpeft_converted"])["axes"]
        name = "base_model.model.model.layers.0.mlp.experts.down_proj.tnpeft_factors.A"
        assert len(file.get_slice(name).get_shape()) == 3
    assert set(axes) == {"A", "B"}


TWICE = "B[layer proj out r] A[layer proj r inp] A[layer proj r inp] -> layer proj out inp"  # as tensor_guide does


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", ["lora", "tucker", "moslora", "tied_lora", "tensor_guide", TWICE])
def test_other_lines_become_plain_lora_through_their_cut(network: str, tmp_path: Path) -> None:
    twice = network in ("tensor_guide", TWICE)
    f = TWICE if network == TWICE else tnpeft.families.get(network)(2 if twice else 3)
    targets = ["q_proj"] if twice else ["q_proj", "v_proj"]
    its = {"target_modules": targets, "save_frozen": twice, "ranks": {"r": 2} if network == TWICE else None}
    model = trained(tnpeft.TensorNetworkConfig(network=f, **its), opt(), 1)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "own")
    base = {"to": "lora", "model": opt()} if twice else {"to": "peft"}
    assert tnpeft.convert(tmp_path / "own", tmp_path / "peft", **base).difference < 1e-5
    loaded = peft.PeftModel.from_pretrained(opt(), tmp_path / "peft").eval()
    assert torch.allclose(logits(loaded), wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_gguf_holds_the_updates_with_llama_cpps_order_of_rows(tmp_path: Path) -> None:
    import gguf

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    model = trained(config, llama(), 0)
    model.save_pretrained(tmp_path / "peft")
    done = tnpeft.convert(tmp_path / "peft", tmp_path / "lora.gguf", to="gguf", model=llama())
    assert done.difference < 1e-6
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["general.architecture"].contents() == "llama"
    stored = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    b = load_file(tmp_path / "peft" / TENSORS)["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    by_hand = np.concatenate(
        [np.stack([head[:4], head[4:]], 1).reshape(8, -1) for head in b.numpy().reshape(4, 8, -1)]
    )  # of every head the halves, pair by pair
    np.testing.assert_array_equal(stored["blk.1.attn_q.weight.lora_b"], by_hand)
    with pytest.raises(ConfigError, match="names the architecture"):
        tnpeft.convert(tmp_path / "peft", tmp_path / "other.gguf", to="gguf")


# ---- what must not be written


def folders(path: Path) -> set[str]:
    return {os.path.join(at, name) for at, _, names in os.walk(path) for name in names}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"])
    trained(config, opt(), 0).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def change_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**data, **changes}))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


HOSTILE = {
    "truncated": lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]),
    "cut header": lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:50]),
    "empty": lambda f: (f / TENSORS).write_bytes(b""),
    "no file": lambda f: (f / TENSORS).unlink(),
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "config is a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "config is cut": lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"'),
    "unknown method": lambda f: change_config(f, peft_type="PROMPT_TUNING"),
    "another rank": lambda f: change_config(f, r=3),
    "rank of text": lambda f: change_config(f, r="8"),
    "rank zero": lambda f: change_config(f, r=0),
    "alpha missing": lambda f: change_config(f, lora_alpha=None),
    "alpha infinite": lambda f: change_config(f, lora_alpha=float("inf")),
    "alpha beyond floats": lambda f: change_config(f, lora_alpha=10**400),
    "broken pattern": lambda f: change_config(f, rank_pattern={"(": 4}),
    "pattern is a list": lambda f: change_config(f, rank_pattern=[1]),
    "trained biases": lambda f: change_config(f, bias="all"),
    "parameters of a number": lambda f: change_config(f, target_parameters=5),
    "a model's name beyond what files have": lambda f: change_config(f, base_model_name_or_path="x" * 5000, r=0),
    "eight bits": lambda f: change_tensors(f, lambda t: t.update({first(t): t[first(t)].to(torch.float8_e4m3fn)})),
    "moved base": lambda f: change_config(f, init_lora_weights="pissa_niter_4"),
    "not finite": lambda f: change_tensors(f, lambda t: t[first(t)].fill_(float("nan"))),
    "integers": lambda f: change_tensors(f, lambda t: t.update({first(t): t[first(t)].int()})),
    "lost side": lambda f: change_tensors(f, lambda t: t.pop(first(t))),
    "foreign array": lambda f: change_tensors(
        f, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})
    ),
    "wrong shape": lambda f: change_tensors(f, lambda t: t.update({first(t): torch.ones(3, 16)})),
    "a vector": lambda f: change_tensors(f, lambda t: t.update({first(t): torch.ones(16)})),
    "nothing in it": lambda f: save_file({}, f / TENSORS),
}


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("to", ["tnpeft", "peft", "kohya"])
def test_hostile_files_are_refused_and_nothing_is_written(how: str, to: str, adapter: Path) -> None:
    HOSTILE[how](adapter)
    before = folders(adapter.parent)
    with pytest.raises((AdapterFileError, ConfigError)):
        tnpeft.convert(adapter, adapter.parent / "new", to=to)
    assert folders(adapter.parent) == before
    assert {path.name for path in adapter.parent.iterdir()} == {"a"}


@pytest.mark.parametrize("how", ["foreign array", "eight bits", "not finite", "lost side"])
@pytest.mark.parametrize("to", ["tnpeft", "peft"])
def test_hostile_folders_of_this_package_are_refused_as_well(how: str, to: str, adapter: Path) -> None:
    """What PEFT would read into the base model passes through no conversion."""
    own = adapter.parent / "own"
    tnpeft.convert(adapter, own)
    HOSTILE[how](own)
    with pytest.raises((AdapterFileError, ConfigError)):
        tnpeft.convert(own, adapter.parent / "new", to=to)


@pytest.mark.parametrize("to", ["tnpeft", "peft", "kohya"])
def test_a_conversion_that_changes_an_update_is_refused_with_the_difference(
    to: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = run._WRITERS[to]

    def wrong(lines: Any, *rest: Any) -> Any:
        from dataclasses import replace

        site = lines.sites[0]
        factors = {**site.factors, "A": site.factors["A"].roll(1, 0)}  # paired with the wrong columns
        return true(replace(lines, sites=(replace(site, factors=factors), *lines.sites[1:])), *rest)

    monkeypatch.setitem(run._WRITERS, to, wrong)
    with pytest.raises(AdapterFileError, match=r"would change: the largest relative difference is \d"):
        tnpeft.convert(adapter, adapter.parent / "new", to=to)
    assert {path.name for path in adapter.parent.iterdir()} == {"a"}


@pytest.mark.parametrize("to", ["tnpeft", "lora"])
def test_a_magnitude_of_another_shape_is_refused(to: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
    trained(config, opt(), 0).save_pretrained(tmp_path / "a")
    tnpeft.convert(tmp_path / "a", tmp_path / "own")
    for folder in (tmp_path / "a", tmp_path / "own"):
        change_tensors(folder, lambda t: t.update({n: v[:3].clone() for n, v in t.items() if "magnitude" in n}))
        with pytest.raises(AdapterFileError, match=r"the magnitude of .*q_proj has the shape \(3,\), not \(32,\)"):
            tnpeft.convert(folder, tmp_path / "new", to=to)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [lambda t, name: t.pop(name), lambda t, name: t.update({name: torch.ones(6)})])
def test_parameters_of_one_owner_are_told_apart_by_what_is_known_to_be_there(change: Any, tmp_path: Path) -> None:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names)
    trained(config, mixture(), 0).save_pretrained(tmp_path / "a")
    change_tensors(tmp_path / "a", lambda t: change(t, max(n for n in t if n.endswith("experts.lora_B.weight"))))
    with pytest.raises(AdapterFileError, match="not a known packing of a linear or of experts"):
        tnpeft.convert(tmp_path / "a", tmp_path / "new")


@pytest.mark.parametrize("to", ["tnpeft", "peft"])
def test_a_task_that_is_none_is_refused(to: str, adapter: Path) -> None:
    change_config(adapter, task_type="SING")
    with pytest.raises(ConfigError, match="Invalid task type"):
        tnpeft.convert(adapter, adapter.parent / "new", to=to)


def test_a_models_name_that_is_no_text_tells_nothing_about_the_model(adapter: Path) -> None:
    change_config(adapter, base_model_name_or_path=[1])
    assert tnpeft.convert(adapter, adapter.parent / "new", to="lora").difference == 0


def test_targets_that_exist_or_cannot_hold_a_line_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        tnpeft.convert(adapter, adapter)
    with pytest.raises(ConfigError, match="is not a target"):
        tnpeft.convert(adapter, tmp_path / "new", to="nowhere")
    trained(peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), opt(), 0).save_pretrained(
        tmp_path / "dora"
    )
    with pytest.raises(ConfigError, match="no DoRA magnitude"):
        tnpeft.convert(tmp_path / "dora", tmp_path / "new.safetensors", to="kohya")
    trained(peft.LoHaConfig(r=8, target_modules=["q_proj"]), opt(), 0).save_pretrained(tmp_path / "loha")
    with pytest.raises(ConfigError, match="no low-rank pair"):
        tnpeft.convert(tmp_path / "loha", tmp_path / "new", to="lora")
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore")
def test_alpha_patterns_keep_the_update_though_not_the_bits(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=4, alpha_pattern={"q_proj": 3}, target_modules=["q_proj", "fc1"])
    model = trained(config, opt(), 0)
    model.save_pretrained(tmp_path / "a")
    assert 0 < tnpeft.convert(tmp_path / "a", tmp_path / "lines").difference < 1e-6
    loaded = peft.PeftModel.from_pretrained(opt(), tmp_path / "lines").eval()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


# ---- the parts


@pytest.mark.parametrize("packed", ["A[(expert r) inp]", "B[out (r expert)]", "A[expert 1 (r inp)]", "C[inp 1 1 r]"])
def test_packing_is_undone_by_unpacking(packed: str) -> None:
    sizes = {"expert": 3, "r": 2, "inp": 5, "out": 4}
    flat = [index for group in parse(packed)[1] for index in group]
    for seed in range(5):
        declared = tuple(random.Random(seed).sample(flat, len(flat)))
        factor = torch.arange(float(np.prod([sizes[i] for i in declared]))).reshape([sizes[i] for i in declared])
        stored = pack(factor, packed, declared)
        assert stored.shape == tuple(int(np.prod([sizes[i] for i in group])) for group in parse(packed)[1])
        assert torch.equal(unpack(stored, packed, declared, sizes), factor)


def test_every_packing_stores_every_factor_of_its_line_once() -> None:
    for packings in (*formats.PEFT.values(), formats.TARGETS["per_expert"], formats.SHARED_OUTER, formats.LYCORIS):
        for packing in packings:
            held = [parse(line)[0] for line in packing.tensors.values()]
            assert sorted(held) == sorted(factor.name for factor in packing.network.factors)
            for line in packing.tensors.values():
                name, axes = parse(line)
                assert {i for group in axes for i in group} == set(packing.site.factor(name).indices)


def test_the_command_line_tells_the_difference(adapter: Path) -> None:
    from typer.testing import CliRunner

    from tnpeft.cli.app import app

    new = adapter.parent / "new"
    done = CliRunner().invoke(app, ["convert", str(adapter), str(new), "--to", "kohya", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["sites"] == 4
    assert CliRunner().invoke(app, ["convert", str(adapter), str(new)]).exit_code == 2
