"""Pictures: everything is there, nothing covers anything else, and the same network gives the same picture."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from disks import small_disk
from hypothesis import HealthCheck, given, settings
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import tnpeft
from tnpeft import Factorization, Network, NetworkError, SiteRule, network
from tnpeft.drawing import compose, draw, figure, mermaid, text
from tnpeft.drawing.graph import graph
from tnpeft.drawing.layout import place
from tnpeft.drawing.scene import Box
from tnpeft.testing import networks

LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
HIDDEN = 0.5  # points that two boxes may share: less than a line is wide


def extents(picture: Figure) -> list[tuple[str, Any]]:
    """What is drawn with its box in points, as the renderer measures it."""
    renderer = FigureCanvasAgg(picture).get_renderer()  # type: ignore[no-untyped-call]
    axes = picture.axes[0]
    nodes = [(patch.get_gid(), patch.get_window_extent(renderer)) for patch in axes.patches]
    texts = [(t.get_gid(), t.get_window_extent(renderer)) for t in axes.texts if t.get_text()]
    return [(str(name), box) for name, box in nodes + texts]


def clashes(picture: Figure) -> list[tuple[str, str]]:
    """Pairs of drawn things that share more than a line's width, a factor and its own name apart."""
    found = []
    for (one, a), (two, b) in combinations(extents(picture), 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        inside = {one.split(":")[0], two.split(":")[0]} & {"trainable", "frozen", "constant"}
        own = "node" in one + two and inside and one.split(":")[1] == two.split(":")[1]
        if min(wide, high) * 72 / picture.dpi > HIDDEN and not own:
            found.append((one, two))
    return found


def spilled(picture: Figure) -> list[str]:
    """What reaches over the edge of the page."""
    page = picture.bbox
    return [
        name for name, box in extents(picture) if box.x0 < 0 or box.y0 < 0 or box.x1 > page.x1 or box.y1 > page.y1
    ]


@pytest.mark.parametrize("name", tnpeft.families.names())
def test_nothing_covers_anything_in_any_family(name: str) -> None:
    f = tnpeft.families.get(name)()
    picture = figure(f, {"layer": 24, "proj": 2})
    assert clashes(picture) == []
    assert spilled(picture) == []
    assert picture.get_size_inches()[0] <= 9.5
    shown = " ".join(t.get_text() for t in picture.axes[0].texts).replace("\n", " ").split()
    for line in f.lines:
        assert {factor.name for factor in line.network.factors} <= set(shown)
        assert set(line.network.indices) <= set(shown)
    scene = compose(f, {"layer": 24, "proj": 2})
    texts = [box for box in scene.boxes if box.role in ("leg", "sign", "caption")]
    assert [box.text for box in texts if any(_shrunk(box).under(line) > 0 for line in scene.lines)] == []


def _shrunk(box: Box) -> Box:
    """The box without its rim, which a line may touch."""
    return Box(box.text, box.role, box.x, box.y, box.width - 0.05, box.height - 0.05)


def test_an_overlap_would_be_found() -> None:
    picture = figure(LORA)
    first, second = picture.axes[0].texts[:2]
    second.set_position(first.get_position())
    assert len(clashes(picture)) >= 1
    first.set_position((99.0, 0.0))
    assert spilled(picture)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(networks(max_factors=5, tied=True, twins=True))
def test_drawn_networks_show_every_factor_and_index(net: Network) -> None:
    picture = figure(net)
    shown = Counter(word for t in picture.axes[0].texts for word in t.get_text().split("\n"))
    for factor, uses in Counter(factor.name for factor in net.uses()).items():
        assert shown[factor] == uses
    assert set(net.indices) <= set(shown)
    table = text(net)
    assert table.count("●") == sum(len(factor.indices) for factor in net.uses())
    assert mermaid(net).count(":::") >= len(list(net.uses()))


def test_rows_leave_left_columns_right_stack_on_top() -> None:
    net = network("G1[layer o1 a] G2[a o2 b] G3[b i1] -> layer (o1 o2) i1")
    shown = graph(net, net.terms[0], {})
    where = dict(zip((node.text for node in shown.nodes), place(shown), strict=True))
    xs, ys = [x for x, _ in where.values()], [y for _, y in where.values()]
    assert where["o1"][0] == where["o2"][0] == min(xs)
    assert where["i1"][0] == max(xs)
    assert where["layer"][1] == max(ys)
    assert where["o1"][1] > where["o2"][1]


def test_a_chain_is_drawn_as_a_chain() -> None:
    net = network("A[out a] B[a b] C[b c] D[c inp] -> out inp")
    shown = graph(net, net.terms[0], {})
    assert [place(shown)[k] for k in range(4)] == [(1, 0), (2, 0), (3, 0), (4, 0)]


def test_hyper_indices_are_dots_and_simple_bonds_are_lines() -> None:
    net = network("w[r] A[out r] B[inp r s] C[s] -> out inp")
    shown = graph(net, net.terms[0], {"r": 8})
    dots = [node for node in shown.nodes if not node.kind and not node.side]
    assert [(dot.text, dot.indices) for dot in dots] == [("r = 8", ("r",))]
    assert [edge.text for edge in shown.edges if edge.text] == ["s"]


def test_signs_captions_and_legend() -> None:
    quanta = compose("G[o1 i1] H[o2 i2] - ~G[o1 i1] ^K[o2 i2] -> (o1 o2) (i1 i2)")
    roles = Counter(box.role for box in quanta.boxes)
    assert roles["sign"] == 1
    assert [box.text for box in quanta.boxes if box.role == "caption"] == ["trained", "frozen random", "constant"]
    two = Factorization(
        "two", (SiteRule(network("A[out inp] -> out inp"), "fc1"), SiteRule(network("v[out] w[inp] -> out inp")))
    )
    assert [box.text for box in compose(two).boxes if box.role == "caption"] == ["fc1", "*"]
    assert all(box.role != "caption" for box in compose(LORA).boxes)


def test_twins_stand_where_their_originals_stand() -> None:
    f = tnpeft.families.get("dota")()
    first, second = (graph(f.network, term, {}) for term in f.network.terms)
    assert place(first) == place(second)


def test_sizes_are_shown_where_they_are_known() -> None:
    assert "r = 8" in [t.get_text() for t in figure(tnpeft.families.lora(rank=8)).axes[0].texts]
    assert "layer = 24\nproj" in [t.get_text() for t in figure(LORA, {"layer": 24}).axes[0].texts]
    with pytest.raises(NetworkError, match="the size of 'r' is 0"):
        figure(LORA, {"r": 0})


@pytest.mark.parametrize(("ending", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_files_are_what_their_ending_says_and_repeat(ending: str, magic: bytes, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    one = tnpeft.draw(LORA, tmp_path / f"one.{ending}", {"r": 8})
    two = draw(network(LORA), str(tmp_path / f"two.{ending}"), {"r": 8})
    assert one.read_bytes().startswith(magic)
    assert one.read_bytes() == two.read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_the_text_of_an_svg_is_text(tmp_path: Path) -> None:
    assert ">r = 8</text>" in tnpeft.draw(LORA, tmp_path / "lora.svg", {"r": 8}).read_text()


@pytest.mark.parametrize("file", ["lora.gif", "lora", "lora.jpeg"])
def test_other_endings_are_refused(file: str, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"end the name in \.svg, \.png, \.pdf"):
        draw(LORA, tmp_path / file)


def test_mermaid_of_a_difference_has_a_subgraph_for_each_term() -> None:
    chart = tnpeft.mermaid("w[r] A[out r] B[r inp] - ^W[out inp] -> out inp", {"r": 8}).splitlines()
    assert chart[0] == "flowchart LR"
    assert [row.strip() for row in chart if "subgraph" in row] == ['subgraph s0 ["+"]', 'subgraph s1 ["-"]']
    assert any('(("r = 8")):::dot' in row for row in chart)
    assert any('{{"W"}}:::constant' in row for row in chart)
    numbers = [row.split("(")[0].split("[")[0].split("{")[0].strip() for row in chart if ":::" in row]
    assert len(numbers) == len(set(numbers))


def test_text_marks_signs_kinds_and_sites() -> None:
    rows = text("~B[out r] A[r inp] - ^W[out inp] -> out inp").splitlines()
    assert [row.split()[0] for row in rows[1:3]] == ["~B", "A"]
    assert rows[3].startswith("- ^W")
    f = Factorization(
        "two", (SiteRule(network("A[out inp] -> out inp"), "fc1"), SiteRule(network("v[out] w[inp] -> out inp")))
    )
    assert text(f).startswith("fc1:\n")
    assert "*:" in text(f).splitlines()


def test_the_order_inside_a_group_is_drawn() -> None:
    """Two networks whose matrices differ by a permutation of columns have different pictures."""
    from tnpeft.drawing.graph import graph
    from tnpeft.drawing.scene import scene

    nets = [tnpeft.network(f"A[o1 a] B[o2 b] C[i1 a] D[i2 b] -> (o1 o2) ({group})") for group in ("i1 i2", "i2 i1")]
    texts = [{box.text for box in scene(graph(net, net.terms[0], {})).boxes} for net in nets]
    assert {"(o1 o2)", "(i1 i2)"} <= texts[0]
    assert {"(o1 o2)", "(i2 i1)"} <= texts[1]


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_a_picture_is_written_whole_or_stays(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"lora.{ending}"
    draw(LORA, file)
    before = file.read_bytes()
    with small_disk(300), pytest.raises(OSError, match="too large"):
        draw("C[out a] B[a b] A[b inp] -> out inp", file)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
