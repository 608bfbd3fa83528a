"""Runs in one pass: the results of runs alone, one file each, whatever a pack cannot hold made alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_results import quietly, study_of
from transformers import AutoConfig

from tnpeft.studies.files import StudyError
from tnpeft.studies.running.execution import run_once, train_and_evaluate
from tnpeft.studies.running.pool import Engine
from tnpeft.studies.running.sweeping import sweep
from tnpeft.studies.runs import Run, Store, packs

CELLS = {"LoRA": 0, "CP": 2}


def three(table: dict[str, Any], cell: str = "CP", **over: Any) -> tuple[Run, ...]:
    """Runs of three seeds at three rates."""
    study = study_of(table, protocol={"steps": 10, "evaluate_every": 3, "warmup": 0.3, **over})
    rates = ((0, 1e-2), (1, 1e-1), (7, 3e-2))
    return tuple(study.run(study.cells[CELLS[cell]], lr, seed) for seed, lr in rates)


@pytest.mark.parametrize(
    ("cell", "over"),
    [
        ("CP", {}),
        ("LoRA", {"accumulate": 2, "schedule": "cosine", "weight_decay": 0.1, "train": 60}),
        ("CP", {"clip": 0.0, "best_by": "loss", "patience": 1}),
        ("CP", {"by_length": True}),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_pack_gives_the_results_of_its_runs(
    table: dict[str, Any], tmp_path: Path, cell: str, over: dict[str, Any], mixed: bool
) -> None:
    runs, alone, together = three(table, cell, **over), Store(tmp_path / "alone"), Store(tmp_path / "together")
    if mixed:
        args: dict[str, Any] = {"LoRA": {"alpha": 2}, "CP": {}}[cell]
        runs = tuple(
            replace(run, method={**run.method, "args": {"rank": r, **args}})
            for run, r in zip(runs, (3, 5, 1), strict=True)
        )
    assert packs(runs, 3) == [runs]
    assert run_once(runs, together) == ["done"] * 3
    for run in runs:
        assert run_once([run], alone) == ["done"]
        one, packed_one = alone.result(run.key) or {}, together.result(run.key) or {}
        assert packed_one.pop("pack") == 3
        assert set(one) == set(packed_one)
        for name in ("run", "parameters", "head_parameters", "examples", "metric", "best_step", "steps"):
            assert packed_one[name] == one[name], name
        assert (packed_one["dev"], packed_one["eval"]) == (one["dev"], one["eval"])
        assert packed_one["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
        for mine, theirs in zip(packed_one["curve"], one["curve"], strict=True):
            assert mine[0] == theirs[0]
            assert mine[1:] == pytest.approx(theirs[1:], rel=1e-5)
    losses = {round((together.result(run.key) or {})["eval_loss"], 5) for run in runs}
    assert len(losses) == 3  # the three runs are three
    assert run_once(runs, together) == ["kept"] * 3


def test_a_sweep_in_packs_makes_the_same_files(table: dict[str, Any], tmp_path: Path) -> None:
    study = study_of(table)
    tallies = [sweep(study, tmp_path / str(n), Engine("serial", pack=n), quietly) for n in (1, 4)]
    assert [(tally.done, tally.failed) for tally in tallies] == [(9, 0), (9, 0)]
    names = [{path.name for path in (tmp_path / str(n)).glob("*.json")} for n in (1, 4)]
    assert names[0] == names[1]
    found = [json.loads(path.read_text()) for path in (tmp_path / "4").glob("*.json")]
    assert sorted(record.get("pack", 1) for record in found) == [1, 1, 1, 2, 2, 4, 4, 4, 4]
    assert "unpacked" not in {key for record in found for key in record}
    assert sweep(study, tmp_path / "4", Engine("serial", pack=4), quietly).kept == 9


def test_a_pack_goes_through_processes(table: dict[str, Any], tmp_path: Path) -> None:
    table["methods"] = [{"label": "LoRA", "family": "lora", "args": {"rank": 1}}]
    tally = sweep(study_of(table), tmp_path, Engine("processes", workers=1, pack=2), quietly)
    assert (tally.done, tally.failed) == (2, 0)
    assert {json.loads(path.read_text())["pack"] for path in tmp_path.glob("*.json")} == {2}


def test_what_differs_in_more_is_no_pack(table: dict[str, Any]) -> None:
    runs = three(table)
    one = runs[0]
    others = [
        replace(one, method={"peft": "lora"}),
        replace(one, method={"none": True}),
        replace(one, method={"family": "lora"}),
        replace(one, protocol={**one.protocol, "head": "classifier"}),
        replace(one, protocol={**one.protocol, "batch": 3}),
        replace(one, data="other"),
        replace(one, backbone="other", places={"model": "other"}),
        replace(one, places={**one.places, "model": "random:facebook/opt-125m"}),
    ]
    twins = [replace(run, seed=run.seed + 50) for run in others]
    jobs = packs([*runs, *others, *twins], 8)
    assert jobs[0] == runs
    sizes = [len(job) for job in jobs[1:]]
    assert sorted(sizes) == [1] * 8 + [2] * 4  # another head, PEFT's own, nothing to train, random weights: alone
    assert [len(job) for job in packs(runs, 2)] == [2, 1]
    assert [len(job) for job in packs(runs, 1)] == [1, 1, 1]


def test_a_backbone_with_dropout_is_made_alone(table: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny, tmp_path / "opt")
    config = AutoConfig.from_pretrained(tiny)
    config.dropout = 0.1
    config.save_pretrained(tmp_path / "opt")
    runs, store = three({**table, "backbone": str(tmp_path / "opt")}), Store(tmp_path / "runs")
    with pytest.raises(StudyError, match=r"dropout = 0\.1"):
        train_and_evaluate(runs)
    assert run_once(runs, store) == ["done"] * 3
    for run in runs:
        record = store.result(run.key) or {}
        assert "pack" not in record
        assert "dropout = 0.1" in record["unpacked"]


def test_only_what_is_missing_is_made(table: dict[str, Any], tmp_path: Path) -> None:
    runs, store = three(table), Store(tmp_path)
    assert run_once([runs[1]], store) == ["done"]
    before = store.result(runs[1].key)
    with store.claim(runs[0].key):
        assert run_once(runs, store) == ["busy", "kept", "busy"]
    assert run_once(runs, store) == ["done", "kept", "done"]
    assert store.result(runs[1].key) == before
    assert (store.result(runs[2].key) or {})["pack"] == 2
