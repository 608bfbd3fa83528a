"""Presets: each can be read, and those of papers were tried with random weights of their models."""

from __future__ import annotations

import csv
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_results import study_of
from try_presets import PRESETS, read

from tnpeft.studies import backbones, methods
from tnpeft.studies.files import StudyError, merged
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.running import dry_run
from tnpeft.studies.running.dry_run import _at_hand, trial
from tnpeft.studies.study import Study

ROOT = Path(__file__).resolve().parents[2]
TRIED = read(ROOT / "paper" / "tables" / "presets.csv")


def test_each_method_is_tried_once(table: dict[str, Any]) -> None:
    table["methods"].insert(1, {"label": "broken", "peft": "lora", "args": {"r": -1}})
    rows = list(trial(study_of(table), steps=1, batch=2))
    assert [row["method"] for row in rows] == ["LoRA", "broken", "CP"]  # and not the one that trains nothing
    assert rows[0]["size"] == "rank=1"
    assert rows[0]["counted"] == rows[0]["trained"] == 2 * 2 * 2 * 16
    assert rows[0]["backbone"] > 0
    assert [row["steps"] for row in rows] == [1, "", 1]
    assert [row["outcome"] for row in rows][::2] == ["losses finite"] * 2
    assert rows[1]["outcome"].startswith("FAILED (ValueError")
    assert all(list(row) == list(rows[0]) for row in rows)


def test_losses_that_are_not_finite_are_told(table: dict[str, Any]) -> None:
    table["methods"] = [{"label": "LoRA", "family": "lora", "args": {"rank": 1}, "learning_rates": [1e30]}]
    assert [row["outcome"] for row in trial(study_of(table), steps=3)] == ["LOSSES NOT FINITE"]
    with pytest.raises(StudyError, match="steps = 0"):
        next(trial(study_of(table), steps=0))


def test_a_model_of_the_hub_has_random_weights_in_its_shape(table: dict[str, Any], tiny: Path) -> None:
    study = study_of(table)
    assert _at_hand(study) is study
    of_hub = replace(study, places={**study.places, "model": "facebook/opt-125m"})
    assert _at_hand(of_hub).places["model"] == "random:facebook/opt-125m"
    assert _at_hand(of_hub).places["tokenizer"] == backbones.BYTES
    own = replace(of_hub, places={**of_hub.places, "tokenizer": str(tiny)})
    assert _at_hand(own).places["tokenizer"] == str(tiny)


def test_random_weights_are_tried_without_a_step_relative_to_them(
    table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pool(Executor):
        def submit(self, _: Any, run: Any, /) -> Any:  # type: ignore[override]
            done: Future[Any] = Future()
            done.set_result({"outcome": run.lr})
            return done

    monkeypatch.setattr(dry_run, "processes", lambda _: Pool())
    table["methods"], table["tokenizer"] = table["methods"][:1], "bytes"
    table["methods"][0]["relative_steps"] = [1e-2]
    study = study_of(table, backbone="random:facebook/opt-125m")
    assert [row["outcome"] for row in trial(study)] == [1e-2]


@pytest.mark.parametrize("name", PRESETS)
def test_papers_presets_were_tried_and_count_as_ever(name: str) -> None:
    study = Study.read(ROOT / "presets" / f"{name}.toml")
    rows = [row for row in TRIED if row["preset"] == name]
    assert {row["method"] for row in rows} == {cell.label for cell in study.cells}
    cells = {(cell.label, cell.size): cell for cell in study.cells}
    for row in rows:
        assert row["outcome"] == "losses finite"
        method = cells[row["method"], row["size"]].method
        count = methods.count(method, study.places["model"], study.protocol.targets)
        assert row["counted"] == row["trained"] == count
        assert row["backbone"] == {"facebook/opt-1.3b": 1_315_758_080}.get(study.places["model"], 124_055_040)
    assert study.table["ours"]


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_is_a_study(path: Path) -> None:
    """Budgets that are counted on a packaged model need no package."""
    study = Study.read(path)
    assert study.cells
    assert study.tasks


def test_tasks_and_methods_change_settings_and_methods_have_the_last_word(table: dict[str, Any]) -> None:
    table["tasks"] = [
        "digits_upright",
        {"name": "digits_shifted", "protocol": {"epochs": 3, "learning_rates": [5.0, 7.0], "batch": 16}},
    ]
    table["methods"][0]["protocol"] = {"batch": 4}
    study = study_of(table)
    plain, own = ([cell.protocol for cell in study.cells if cell.task == its] for its in study.tasks)
    assert plain[0] == Protocol.of(merged(table["protocol"], {"batch": 4}))
    assert own[0].learning_rates == (5.0, 7.0)
    assert (own[0].batch, own[2].batch) == (4, 16)
    assert own[2].learning_rates == (1e-2, 1e-1)
    assert own[2].on(64).steps == 12
    assert len(study.search()) == 2 * 2 + 2 + 2 + 2 * 2 + 2 + 2
    with pytest.raises(StudyError, match="two tasks are called 'digits_upright'"):
        study_of(table, tasks=["digits_upright", "digits_upright"])
    with pytest.raises(StudyError, match="unknown key 'epoch'"):
        study_of(table, tasks=[{"name": "digits_upright", "protocol": {"epoch": 3}}])


def test_a_setting_that_is_off_does_not_change_a_runs_name() -> None:
    assert not {"epochs", "head_lr", "by_length"} & set(Protocol().training)
    assert {"epochs", "head_lr"} <= set(Protocol(epochs=2, head_lr=1e-3).training)


def test_the_table_of_the_script_reads_back(tmp_path: Path) -> None:
    rows = [{"preset": "a", "trained": 12, "loss": "0.5", "outcome": "FAILED (x, y)"}]
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert read(tmp_path / "a.csv") == rows
    assert read(tmp_path / "b.csv") == []
