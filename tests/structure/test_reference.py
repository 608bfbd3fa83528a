"""Every public name has an example, which the doctests run, and a place in the site's reference."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import tnpeft

ROOT = Path(__file__).parents[2]


def packages() -> Iterator[Any]:
    """``tnpeft`` and every package below it that says what is public, but for the shell's."""
    yield tnpeft
    for found in pkgutil.walk_packages(tnpeft.__path__, "tnpeft."):
        module = import_module(found.name) if found.ispkg else None
        if hasattr(module, "__all__") and found.name != "tnpeft.cli":
            yield module


def public() -> dict[str, Any]:
    """The public functions and classes by their dotted names."""
    found = {
        f"{package.__name__}.{name}": getattr(package, name) for package in packages() for name in package.__all__
    }
    return {path: its for path, its in found.items() if inspect.isclass(its) or inspect.isroutine(its)}


def test_every_public_name_has_an_example() -> None:
    named = public()
    assert len(named) > 100
    assert {"tnpeft.plan", "tnpeft.optim.precondition", "tnpeft.testing.check", "tnpeft.studies.Study"} <= set(named)
    assert [path for path, its in named.items() if ">>> " not in (inspect.getdoc(its) or "")] == []


class Examples(HTMLParser):
    """The places of a page that a link can name, and those with a block of code between them and the next."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.shown: set[str] = set()
        self.above: str = ""
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("h1", "h2") and given.get("id"):
            self.above = given["id"] or ""
            self.places.add(self.above)

    def handle_data(self, data: str) -> None:
        if data.startswith(">>>"):
            self.shown.add(self.above)


@pytest.mark.browser
def test_every_public_name_has_a_place_in_the_site(need: Callable[[Path | None, str, str], Path]) -> None:
    folder = need(ROOT / "site" / "reference", "the site", "make docs builds it")
    pages = [Examples(page) for page in folder.glob("*/index.html")]
    shown = {place for page in pages for place in page.shown}
    paths = {f"{its.__module__}.{its.__name__}" for its in public().values()}
    assert len(paths) > 100
    assert paths - shown == set()
    assert {place for page in pages for place in page.places} - shown  # attributes have no examples: it can fail
