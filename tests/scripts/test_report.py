"""The report: what stands in it is what the result files hold now, and nothing that no file holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from build_report import Facts, Missing, build

from tnpeft.studies.figures import is_ladder
from tnpeft.studies.results import Point

ROOT = Path(__file__).resolve().parents[2]


def test_the_report_is_built_from_the_files_beside_it(tmp_path: Path) -> None:
    paper = tmp_path / "paper"
    shutil.copytree(ROOT / "paper", paper, ignore=shutil.ignore_patterns("report.md", "figures"))
    build(paper)
    assert (paper / "report.md").read_text() == (ROOT / "paper" / "report.md").read_text()


def test_a_number_that_no_file_holds_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "report.in.md").write_text("{{ mean('nothing', 'sst2', 'LoRA', 'rank=1') }}")
    with pytest.raises(Missing, match=r"nothing\.json is not there"):
        build(tmp_path)
    assert not (tmp_path / "report.md").exists()
    facts = Facts(ROOT / "paper")
    with pytest.raises(Missing, match="has no LoRA rank=99 on sst2"):
        facts.mean("cp_steps_small_opt", "sst2", "LoRA", "rank=99")


def test_figures_named_in_the_report_are_there() -> None:
    text = (ROOT / "paper" / "report.md").read_text()
    names = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(names) >= 5
    assert all((ROOT / "paper" / name).exists() for name in names)


def test_a_line_joins_sizes_that_are_numbers_only() -> None:
    def point(label: str, size: str) -> Point:
        return Point("t", label, size, "family", 1, 0, 0.1, False, {0: 0.5}, {0: 0.5})

    assert is_ladder([point("LoRA", "rank=1"), point("LoRA", "rank=2"), point("IA3", "")])
    assert not is_ladder([point("LoRA", "rank=1"), point("CP", "rank=2")])
    assert not is_ladder([point("T", "construction=att"), point("T", "construction=qkv")])
