"""Studies' designs: which runs choose, which are reported, how grids grow, what a contrast means."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnpeft
from tnpeft.counting import capped
from tnpeft.counting.budgets import BY
from tnpeft.studies import backbones, methods, packaged
from tnpeft.studies.files import StudyError, merged, write_json
from tnpeft.studies.reports.points import collect
from tnpeft.studies.reports.tables import contrasts
from tnpeft.studies.runs import Run, Store
from tnpeft.studies.study import Study

ROOT = Path(__file__).resolve().parents[2]
TABLE: dict[str, Any] = {
    "name": "drawn",
    "backbones": ["digits:0", "digits:1"],
    "tune_backbones": ["digits:2"],
    "tasks": ["digits_shifted"],
    "seeds": [0, 1, 2],
    "tune_seeds": [100, 101],
    "extend": 4,
    "protocol": {"targets": ["q_proj", "v_proj"], "steps": 1},
    "policies": [
        {"label": "P0", "learning_rates": [1e-3, 1e-2, 1e-1], "choose_on": "LoRA"},
        {"label": "P1", "relative_steps": [1e-2, 1e-1, 1.0]},
        {"label": "P2", "relative_steps": [1e-1, 1.0], "start": "rule", "rates": "rule", "choose_on": "LoRA"},
    ],
    "methods": [
        {"label": "LoRA", "family": "lora", "budgets": [2016], "match": "dof"},
        {"label": "LoTR", "family": "lotr", "budgets": [2016], "match": "dof"},
    ],
    "contrast": [{"name": "one", "plus": "P2: LoTR", "minus": "P0: LoTR", "measure": "loss", "margin": 0.3}],
}


def study(cache: Path, **over: Any) -> Study:
    return Study.of(merged(TABLE, {"cache": str(cache), **over}), Path("."))


def settle(store: Store, runs: list[Run], best: float) -> None:
    """Results whose dev loss is least at a learning rate."""
    for run in runs:
        loss = abs(math.log10(run.lr / best))
        row = [1, loss, 0.5, loss if math.isfinite(loss) else None]
        counts = {"parameters": 7, "head_parameters": 0, "steps": 1, "best_step": 1}
        scores = {"dev": 0.5, "eval": 0.6, "eval_loss": loss, "scores": {"accuracy": 0.6}}
        record = {"key": run.key, "run": run.identity, "curve": [row], "predictions": [], "labels": [], "timing": {}}
        write_json(store.folder / f"{run.key}.json", {**record, **counts, **scores})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_what_chooses_and_what_is_reported_share_no_run(cache: Path, tmp_path: Path) -> None:
    its, store = study(cache), Store(tmp_path)
    for _ in range(10):
        settle(store, its.search(store), 0.05)
    tuned, reported = its.search(store), its.confirmation(store)
    assert {run.seed for run in tuned} == {100, 101}
    assert {run.seed for run in reported} == {0, 1, 2}
    assert not {run.backbone for run in tuned} & {run.backbone for run in reported}
    assert len(reported) == 6 * 2 * 3  # cells, backbones, seeds
    assert len({run.backbone for run in reported}) == 2
    by_cell = {cell.name: its.best_rate(cell, store) for cell in its.cells}
    assert by_cell["P0: LoTR (rank=10)"] == by_cell["P0: LoRA (rank=2)"]  # one rate for all, LoRA's
    assert by_cell["P2: LoTR (rank=10)"] == by_cell["P2: LoRA (rank=2)"]


def test_a_relative_step_is_a_rate_by_the_gain(cache: Path) -> None:
    its = study(cache)
    cells = {cell.name: cell for cell in its.cells}
    for name in ("P1: LoRA (rank=2)", "P1: LoTR (rank=10)"):
        run = its.run(cells[name], 0.1, 0, "digits:1")
        f = methods.factorization(cells[name].method)
        gains = tnpeft.gain(f, model=backbones.shape("digits:1"), targets=["q_proj", "v_proj"])
        base = backbones.weight_rms("digits:1", ("q_proj", "v_proj"), cache)
        steps = [run.lr * gains[proj] / base[proj] for proj in base]
        assert math.sqrt(sum(step**2 for step in steps) / 2) == pytest.approx(0.1)
        assert "rate_rule" not in run.protocol or run.protocol["rate_rule"] == "rate"
    by_rule = its.run(cells["P2: LoTR (rank=10)"], 0.1, 0)
    assert by_rule.lr == 0.1
    assert by_rule.protocol["rate_rule"] == "relative_step"
    assert by_rule.method["change"]["init"] == {"G": "orthogonal"}


def test_weights_are_found_by_the_models_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a slice of a fused linear; the end of a path stands for no other module that ends so too."""
    import torch
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    sizes = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12}
    bert, gpt2 = BertModel(BertConfig(**sizes)), GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2))
    for model in (bert, gpt2):
        its = str(tmp_path / model.config.model_type)
        model.save_pretrained(its)
        monkeypatch.setattr(backbones, "shape", lambda _, config=model.config: config)
        names = ("output", "intermediate", "attn_output") if model is bert else ("c_attn/out:1", "mlp_c_proj")
        found = backbones.weight_rms(its, names, tmp_path)
        blocks = model.encoder.layer if model is bert else model.h
        weights = {
            "output": lambda b: b.output.dense.weight,
            "intermediate": lambda b: b.intermediate.dense.weight,
            "attn_output": lambda b: b.attention.output.dense.weight,
            "c_attn/out:1": lambda b: b.attn.c_attn.weight[:, 8:16],
            "mlp_c_proj": lambda b: b.mlp.c_proj.weight,
        }
        for name in names:
            own = torch.stack([weights[name](block).detach() for block in blocks]).double()
            assert found[name] == pytest.approx(float(own.square().mean().sqrt()), rel=1e-9)


