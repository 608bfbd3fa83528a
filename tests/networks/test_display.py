"""Notebooks show networks and reports as HTML: every name escaped, a picture where one can be drawn."""

from __future__ import annotations

import html.parser
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

import tnpeft
from tnpeft.testing import networks

LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
_VOID = {"img"}


class Reader(html.parser.HTMLParser):
    """The text of a page; an error where a tag is closed that is not open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.open += [tag] * (tag not in _VOID)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(max_examples=25)
@given(networks())
def test_the_line_stands_in_the_html(net: tnpeft.Network) -> None:
    from tnpeft.networks import display

    offered, display._offered[:] = [*display._offered], []
    try:
        found = Reader(net._repr_html_())
    finally:
        display._offered[:] = offered
    assert str(net) in found.text
    assert "img" not in found.tags


def test_a_network_comes_with_its_picture() -> None:
    code = f"import tnpeft; net = tnpeft.network({LORA!r}); print(net._repr_html_())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "data:image/svg+xml" in done.stdout


def test_networks_alone_never_draw() -> None:
    code = f"""
import sys
from tnpeft.networks import network
network({LORA!r})._repr_html_()
print("matplotlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_everything_that_prints_as_a_table_is_html_with_names_escaped() -> None:
    net = tnpeft.network(LORA)
    sizes = {"layer": 2, "proj": 1, "out": 8, "inp": 8, "r": 2}
    lora = replace(tnpeft.families.lora(rank=2), name="<script>", source="a & b")
    shown = [
        net,
        lora,
        tnpeft.plan(net, sizes, tokens=4),
        tnpeft.plan_table(net, sizes),
        tnpeft.budget([lora, "cp"], parameters=10_000, model="roberta-base"),
        tnpeft.compare([lora, "cp"], parameters=10_000, model="roberta-base"),
        tnpeft.testing.examine(lora),
    ]
    for each in shown:
        found = Reader(each._repr_html_())
        assert {"table", "td"} <= found.tags, each
        assert "script" not in found.tags
    assert "<script>" in Reader(lora._repr_html_()).text


def test_an_open_tag_would_be_found() -> None:
    with pytest.raises(AssertionError):
        Reader("<div><pre></div>")


def test_a_picture_is_shown_as_svg_where_it_is_not_too_large() -> None:
    net = tnpeft.network("B[out r] A[r inp] -> out inp")
    assert net._repr_svg_() == tnpeft.drawing.svg(net)
    f = tnpeft.families.lora(rank=2)
    assert f._repr_svg_() == tnpeft.drawing.svg(f)
    long = tnpeft.network(" ".join(f"A{k}[out inp]" for k in range(41)) + " -> out inp")
    assert long._repr_svg_() is None
