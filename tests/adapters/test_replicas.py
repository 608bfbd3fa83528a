"""Replicas: K adapters in one pass are K runs, step for step; each is an ordinary adapter again; errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import NETWORKS, llama, logits, opt, shake
from torch import Tensor
from watching import compiled

import tnpeft
from tnpeft.networks import NetworkError

SEEDS = (3, 11, 4)
RATES = (2e-2, 5e-3, 1e-2)
CLIP = 1e-3  # below the norms of the gradients, so that every step is clipped
FAMILIES: dict[str, dict[str, Any]] = {
    "lora": {"network": tnpeft.families.lora(rank=3)},
    "cp": NETWORKS["cp"],
    "lorta": {"network": tnpeft.families.lorta(rank=4)},
    "tenslora": {"network": tnpeft.families.tenslora(ranks=3)},
    "vera": {"network": tnpeft.families.vera(rank=6)},
    "custom": {
        "network": "U[out a] G[layer a b] V[proj b inp] + c[layer proj out] ~D[inp] -> layer proj out inp",
        "ranks": {"a": 3, "b": 2},
        "lr_multiplier": {"G": 4},
        "scale": 0.5,
    },
}  # fmt: skip
RANKS: dict[str, list[dict[str, int]]] = {  # of the replicas of a family, its own apart
    "lora": [{"r": 1}, {"r": 4}, {"r": 2}],
    "cp": [{"r": 3}, {"r": 2}, {"r": 7}],
    "tenslora": [{"a": 2, "b": 4}, {"b": 2, "c": 1}, {"a": 5, "d": 2}],
    "vera": [{"r": 6}, {"r": 3}, {"r": 9}],
    "custom": [{"a": 1}, {"a": 4, "b": 3}, {"b": 1}],
}
SVD = "B[layer proj out r] A[layer proj r inp] - ^P[layer proj out r] ^Q[layer proj r inp] -> layer proj out inp"
STARTS = {  # from the base weight and from an array
    "svd": {"network": SVD, "ranks": {"r": 3}, "init": dict.fromkeys("BAPQ", "svd")},
    "array": {**NETWORKS["lora"], "init": {"A": torch.arange(2 * 2 * 3 * 32.0).reshape(2, 2, 3, 32) / 100}},
}
OWN = {**RANKS, "svd": [{"r": 4}, {"r": 2}, {"r": 3}]}  # of starts, too
SCALES = [2.0, 0.5, 1.5]
MODELS = {"opt": opt, "llama": llama}


def config(key: str, **changes: Any) -> tnpeft.TensorNetworkConfig:
    targets = ["q_proj", "o_proj"] if changes.pop("model", "opt") == "llama" else ["q_proj", "v_proj"]
    return tnpeft.TensorNetworkConfig(**{**(FAMILIES | STARTS)[key], "target_modules": targets, **changes})


def attached(key: str, name: str = "opt", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    model = peft.get_peft_model(MODELS[name]().to(dtype), config(key, model=name, **changes))
    return model.to(dtype).train()


def together(key: str = "lora", name: str = "opt", **changes: Any) -> Any:
    return attached(key, name, replicas=len(SEEDS), replica_seeds=list(SEEDS), **changes)


def of_ranks(key: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Changes that give replicas ranks and scales of their own, and those that make each of them alone."""
    ranks, owns = (FAMILIES | STARTS)[key].get("ranks", {}), OWN[key]
    each = [{"ranks": {**ranks, **own}, "scale": scale} for own, scale in zip(owns, SCALES, strict=True)]
    return {"replica_ranks": owns, "replica_scales": SCALES}, each


def batches(seed: int, steps: int = 5, rows: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randint(2, 60, (rows, 7), generator=generator) for _ in range(steps)]


