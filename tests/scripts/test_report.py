"""The report: what stands in it is what the result files hold now, and nothing that no file holds."""

from __future__ import annotations

import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from build_report import Facts, Missing, build, show
from check_studies import problems, spread

from tnpeft.studies.files import write_json
from tnpeft.studies.reports.figures import is_ladder
from tnpeft.studies.reports.points import Point

ROOT = Path(__file__).resolve().parents[2]


def test_the_report_is_built_from_the_files_beside_it(tmp_path: Path) -> None:
    paper = tmp_path / "paper"
    shutil.copytree(ROOT / "paper", paper, ignore=shutil.ignore_patterns("report.md", "figures"))
    build(paper)
    assert (paper / "report.md").read_text() == (ROOT / "paper" / "report.md").read_text()


def test_a_number_that_no_file_holds_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "report.in.md").write_text("{{ mean('nothing', 'LoRA (rank=1)') }}")
    with pytest.raises(Missing, match=r"nothing\.json is not there"):
        build(tmp_path)
    assert not (tmp_path / "report.md").exists()


FACTS = {
    "name": "one",
    "title": "",
    "reference": "LoRA",
    "backbone": "digits OPT 0",
    "backbones": {"digits:0": "abc"},
    "settings": {},
    "seeds": [0, 1],
    "contrasts": [{"name": "CP", "plus": "CP", "minus": "LoRA", "measure": "metric", "margin": 0.01, "task": "t"}],
}


def point(label: str, scores: dict[str, float], edge: bool = False) -> dict[str, Any]:
    return Point("t", label, "", "family", 8, 0, 0.1, edge, scores, scores, losses=scores).table


def paper_of(folder: Path, manifest: str, **over: Any) -> Path:
    points = [point("LoRA", {"0": 0.5, "1": 0.6}), point("CP", {"0": 0.6, "1": 0.8})]
    write_json(folder / "tables" / "one.json", {**FACTS, "points": points, **over})
    (folder / "backbones.toml").write_text(manifest)
    return folder


def test_a_study_on_an_unknown_backbone_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "report.in.md").write_text("{{ mean('one', 'LoRA') }} {{ difference('one', 'CP', 'LoRA') }}")
    for manifest in ("", '"digits:0" = "other"'):
        with pytest.raises(Missing, match="digits:0"):
            build(paper_of(tmp_path, manifest))
    with pytest.raises(Missing, match="names no backbone"):
        build(paper_of(tmp_path, "", backbones={}))
    build(paper_of(tmp_path, '"digits:0" = "abc"'))
    text = (tmp_path / "report.md").read_text()
    assert text == "55.0 % (-8.5 to 118.5, n = 2) +15.0 points (-48.5 to +78.5, n = 2)\n"
    with pytest.raises(Missing, match="one has no QR"):
        Facts(tmp_path).mean("one", "QR")


def test_verdicts_need_eight_observations_and_edges_are_refused(tmp_path: Path) -> None:
    paper = paper_of(tmp_path, '"digits:0" = "abc"')
    show(paper, "one")
    assert "none under 8" in Facts(paper).contrasts("one")
    assert Facts(paper).contrast("one", "CP") == Facts(paper).difference("one", "CP", "LoRA")
    with pytest.raises(Missing, match="one declares no contrast 'QR'"):
        Facts(paper).contrast("one", "QR")
    assert list(problems(paper)) == []
    table = paper / "tables" / "one-contrasts.csv"
    table.write_text(table.read_text().rstrip("\n") + "higher\n")
    assert list(problems(paper)) == ["one: CP has a verdict on 2 observations"]
    paper_of(tmp_path, "", points=[point("LoRA", {"0": 0.5}, edge=True)], contrasts=[])
    assert ["not in backbones.toml" in text for text in problems(paper)] == [True]
    paper_of(tmp_path, '"digits:0" = "abc"', points=[point("LoRA", {"0": 0.5}, edge=True)], contrasts=[])
    assert list(problems(paper)) == ["one: the value of LoRA stands at an end of its grid"]


def test_the_committed_studies_break_no_guard() -> None:
    assert list(problems(ROOT / "paper")) == []


def test_controls_are_told_from_their_noise() -> None:
    def made(*means: float) -> tuple[Point, ...]:
        return tuple(Point.of(point(f"c{k}", {"0": mean - 0.1, "1": mean + 0.1})) for k, mean in enumerate(means))

    for means, fits in (((1.0, 1.1), True), ((1.0, 2.0), False)):
        gap, floor = spread(made(*means))
        assert (gap <= floor) == fits


def test_the_report_is_short_and_the_figures_it_names_are_there() -> None:
    lines = (ROOT / "paper" / "report.md").read_text().splitlines()
    names = [line.partition("](")[2].rstrip(")") for line in lines if line.startswith("![")]
    tables = [len([*rows]) - 2 for its, rows in groupby(lines, lambda line: line.startswith("|")) if its]
    assert len(lines) <= 150
    assert len(names) <= 5
    assert len(tables) <= 4
    assert max(tables) <= 10
    assert all((ROOT / "paper" / name).exists() for name in names)


def test_a_line_joins_sizes_that_are_numbers_only() -> None:
    def point(label: str, size: str) -> Point:
        return Point("t", label, size, "family", 1, 0, 0.1, False, {0: 0.5}, {0: 0.5})

    assert is_ladder([point("LoRA", "rank=1"), point("LoRA", "rank=2"), point("IA3", "")])
    assert not is_ladder([point("LoRA", "rank=1"), point("CP", "rank=2")])
    assert not is_ladder([point("T", "construction=att"), point("T", "construction=qkv")])
