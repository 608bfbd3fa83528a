"""A comparison is what the single functions say, row by row, in every form that it is written in."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tnpeft
from tnpeft._text import Table
from tnpeft.cli import app
from tnpeft.comparison import compare
from tnpeft.layout import layout
from tnpeft.models.cards import sites

OPT = {"model": "facebook/opt-1.3b", "targets": ["q_proj", "v_proj"]}
GQA = {"model": "meta-llama/Llama-3.2-1B", "targets": ["q_proj", "v_proj"]}
MINE = ("mine", "U[out a] G[layer proj a b] V[inp b] -> layer proj out inp")
CONFIG = {"model_type": "opt", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256}


def mean(found: list[tuple[float, int]]) -> float:
    return sum(value * count for value, count in found) / sum(count for _, count in found)


@pytest.mark.parametrize("where", [OPT, GQA], ids=["one shape", "two shapes"])
@pytest.mark.parametrize("by", ["parameters", "dof"])
def test_every_row_is_what_the_single_functions_say(where: dict, by: str) -> None:
    names = ["lora", "cp", "lotr", "vera", "ia3"]
    table = compare(names, parameters=150_000, tokens=256, sort="", by=by, **where)
    assert [row.name for row in table] == names
    for row in table:
        [rung] = tnpeft.budget(row.name, parameters=150_000, by=by, **where)
        f = tnpeft.families.get(row.name)().with_ranks(**rung.nearest.ranks)
        placed = layout(f, sites(**where))
        assert row.ranks == rung.nearest.ranks
        assert row.parameters == tnpeft.parameters(f, **where)
        shapes = placed.shapes()
        total = sum(tnpeft.dof(s.network, s.sizes) for s in shapes)
        assert row.dof == min(total, row.parameters)
        assert row.rank_bound == max(tnpeft.rank_bound(s.network, s.sizes) for s in shapes)
        gains = tnpeft.gain(f, **where)
        counts = {p: sum(s.proj == p for s in sites(**where)) for p in gains}
        assert row.gain == pytest.approx(math.sqrt(mean([(gains[p] ** 2, counts[p]) for p in gains])))
        plans = [(tnpeft.plan(s.network, s.sizes, tokens=256), s.count) for s in shapes]
        assert row.macs == pytest.approx(mean([(p.macs / 256, n) for p, n in plans]))
        assert row.saved_bytes == pytest.approx(mean([(4 * p.saved / 256, n) for p, n in plans]))
        assert row.plan_seconds >= 0


def test_a_budget_is_a_number_or_another_adapter() -> None:
    by_name = compare("cp", parameters="lora:1", **OPT)
    assert by_name.budget == 196_608
    assert compare("cp", parameters=196_608, **OPT) == by_name
    assert compare("cp", parameters=tnpeft.families.lora(rank=1), **OPT) == by_name
    assert compare("cp", parameters="lora:1", by="dof", **OPT).budget == 196_560


def test_without_a_budget_ranks_are_as_given() -> None:
    table = compare(["lora:4", tnpeft.families.cp(rank=3), MINE], sort="", **OPT)
    assert [dict(row.ranks) for row in table] == [{"r": 4}, {"r": 3}, {"a": 1, "b": 1}]
    assert [row.name for row in table] == ["lora", "cp", "mine"]


def test_what_does_not_fit_is_a_row_that_says_why() -> None:
    table = compare(["lotra", "lora", "pera"], parameters="lora:1", **OPT)
    lora, pera, lotra = table
    assert (lora.fits, lora.problem) == (True, "")
    assert pera.dof is None
    assert "used twice" in pera.problem
    assert not lotra.fits
    assert "'basis' has no meaning" in lotra.problem
    assert all(row.problem in str(table) for row in table)


def test_rows_are_sorted_by_any_number_and_those_without_it_come_last() -> None:
    for column in ("parameters", "dof", "rank_bound", "gain", "macs", "saved_bytes"):
        up = [
            getattr(r, column) for r in compare(["lotra", "vera", "lora", "cp"], parameters=10**5, sort=column, **OPT)
        ]
        down = [
            getattr(r, column)
            for r in compare(["lora", "lotra", "cp", "vera"], parameters=10**5, sort=f"-{column}", **OPT)
        ]
        assert up[:3] == sorted(up[:3])
        assert down[:3] == up[2::-1]
        assert up[3] is down[3] is None


def test_forms_give_back_the_rows(tmp_path: Path) -> None:
    table = compare(["lora", MINE, "lotra"], parameters="lora:1", **OPT)
    back = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [row["name"] for row in back] == [row.name for row in table]
    for read, row in zip(back, table, strict=True):
        assert read["line"] == row.line
        assert read["ranks"] == " ".join(f"{k}={v}" for k, v in row.ranks.items())
        for name in ("parameters", "dof", "rank_bound", "gain", "macs", "saved_bytes"):
            assert read[name] == ("" if getattr(row, name) is None else str(getattr(row, name)))
    data = json.loads(table.to_json())
    assert [row["gain"] for row in data["rows"]] == [row.gain for row in table]
    assert (data["budget"], data["sites"], data["tokens"]) == (196_608, 48, 2048)
    assert table.to_markdown().count("\n") == len(table) + 1
    frame = pytest.importorskip("pandas") and table.to_dataframe()
    assert list(frame.index) == [row.name for row in table]
    assert frame.loc["lora", "parameters"] == 196_608
    for ending in (".svg", ".png", ".pdf"):
        assert table.plot(tmp_path / f"table{ending}").stat().st_size > 1000
    assert len(list(tmp_path.iterdir())) == 3


def test_names_are_escaped_in_html() -> None:
    shown = compare([("<script>", "lora"), ("a & b", "cp")], parameters="lora:1", **OPT)._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "a &amp; b" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sort": "speed"}, "unknown column 'speed'"),
        ({"by": "bytes"}, "unknown budget by='bytes'"),
        ({"parameters": 0}, "the budget is 0"),
        ({"parameters": "nosuch:1"}, "no family is called 'nosuch'"),
        ({"parameters": "lora:x"}, "invalid rank 'x'"),
        ({"parameters": "ia3:4"}, "'ia3' has no rank to choose"),
        ({"tokens": 0}, "tokens"),
        ({"targets": ["nosuch"]}, "no projection 'nosuch'"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict, message: str) -> None:
    with pytest.raises(tnpeft.NetworkError, match=message):
        compare(["lora"], **{"parameters": 10**5, **OPT, **changes})


def test_at_the_shell_in_every_form(tmp_path: Path) -> None:
    file, picture = tmp_path / "config.json", tmp_path / "table.svg"
    file.write_text(json.dumps(CONFIG))
    common = ["compare", "lora", f"{MINE[0]}={MINE[1]}", "-p", "lora:2", "-m", str(file), "--sort", "gain"]
    table = compare(["lora", MINE], parameters="lora:2", model=CONFIG, sort="gain")
    for form in ("text", "md", "csv", "json"):
        done = CliRunner().invoke(app, [*common, "--format", form, "--plot", str(picture)], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        if form == "json":
            assert [row["parameters"] for row in json.loads(done.stdout)["rows"]] == [r.parameters for r in table]
        else:
            assert all(row.name in done.stdout for row in table)
    assert picture.exists()
    bad = CliRunner().invoke(app, ["compare", "lora", "-m", str(file), "--sort", "speed"])
    assert (bad.exit_code, "unknown column" in bad.stderr) == (2, True)


def test_one_table_in_all_forms() -> None:
    table = Table(("a|b", "n"), (("<x>", 1000), ("long cell", None)), "<>", rule=True)
    assert table.text().splitlines() == [
        "a|b            n",
        "----------------",
        "<x>        1,000",
        "long cell",
    ]
    assert table.markdown().splitlines()[0] == r"| a\|b | n |"
    assert table.csv() == "a|b,n\n<x>,1000\nlong cell,\n"
    assert "&lt;x&gt;" in table.html()


def test_bare_sizes_stand_for_a_model_of_that_shape() -> None:
    """OPT-1.3B's q and v are 24 x 2 linears of 2048 x 2048 with 32 heads."""
    names = ["lora", "cp", MINE]
    with_model = compare(names, parameters="lora:1", sort="", **OPT)
    bare = compare(names, parameters="lora:1", sort="", out=2048, inp=2048, layer=24, proj=2, heads=32)
    assert bare.rows == with_model.rows
    assert str(bare).startswith("2048 x 2048, proj0, proj1: 48 sites, 2,048 tokens, nearest to 196,608 parameters")
    assert [row.parameters for row in compare("lora:4", out=64, inp=32)] == [4 * 96]


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({}, "neither a model nor the size of 'out'"),
        ({"out": 4}, "neither a model nor the size of 'inp'"),
        ({"out": 4, "inp": 0}, "the size of 'inp' is 0"),
        ({"out": 4, "inp": 4, "layer": 1.5}, "the size of 'layer' is 1.5"),
    ],
)
def test_bare_sizes_that_are_not_sizes_are_refused(sizes: dict, problem: str) -> None:
    with pytest.raises(tnpeft.NetworkError, match=problem):
        compare("lora", **sizes)