IDS = torch.cat([batches(k)[0] for k in range(3)])


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def output(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def losses(model: Any, ids: Tensor = IDS) -> Tensor:
    return tnpeft.replicas.losses(output(model, ids), ids, 3)


def adamw(model: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tnpeft.parameter_groups(model, lr=lr), weight_decay=0.1)


def run_alone(key: str, name: str, k: int, **changes: Any) -> tuple[Any, list[float]]:
    model = attached(key, name, seed=SEEDS[k], **changes)
    optimizer, found = adamw(model, RATES[k]), []
    for ids in batches(k):
        out = model(input_ids=ids).logits[:, :-1]  # transformers' own loss rounds to fp32
        loss = torch.nn.functional.cross_entropy(out.reshape(-1, out.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return model, found


def run_together(key: str, name: str, **changes: Any) -> tuple[Any, list[list[float]]]:
    model = together(key, name, **changes)
    optimizer, found = adamw(model, max(RATES)), []
    tnpeft.replicas.learning_rates(optimizer, model, [rate / max(RATES) for rate in RATES])
    for blocks in zip(*map(batches, range(len(SEEDS))), strict=True):
        ids = torch.cat(blocks)
        each = losses(model, ids)
        each.sum().backward()
        assert bool((tnpeft.replicas.clip(model, CLIP) > CLIP).all())
        optimizer.step()
        optimizer.zero_grad()
        found.append(each.tolist())
    return model, found


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def agree(key: str, name: str, model: Any, found: list[list[float]], each: list[dict[str, Any]]) -> None:
    """Every replica after the steps is the adapter that was trained alone."""
    for k in range(len(SEEDS)):
        alone, wanted = run_alone(key, name, k, **each[k])
        near(*(torch.tensor(values, dtype=torch.float64) for values in ([row[k] for row in found], wanted)))
        mine, theirs = tnpeft.replica(model, k), tnpeft.factors(alone)
        assert list(mine) == list(theirs)
        start = tnpeft.factors(attached(key, name, seed=SEEDS[k], **each[k]))
        kinds = {f.name: f.kind for f in alone.peft_config["default"].factorization.network.factors}
        for label, value in theirs.items():
            near(mine[label], value)
            assert (kinds[label.partition("#")[0]] == "trainable") != torch.equal(value, start[label])
        assert tnpeft.replicas.parameters(model, k) == alone.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("key", FAMILIES)
def test_five_steps_are_those_of_separate_runs(key: str, name: str) -> None:
    agree(key, name, *run_together(key, name), [{}] * len(SEEDS))


@pytest.mark.parametrize("key", RANKS)
def test_five_steps_at_other_ranks_and_scales_are_those_of_separate_runs(key: str) -> None:
    changes, each = of_ranks(key)
    model, found = run_together(key, "opt", **changes)
    agree(key, "opt", model, found, each)
    padding(model)


def padding(model: Any) -> None:
    """What pads the arrays of a model is zero, and so are its gradients."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = {name: torch.zeros_like(p) for name, p in trained.items()}
    config = model.peft_config["default"]
    for k in range(config.replicas):
        one = peft.get_peft_model(opt(), config.extract_replica(k))
        shapes = {n: p.shape for n, p in one.named_parameters() if p.requires_grad}
        assert set(shapes) == set(trained)
        for name, shape in shapes.items():
            inside[name][(k, *map(slice, shape))] = 1
    assert any(not bool(mask.all()) for mask in inside.values())
    losses(model).sum().backward()
    for name, p in trained.items():
        assert not bool(p[inside[name] == 0].any())
        assert not bool(p.grad[inside[name] == 0].any())
    model.zero_grad()


def test_padding_never_counts_whatever_it_holds() -> None:
    model = together("tenslora", **of_ranks("tenslora")[0])
    shake(model)
    wanted = output(model).detach()
    mine = [tnpeft.replica(model, k) for k in range(3)]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    for k in range(3):
        for name, value in mine[k].items():
            if "~" not in name:
                its = tnpeft.factors(model)[name]
                its[(k, *map(slice, value.shape))] = value
                tnpeft.set_factors(model, {name: its})
    near(output(model).detach(), wanted, 1e-12)


@pytest.mark.parametrize(
    ("key", "own"), [(key, own) for key in FAMILIES | STARTS for own in (False, True) if not own or key in OWN]
)
def test_each_starts_as_it_would_alone(key: str, own: bool) -> None:
    changes, each = of_ranks(key) if own else ({}, [{}] * len(SEEDS))
    model = together(key, dtype=torch.float32, **changes)
    for k, seed in enumerate(SEEDS):
        same(tnpeft.replica(model, k), tnpeft.factors(attached(key, dtype=torch.float32, seed=seed, **each[k])))
    by_default = attached(key, dtype=torch.float32, seed=5, replicas=2)
    same(tnpeft.replica(by_default, 1), tnpeft.factors(attached(key, dtype=torch.float32, seed=6)))


def test_factors_show_the_replica_first() -> None:
    model = together("custom")
    shapes = {name: tuple(value.shape) for name, value in tnpeft.factors(model).items()}
    assert shapes == {
        "U": (3, 32, 3), "G": (3, 2, 3, 2), "V": (3, 2, 2, 32), "c": (3, 2, 2, 32), "D": (3, 32),
    }  # fmt: skip
    values = {name: value + 1 for name, value in tnpeft.factors(model).items() if name != "D"}
    tnpeft.set_factors(model, values)
    same(values, tnpeft.factors(model))


def test_generation_and_padding_go_block_by_block() -> None:
    model = together("lora", dtype=torch.float32).eval()
    shake(model)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    found = model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for k in range(3):
        tnpeft.replicas.attach(model, k, f"only{k}")
        model.set_adapter(f"only{k}")
        rows = slice(2 * k, 2 * k + 2)
        wanted = model.generate(input_ids=IDS[rows], attention_mask=mask[rows], max_new_tokens=4, do_sample=False)
        assert torch.equal(found[rows], wanted)
        model.set_adapter("default")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("key", ["lora", "cp", "vera", "custom"])
def test_saved_and_loaded_as_replicas_and_as_one(key: str, own: bool, tmp_path: Path) -> None:
    changes, each = of_ranks(key) if own else ({}, [{}] * len(SEEDS))
    model = together(key, dtype=torch.float32, **changes).eval()
    shake(model)
    with torch.no_grad():
        wanted = output(model)
    model.save_pretrained(tmp_path / "all")
    again = peft.PeftModel.from_pretrained(opt(), tmp_path / "all").eval()
    with torch.no_grad():
        assert torch.equal(output(again), wanted)
    for k in range(3):
        tnpeft.replicas.save(again, k, tmp_path / f"{k}")
        one = peft.PeftModel.from_pretrained(opt(), tmp_path / f"{k}").eval()
        assert one.peft_config["default"].replicas == 1
        assert one.peft_config["default"].factorization == config(key, **each[k]).factorization
        same(tnpeft.factors(one), tnpeft.replica(model, k))
        with torch.no_grad():
            near(one(input_ids=IDS[2 * k : 2 * k + 2]).logits, wanted[2 * k : 2 * k + 2], 1e-5)
        tnpeft.replicas.attach(again, k, f"only{k}")
        same(tnpeft.factors(one), tnpeft.factors(again, f"only{k}"))


def test_one_of_them_merges_and_exports(tmp_path: Path) -> None:
    model = together("lora", dtype=torch.float32).eval()
    shake(model)
    tnpeft.replicas.attach(model, 1, "second")
    assert model.active_adapters == ["default"]
    model.set_adapter("second")
    wanted = logits(model)
    report = tnpeft.export_lora(model, tmp_path, "second")
    assert report.error == 0
    near(logits(peft.PeftModel.from_pretrained(opt(), tmp_path)), wanted, 1e-5)
    near(logits(model.merge_and_unload()), wanted, 1e-5)


def test_one_of_them_in_a_model_of_transformers() -> None:
    model = opt().eval()
    model.add_adapter(config("lora", replicas=3), adapter_name="many")
    shake(model, adapter="many")
    tnpeft.replicas.attach(model, 1, "one", "many")
    assert model.active_adapters() == ["many"]
    same(tnpeft.replica(model, 1, "many"), tnpeft.factors(model, "one"))
    with pytest.raises(tnpeft.NetworkError, match="'one' exists"):
        tnpeft.replicas.attach(model, 1, "one", "many")
    bare = torch.nn.Sequential(torch.nn.Linear(2, 3))
    peft.inject_adapter_in_model(config("lora", replicas=3, target_modules=["0"]), bare)
    tnpeft.replicas.attach(bare, 1, "one")
    assert bare[0].active_adapters == ["default"]
    assert set(tnpeft.factors(bare, "one")) == {"A", "B"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_one_of_them_in_a_model_of_another_dtype(dtype: torch.dtype) -> None:
    model = together("vera", dtype=torch.float32)
    shake(model)
    tnpeft.replicas.attach(model.to(dtype), 1, "second")
    for name, value in tnpeft.replica(model, 1).items():
        assert torch.equal(tnpeft.factors(model, "second")[name].to(dtype), value)


def test_one_of_them_with_other_frozen_factors_is_refused() -> None:
    model = together("vera", dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if "tnpeft_factors.default.B" in name:
            buffer.data[1] += 1
    names = [name for name, _ in model.named_modules()]
    tnpeft.replicas.attach(model, 0, "first")
    model.delete_adapter("first")
    with pytest.raises(NetworkError, match=r"factor 'B.*' is frozen"):
        tnpeft.replicas.attach(model, 1, "second")
    assert names == [name for name, _ in model.named_modules()]
    assert [*model.peft_config] == ["default"]


def test_nothing_to_clip() -> None:
    assert torch.equal(tnpeft.replicas.clip(together("lora"), 1.0), torch.zeros(3, dtype=torch.float64))


def test_the_hook_goes_with_the_adapter() -> None:
    model = together("lora", dtype=torch.float32)
    model.add_adapter("second", config("lora", replicas=3))
    assert len(model.base_model.model._forward_pre_hooks) == 2  # batches are checked once
    plain = model.unload()
    assert not plain._forward_pre_hooks
    assert torch.equal(logits(plain), logits(opt()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = together("custom")
    shake(model)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        losses(model).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    wanted = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for found, value in zip(gradients(), wanted, strict=True):
        near(found, value, 1e-12)


def test_one_dynamic_graph_when_compiled() -> None:
    model = together("tenslora", dtype=torch.float32).eval()
    shake(model)
    run, graphs = compiled(model, dynamic=True)
    for rows, tokens in ((6, 7), (9, 5), (12, 4)):
        ids = torch.randint(2, 60, (rows, tokens), generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            near(run(input_ids=ids).logits, model(input_ids=ids).logits, 1e-5)
    assert len(graphs) == 1


def test_dropout_and_bfloat16_run() -> None:
    model = together("cp", dtype=torch.float32, dropout=0.5)
    shake(model)
    assert not torch.equal(output(model), output(model))
    half = together("cp", dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tnpeft.replicas.losses(half(input_ids=IDS).logits.float(), IDS, 3).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in half.parameters() if p.requires_grad)


# ---- what is refused


def test_batches_that_are_no_blocks() -> None:
    model = together("lora", dtype=torch.float32)
    with pytest.raises(NetworkError, match="batch size 5 is not divisible by 3 replicas"):
        model(input_ids=IDS[:5])
    with pytest.raises(NetworkError, match="batch size 1 is not divisible"):
        model(input_ids=IDS.reshape(1, -1))
    with pytest.raises(NetworkError, match="packed into rows"):
        model(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 7]))
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand(6, 7)
    with pytest.raises(NetworkError, match="packed into rows"):
        model(input_ids=IDS, position_ids=positions)
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    model(input_ids=IDS, attention_mask=mask, position_ids=positions)  # left padding, not packing
    with model.disable_adapter():
        model(input_ids=IDS[:5])
    with pytest.raises(NetworkError, match="DataParallel"):
        model.base_model.model._replicate_for_data_parallel()(input_ids=IDS)


def test_ranks_that_keep_apart_what_a_pattern_keeps_apart_are_taken() -> None:
    its = {"network": "B[layer proj out r] A[r inp] -> layer proj out inp", "ranks": {"r": 4}}
    its |= {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": {"r": 2}}, "replicas": 2}
    peft.get_peft_model(opt(), tnpeft.TensorNetworkConfig(**its, replica_ranks=[{"r": 3}, {"r": 4, "r_1": 1}]))


def test_several_replicas_are_no_one_adapter(tmp_path: Path) -> None:
    model = together("lora", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    for use in (
        lambda: model.merge_adapter(),
        lambda: model.merge_and_unload(),
        lambda: tnpeft.export_lora(model, tmp_path),
        lambda: model.add_weighted_adapter(["default"], [1.0], "sum"),
        lambda: model.eval()(**{"input_ids": batches(0)[0]}, adapter_names=["default"] * 2),
    ):
        with pytest.raises(NetworkError, match="replicas"):
            use()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(NetworkError, match="unknown replica 3"):
        tnpeft.replica(model, 3)
    with pytest.raises(NetworkError, match="exists already"):
        tnpeft.replicas.attach(model, 0, "default")
    one = attached("lora")
    for use in (lambda: tnpeft.replica(one, 0), lambda: tnpeft.replicas.clip(one, 1.0)):
        with pytest.raises(NetworkError, match="replica"):
            use()
    with pytest.raises(NetworkError, match="2 rates for 3 replicas"):
        tnpeft.replicas.learning_rates(adamw(model, 1.0), model, [1.0, 2.0])
    with pytest.raises(NetworkError, match="batch size 4 is not divisible by 3 replicas"):
        tnpeft.replicas.losses(torch.zeros(4, 2, 8), torch.zeros(4, 2, dtype=torch.long), 3)


def test_rates_are_taken_off_again() -> None:
    model = together("lora", dtype=torch.float32)
    optimizer = torch.optim.SGD(tnpeft.parameter_groups(model, lr=1.0))
    rates = tnpeft.replicas.learning_rates(optimizer, model, [0.0, 0.0, 0.0])
    losses(model).sum().backward()
    before = tnpeft.factors(model)
    optimizer.step()
    same(tnpeft.factors(model), before)
    rates.remove()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in tnpeft.factors(model).items() if name == "B")


def test_a_frozen_factor_that_differs_is_refused(tmp_path: Path) -> None:
    model = together("vera", dtype=torch.float32)
    assert {name.rpartition("/")[2] for name in model.peft_config["default"].frozen} == {"0", "1", "2"}
    model.peft_config["default"].frozen["A/1"] = "0" * 16
    model.save_pretrained(tmp_path)
    with pytest.raises(NetworkError, match="frozen factor A/1 regenerated"):
        peft.PeftModel.from_pretrained(opt(), tmp_path)
