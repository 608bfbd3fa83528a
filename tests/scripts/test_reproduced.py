"""Published results beside what was measured here: every table, matched by share of the budget, and up to date."""

from __future__ import annotations

import csv
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import reproduce_results as script

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "paper" / "published"
TABLES = tomllib.loads((PUBLISHED / "results.toml").read_text())["table"]
HERE = {its["table"]: its for its in tomllib.loads((PUBLISHED / "here.toml").read_text())["here"]}


def point(method: str, size: str, parameters: int, task: str = "sst2", **scores: float) -> dict[str, Any]:
    return {"task": task, "method": method, "size": size, "parameters": parameters, "scores": scores or {"0": 0.5}}


def test_every_published_table_is_placed_and_its_presets_are_there() -> None:
    assert list(HERE) == [table["id"] for table in TABLES]
    for table in TABLES:
        its = HERE[table["id"]]
        assert its["why"]
        for study in its.get("studies", ()):
            assert (ROOT / "presets" / f"{study}.toml").exists()
        tasks = {row["task"] for row in table["rows"]} if "studies" in its else set()
        assert tasks <= set(its.get("tasks", {}))


def test_counterparts_have_the_same_share_of_the_budget() -> None:
    points = [point("LoRA", "rank=1", 1000), point("LoRA", "rank=4", 4000), point("CP", "rank=9", 1090)]
    points.append(point("CP", "rank=9", 990, task="rte"))
    found = {
        share: (script.counterpart(points, "sst2", "CP", share) or {}).get("parameters") for share in (0.9, 1.0, 1.1)
    }
    assert found == {0.9: None, 1.0: 1090, 1.1: 1090}
    assert (script.counterpart(points, "sst2", "LoRA", 4.0) or {})["size"] == "rank=4"
    assert (script.counterpart(points, "rte", "CP", 1.0) or {})["parameters"] == 990
    assert script.counterpart(points[1:], "sst2", "CP", 1.0) is None  # no rank 1, no unit
    assert script.counterpart([], "sst2", "CP", 1.0) is None


def test_a_study_in_the_papers_own_setting_counts_as_one(tmp_path: Path) -> None:
    """A made-up result of the paper's own preset: its scores stand beside the published ones, the rest is not run."""
    shutil.copytree(PUBLISHED, tmp_path / "published")
    (tmp_path / "tables").mkdir()
    made = [point("LoRA", "rank=1", 196608), point("LoRA", "rank=2", 393216, **{"0": 0.25, "1": 0.75})]
    made.append(point("CP", "rank=43", 398352, **{"0": 0.5, "1": 0.75}))
    (tmp_path / "tables" / "cp_steps.json").write_text(json.dumps({"points": made}))
    script.main(tmp_path, tmp_path / "tables")
    text = (tmp_path / "tables" / "results.md").read_text()
    low = next(line for line in text.splitlines() if line.startswith("| SST-2 | low"))
    assert "| 0.500 ± 0.354 (rank=2, 2 seeds) | 0.625 ± 0.177 (rank=43, 2 seeds) |" in low
    assert "3 scores were measured here in the paper's own setting." in text  # r = 2 and c = 43; r = 1 confirmed
    assert "not run" in next(line for line in text.splitlines() if line.startswith("| SST-2 | mid"))
    with (tmp_path / "tables" / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["mean here"] for row in rows if row["study"] == "cp_steps" and row["seeds here"] != "0"} == {
        "0.5000",
        "0.6250",
    }


def test_the_table_is_up_to_date(tmp_path: Path) -> None:
    script.main(out=tmp_path)
    for name in ("results.md", "results.csv"):
        assert (tmp_path / name).read_text() == (ROOT / "paper" / "tables" / name).read_text()


@pytest.mark.parametrize("table", [its["id"] for its in TABLES])
def test_what_was_not_run_is_said(table: str) -> None:
    text = (ROOT / "paper" / "tables" / "results.md").read_text()
    part = text.partition(f"## {table}\n")[2].partition("\n## ")[0]
    assert part
    if not HERE[table].get("studies"):
        assert f"**Not run**: {HERE[table]['why']}." in part
