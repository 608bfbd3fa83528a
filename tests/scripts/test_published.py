"""Counts of papers: each is derived from its line and by its family, the tables are current, and a mismatch fails."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import reproduce_counts as script

from tnpeft.networks import NetworkError

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "paper" / "published"


ENTRIES: list[dict[str, Any]] = tomllib.loads((PUBLISHED / "counts.toml").read_text(encoding="utf-8"))["count"]
TABLES: list[dict[str, Any]] = tomllib.loads((PUBLISHED / "results.toml").read_text(encoding="utf-8"))["table"]
NO_FAMILY = {"TinyLoRA", "VB-LoRA", "Uni-LoRA", "FourierFT"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])
def test_every_recorded_count_is_derived(entry: dict[str, Any]) -> None:
    row = script.derive(entry)
    assert row.by_line == entry["value"]
    assert (row.by_family is None) == (entry["method"] in NO_FAMILY)
    assert row.by_family in (None, entry["value"])
    assert row.match


def test_the_collection_is_whole_and_marked() -> None:
    assert len(ENTRIES) == 129
    assert Counter(entry["evidence"] for entry in ENTRIES) == {"derived": 86, "printed": 32, "secondary": 11}
    for records in (ENTRIES, TABLES):
        assert max(Counter(record["id"] for record in records).values()) == 1
        for record in records:
            assert record["evidence"] in ("printed", "secondary", "derived")
            assert record["source"]
    assert all(entry["convention"] for entry in ENTRIES)
    assert all(("extra" in entry) == ("extra_what" in entry) for entry in ENTRIES)


def test_figures_of_the_papers_by_hand() -> None:
    by_id = {entry["id"]: entry["value"] for entry in ENTRIES}
    assert by_id["cp-step-one-projection"] == 2 * (32 + 64) + 1
    assert by_id["cp-opt1.3b-qv-c21"] == 24 * 2 * 21 * 193
    assert by_id["lora-opt1.3b-qv-r1"] == 24 * 2 * (2048 + 2048)
    assert by_id["lorta-llama2-7b-r1"] == 4096 + 128 + 32 + 32 + 4
    assert by_id["refta-vit-l-qv-R15"] == 2 * 15 * (2 * 1024 + 1)


def test_tables_are_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(tables=tmp_path) == 0
    told = capsys.readouterr().out
    for mark, count in Counter(entry["evidence"] for entry in ENTRIES).items():
        assert f"{mark}: {count} of {count} " in told
        assert f"- {mark}: {count} of {count} " in (tmp_path / "counts.md").read_text()
        assert f"{count}" in (ROOT / "docs" / "why.md").read_text().partition("**Counts.**")[2][:300]
    assert "published" not in (tmp_path / "counts.md").read_text().replace("published by nobody", "").replace(
        "paper/published/counts.toml", ""
    )
    for name in ("counts.md", "counts.csv"):
        assert (tmp_path / name).read_text() == (ROOT / "paper" / "tables" / name).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counts.csv", "counts.md"]


def test_a_wrong_value_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (PUBLISHED / "counts.toml").read_text(encoding="utf-8")
    assert text.count("value = 9264\n") == 1
    wrong = tmp_path / "counts.toml"
    wrong.write_text(text.replace("value = 9264\n", "value = 9265\n"), encoding="utf-8")
    assert script.main(wrong, tmp_path / "tables") == 1
    assert "cp-opt1.3b-qv-c1: secondary 9,265, from the line 9,264" in capsys.readouterr().err
    assert "| NO |" in (tmp_path / "tables" / "counts.md").read_text()


def test_a_family_that_counts_otherwise_fails() -> None:
    entry = next(entry for entry in ENTRIES if entry["id"] == "cp-opt1.3b-qv-c1")
    row = script.derive({**entry, "options": {**entry["options"], "rank": 2}})
    assert (row.by_line, row.by_family) == (9264, 18528)
    assert not row.match


def test_sharing_over_groups() -> None:
    groups = [
        {"name": "a", "sizes": {"out": 8}},
        {"name": "b", "sizes": {"out": 8}},
        {"name": "c", "sizes": {"out": 4}},
    ]
    entry = {"id": "x", "sizes": {"layer": 2, "proj": 3}, "ranks": {"r": 5}, "groups": groups, "value": 0}
    shared = script.derive({**entry, "line": "U[out r] d[layer proj r] ~A[r inp] -> layer proj out inp"})
    assert shared.by_line == 8 * 5 + 4 * 5 + 3 * (2 * 3 * 5)
    by_layer = script.derive({**entry, "line": "U[layer out r] P[proj r] ~A[r inp] -> layer proj out inp"})
    assert by_layer.by_line == 2 * 8 * 5 + 2 * 4 * 5 + 3 * (3 * 5)


def test_a_size_that_counts_may_not_be_missing() -> None:
    entry = {"id": "x", "sizes": {"layer": 2, "proj": 3}, "ranks": {"r": 5}, "value": 0}
    with pytest.raises(NetworkError, match="x: no size for 'out'"):
        script.derive({**entry, "line": "B[layer proj out r] ~A[r inp] -> layer proj out inp"})


def test_matched_budgets_are_as_stated() -> None:
    table = next(table for table in TABLES if table["id"] == "cp-matched-budget")
    for row in table["rows"]:
        lora, cp = 196608 * row["lora_r"], 9264 * row["cp_c"]
        assert abs(cp / lora - 1) < 0.02
        assert abs(row["cp"] - row["lora"] - row["delta"]) < 0.0011
