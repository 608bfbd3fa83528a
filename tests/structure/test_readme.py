"""The README's code runs and prints what the README says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_code_of_the_readme_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(README), module_relative=False, optionflags=FLAGS)
    assert result.attempted > 10
    assert result.failed == 0


def test_every_picture_of_the_readme_is_there() -> None:
    text = README.read_text()
    pictures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert pictures
    for picture in pictures:
        assert picture.startswith("http") or (README.parent / picture.split("#")[0]).exists(), picture


def test_it_is_short_and_its_figures_are_the_reports() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 80
    studies = text.partition("## Studies")[2].partition("## ")[0]
    figures = re.findall(r"[+-]?\d+(?:\.\d+)?(?: points)?\s+\([^)]*\d[^)]*\)", studies)
    assert len(figures) >= 2
    report = (README.parent / "paper" / "report.md").read_text()
    assert [each for each in figures if " ".join(each.split()) not in report] == []
