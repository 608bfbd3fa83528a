"""The code of the documentation's pages runs and prints what the pages say."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if ">>> " in path.read_text())
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_page_prints_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(DOCS / page), module_relative=False, optionflags=FLAGS)
    assert result.attempted > 0
    assert result.failed == 0


MADE = ("families/index.md", "reference/index.md")  # made from the package when the site is built


def test_every_link_of_the_pages_leads_somewhere() -> None:
    for path in DOCS.rglob("*.md"):
        for part in path.read_text().split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            there = not target or target.startswith("http") or target in MADE
            assert there or (path.parent / target).exists(), (path.name, target)


def test_every_file_that_the_contributor_is_sent_to_is_there() -> None:
    named = re.findall(r"`(tnpeft/[\w/]+\.\w+)`", (DOCS / "contributing.md").read_text())
    assert len(named) > 10
    assert [name for name in named if not (DOCS.parent / name).exists()] == []