def test_weights_of_experts_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of gate and up of gpt-oss take turns."""
    from expert_models import mixture

    model = mixture("gpt_oss")
    model.save_pretrained(tmp_path / "its")
    monkeypatch.setattr(backbones, "shape", lambda _: model.config)
    with pytest.raises(StudyError, match="no weights of 'experts_gate_up_proj/out:0'"):
        backbones.weight_rms(str(tmp_path / "its"), ("q_proj", "experts_gate_up_proj/out:0"), tmp_path)


def test_the_last_bits_of_a_rate_change_no_runs_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    its = study(cache)
    cell = next(cell for cell in its.cells if cell.name == "P1: LoTR (rank=10)")
    exact, keys = its.rate_of_step(cell, "digits:1"), set()
    for factor in (1, 1 + 2**-52, 1 - 2**-50):
        monkeypatch.setattr(Study, "rate_of_step", lambda *_, rate=exact * factor: rate)
        keys.add(its.run(cell, 0.1, 0, "digits:1").key)
    assert len(keys) == 1
    monkeypatch.setattr(Study, "rate_of_step", lambda *_: exact * (1 + 1e-6))
    assert its.run(cell, 0.1, 0, "digits:1").key not in keys


@settings(max_examples=25, deadline=None)
@given(power=st.floats(-6, 3), extend=st.integers(0, 6))
def test_grids_grow_until_the_best_is_inside(
    tmp_path_factory: pytest.TempPathFactory, power: float, extend: int
) -> None:
    folder = tmp_path_factory.mktemp("grown")
    methods_ = [{"label": "LoRA", "family": "lora", "args": {"rank": 1}}]
    its = Study.of({**TABLE, "cache": str(folder / "cache"), "extend": extend, "policies": TABLE["policies"][:1]} | {
        "methods": methods_, "contrast": []}, Path("."))  # fmt: skip
    store, (cell,) = Store(folder / "runs"), its.cells
    best, asked = 10**power, -1
    while asked < len(runs := its.search(store)):
        asked = len(runs)
        settle(store, runs, best)
    values, chosen = its.grid(cell, store)
    assert its.best_rate(cell, store) == chosen
    assert set(TABLE["policies"][0]["learning_rates"]) <= set(values)
    assert len(values) <= 3 + extend
    assert chosen == min(values, key=lambda value: abs(math.log10(value / best)))
    inside = values[0] < chosen < values[-1]
    assert inside or len(values) == 3 + extend
    (point,) = collect_settled(its, store, best)
    assert point.edge != inside
    assert [row["value"] for row in point.search] == list(values)


def collect_settled(its: Study, store: Store, best: float) -> Any:
    settle(store, its.confirmation(store), best)
    return collect(its, store)


def test_points_know_their_backbones_steps_and_freedom(cache: Path, tmp_path: Path) -> None:
    its, store = study(cache), Store(tmp_path)
    for _ in range(10):
        settle(store, its.search(store), 0.05)
    points = {p.name: p for p in collect_settled(its, store, 0.05)}
    lotr = points["P1: LoTR (rank=10)"]
    assert set(lotr.scores) == {f"digits:{b}/{s}" for b in (0, 1) for s in (0, 1, 2)}
    assert (lotr.summary.n, lotr.summary.replicates) == (2, 6)
    assert (lotr.dof, points["P1: LoRA (rank=2)"].dof) == (2003, 2016)
    assert lotr.step is not None
    assert points["P0: LoTR (rank=10)"].step is None
    assert points["P0: LoTR (rank=10)"].search == ()  # LoRA's search decided
    (found,) = contrasts(list(points.values()), its.contrasts)
    assert found.summary is not None
    assert found.summary.n == 2
    assert found.word == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrast": [{"plus": "P1: CP", "minus": "P0: LoTR"}]}, "no cell is called 'P1: CP'"),
        ({"contrast": [{"plus": "P1: LoTR"}]}, "no minus"),
        ({"contrast": [{"plus": "P1: LoTR", "minus": "P0: LoTR", "measure": "f2"}]}, "measure = 'f2'"),
        ({"policies": [{"label": "P", "rates": "some"}]}, "rates = 'some'"),
        ({"policies": [{"label": "P", "lr": 1}]}, "unknown key 'lr' in a policy"),
        ({"policies": [{"label": "P", "choose_on": "CP"}]}, "no cell is called 'CP'"),
        ({"tune_seeds": [1, 1]}, "a seed stands twice"),
        ({"backbones": ["digits:0", "digits:0"]}, "a backbone stands twice"),
        ({"choose": "luck"}, "choose = 'luck' is unknown"),
        ({"methods": [{"family": "lora", "budgets": [8], "match": "rank"}]}, "match = 'rank' is unknown"),
        ({"methods": [{"line": "A[out r] B[r inp] -> out inp", "budgets": [8]}]}, "budgets are for families"),
    ],
)
def test_wrong_designs_are_refused(cache: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        study(cache, **change)


MODEL = {"model_type": "opt", **packaged.DIGITS_SHAPE}
TARGETS = ("q_proj", "v_proj")


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(["lora", "cp", "tucker", "tenslora", "lotr", "fact_tk", "metatt_4d", "lorta"]),
    budget=st.integers(300, 6000),
    by=st.sampled_from(BY),
)
def test_matched_ranks_are_carried_and_nearest(family: str, budget: int, by: str) -> None:
    ((args, change),) = methods.matched({"family": family}, [budget], MODEL, TARGETS, by)
    method = {"family": family, "args": args, "change": {"ranks": change}}
    f = methods.factorization(method)
    assert capped(f, model=MODEL, targets=TARGETS).ranks == f.ranks
    found = methods.count(method, MODEL, TARGETS, by)
    assert found is not None
    ((name, rank),) = args.items()
    for other in (rank - 1, rank + 1):
        if other >= 1:
            near = {"family": family, "args": {name: other}}
            ranks = capped(methods.factorization(near), model=MODEL, targets=TARGETS).ranks
            counted = methods.count({**near, "change": {"ranks": ranks}}, MODEL, TARGETS, by)
            assert abs((counted or 0) - budget) >= abs(found - budget)


def test_the_flagship_study_matches_degrees_of_freedom() -> None:
    its = Study.read(ROOT / "presets" / "study1_structure_or_step.toml")
    found = {cell.label: methods.count(cell.method, MODEL, TARGETS, "dof") for cell in its.cells}
    assert len(found) == 17
    assert found.pop("TeRA") is not None  # one size only, its own count
    assert all(value is not None and abs(value - 2016) <= 0.05 * 2016 for value in found.values())
    assert set(its.table["controls"]) <= set(found)


@pytest.mark.parametrize("number", range(packaged.DIGITS_COUNT))
def test_digits_backbones_are_the_ones_of_the_manifest(number: int, tmp_path: Path) -> None:
    folder = Path(packaged.folder(f"digits:{number}", tmp_path))
    assert packaged.folder(f"digits:{number}", tmp_path) == str(folder)
    model, words = backbones.load(f"digits:{number}", head="words", classes=10, dtype="float32", cache=tmp_path)
    assert model.config.hidden_size == 64
    assert len(words) == 95
    assert len({backbones.identity(f"digits:{k}", tmp_path) for k in (number, (number + 1) % 10)}) == 2


def test_damaged_weights_and_unknown_backbones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyError, match=r"unknown backbone 'digits:10'"):
        packaged.folder("digits:10", tmp_path)
    monkeypatch.setattr(packaged, "file_hash", lambda path: "0" * 64)
    with pytest.raises(StudyError, match="the weights have the hash 0000000000000000"):
        packaged.folder("digits:0", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_parts_is_joined_checked_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import zipfile

    content = bytes(range(256)) * 40
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        archive.writestr("m/model.safetensors", content)
        archive.writestr("m/config.json", "{}")
        archive.writestr("m/deep/config.json", "no")
    whole = (tmp_path / "whole.zip").read_bytes()
    parts = [tmp_path / f"part{k}" for k in range(3)]
    for k, part in enumerate(parts):
        part.write_bytes(whole[k * len(whole) // 3 : (k + 1) * len(whole) // 3])
    its = packaged.Package(
        "M", {str(k): str(part) for k, part in enumerate(parts)}, "m", hashlib.sha256(content).hexdigest()
    )
    monkeypatch.setitem(packaged.PACKAGED, "m", its)
    with pytest.raises(StudyError, match="comes in packages; pip install"):
        packaged.folder("m", tmp_path / "cache")
    monkeypatch.setattr(packaged, "_file", lambda name, package, file: Path(file))
    folder = Path(packaged.folder("m", tmp_path / "cache"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == content
    monkeypatch.setitem(packaged.PACKAGED, "m", packaged.Package("M", its.files, "m", "1" * 64))
    with pytest.raises(StudyError, match="the weights have the hash"):
        packaged.folder("m", tmp_path / "cache")
