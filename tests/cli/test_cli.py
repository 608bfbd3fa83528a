"""The commands as a shell sees them: output, JSON, exit codes, and errors without a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sympy
from typer.testing import CliRunner, Result

import tnpeft
from tnpeft.cli import app

LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
OPT = ("--model", "facebook/opt-1.3b", "--targets", "q_proj,v_proj")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def answer(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_count_of_a_line_and_of_a_family() -> None:
    line = answer("count", LORA, "-r", "r=1", "-s", "layer=24", "-s", "proj=2", "-s", "out=2048", "-s", "inp=2048")
    assert (line["parameters"], line["by_factor"], line["rank_bound"]) == (196608, {"B": 98304, "A": 98304}, 1)
    assert line["one_more_rank"] == {"r": 196608}
    family = answer("count", "cp", "--rank", "21", "--set", "out=32,64", "--set", "inp=32,64", *OPT)
    assert family["parameters"] == 194544
    assert family["one_more_rank"] == {"r": 9264}
    assert list(family["rank_bound"].values()) == [21]
    assert family["biases_not_counted"] == 24 * 2 * 2048
    assert family["splits"] == {"q_proj 2048 x 2048": "o1=32 o2=64 i1=32 i2=64"}
    chosen = answer("count", "tensor_train", "-s", "o1=16", *OPT)
    assert chosen["splits"] == {"q_proj 2048 x 2048": "o1=16 o2=128 i1=32 i2=64"}
    assert answer("count", "lora", *OPT)["splits"] == {}


def test_a_line_on_a_model_and_a_bare_formula() -> None:
    assert answer("count", LORA, "--rank", "8", *OPT)["parameters"] == 8 * 196608
    bare = answer("count", LORA)
    assert bare["parameters"] == bare["formula"] == "layer*proj*r*(inp + out)"
    assert "rank_bound" not in bare
    assert run("count", LORA, "-r", "8", *OPT).stdout.splitlines()[2] == "parameters          1,572,864"


def test_ragged_sites_are_told() -> None:
    data = answer("count", "lora", "--rank", "2", "--model", "facebook/opt-125m", "--targets", "q_proj,fc1")
    assert data["parameters"] == 12 * 2 * (768 + 768 + 768 + 3072)
    assert data["rank_bound"] == {"q_proj 768 x 768": 2, "fc1 3072 x 768": 2}
    assert len(data["sites"]) == 2


def test_a_warning_is_one_line_on_stderr() -> None:
    result = run("count", "A[out r] B[r inp] -> out inp", "-r", "40", "-s", "out=8", "-s", "inp=8")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: the rank 'r' is 40")
    assert len(result.stderr.splitlines()) == 1


def test_plan_is_the_librarys_plan() -> None:
    sizes = {"out": 64, "inp": 32, "r": 2}
    data = answer("plan", "B[out r] A[r inp] -> out inp", "-r", "2", "-s", "out=64", "-s", "inp=32", "--tokens", "8")
    best = tnpeft.plan(tnpeft.network("B[out r] A[r inp] -> out inp"), sizes, tokens=8)
    assert data[0]["macs"] == best.macs
    assert data[0]["steps"] == [str(step) for step in best.steps]
    text = run("plan", "lora", "--rank", "2", "-s", "out=64", "-s", "inp=32", "--tokens", "8", "--inference")
    assert "inference" in text.stdout


def test_plans_for_all_numbers_of_tokens_and_for_every_shape() -> None:
    data = answer("plan", "lora", "--model", "facebook/opt-125m", "--targets", "q_proj,fc1", "--table")
    assert [each["site"] for each in data] == ["q_proj 768 x 768", "fc1 3072 x 768"]
    assert all(each["plans"][0]["from"] == 1 for each in data)


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf"])
def test_draw_writes_a_picture(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"lora{ending}"
    assert answer("draw", "lora", "--out", str(file))["file"] == str(file)
    assert file.stat().st_size > 1000


def test_draw_prints_text_and_mermaid() -> None:
    assert "●" in run("draw", LORA).stdout
    assert run("draw", LORA, "--mermaid").stdout.startswith("flowchart LR")


def test_check_passes_and_fails_by_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer("check", "U[out r] V[inp r] -> out inp")["passed"] is True
    monkeypatch.setattr(tnpeft.counting, "rank_bound", lambda *_: 0)
    result = run("check", "U[out r] V[inp r] -> out inp")
    assert result.exit_code == 1
    assert "FAILED  rank within its bound" in result.stdout


def test_families_lists_all_and_tells_about_one() -> None:
    rows = answer("families")
    assert [row["name"] for row in rows] == list(tnpeft.families.names())
    assert all(row["formulas"] and row["source"] and row["lines"] for row in rows)
    assert "arXiv 2310.11454" in run("families", "vera").stdout
    assert "vera" in run("families").stdout


def test_budget_by_number_and_by_family() -> None:
    data = answer("budget", "lora", "cp", "-p", "196608", *OPT)
    assert [row["below"]["count"] for row in data["rows"]] == [196608, 194544]
    same = answer("budget", "cp", "-p", "lora", "--rank", "1", *OPT)
    assert same["parameters"] == 196608
    assert answer("budget", "cp", "-p", "lora:1", *OPT)["parameters"] == 196608
    assert answer("budget", "cp", "-p", "lora:1", "--by", "dof", *OPT)["parameters"] == 196560


BAD = [
    (["count", "A[out inp r] -> out inp"], "index 'r' stands in one factor only"),
    (["count", "nosuch"], "no family is called 'nosuch'"),
    (["count", "lora", "--set", "colour=red"], "the family 'lora' has no option 'colour'"),
    (["count", LORA, "--rank", "r=many"], "invalid size 'r=many'"),
    (["count", "lora", "--set", "rslora=no", "--set", "out=8"], "has no option 'out'"),
    (["count", "lora", "--set", "rslora=maybe"], "rslora is True or False"),
    (["count", "cp", "--set", "out=32"], "call it as cp(rank=21, out=(None, None)"),
    (["count", "lora", "--set", "alpha=inf"], "scale is inf"),
    (["count", LORA, "--rank", "r=" + "9" * 5000], "invalid size 'r=999"),
    (["check", LORA, "--seed", "-1"], "Invalid value"),
    (["compare", "lora", "-p", "9999", "-s", "z=3", *OPT], "unknown index 'z'"),
    (["compare", "lora", "-p", "9999", "-s", "layer=3", *OPT], "the size of 'layer' comes from the model"),
    (["compare", "lora", "-p", "9999", "--ratio", "z=3", *OPT], "no family has the rank 'z'"),
    (["count", LORA, "--size", "q=3"], "unknown index 'q'"),
    (["count", LORA, "--size", "layer"], "invalid size 'layer'"),
    (["count", LORA, "--set", "out=3,4"], "--set is for families"),
    (["count", "lora", "--targets", "q_proj"], "targets are given without a model"),
    (["plan", "lora"], "no size for 'out', 'inp'"),
    (["plan", "lora", "-s", "out=8", "-s", "inp=8", "--minimize", "luck"], "unknown objective minimize='luck'"),
    (["draw", "lora", "--out", "lora.gif"], "cannot draw into 'lora.gif'"),
    (["draw", "lora", "--out", "no/such/folder/lora.svg"], "No such file"),
    (["check", "lora", "-s", "out=8"], "a family is tried at small sites"),
    (["budget", "lora", "-p", LORA, *OPT], "a bond without a rank"),
    (["budget", "nosuch", "-p", "100", *OPT], "no family is called 'nosuch'"),
    (["budget", "lora", "-p", "0", *OPT], "the budget is 0"),
    (["budget", "lora", "-p", "-5", *OPT], "the budget is -5"),
    (["budget", "lora", "-p", "1.5", *OPT], "the budget is 1.5"),
    (["count", "lora", "--set", "rank=0"], "the size of 'rank' is 0"),
    (["count", "lora", "--set", "alpha=x"], "alpha is 'x'"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_answered_with_exit_code_2(arguments: list[str], text: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert text in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_help_has_examples_for_every_command() -> None:
    for command in ("count", "plan", "draw", "check", "families", "budget"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert f"tnpeft {command}" in result.stdout


def test_the_installed_command_counts_without_torch() -> None:
    code = (
        "import sys\nfrom tnpeft.cli import main\n"
        "sys.argv = ['tnpeft', 'count', 'lora', '--model', 'facebook/opt-1.3b']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print('code', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "code 0 False"


def test_the_version() -> None:
    import tnpeft

    assert run("--version").stdout == f"tnpeft {tnpeft.__version__}\n"


def test_check_takes_a_line_without_ranks_and_refuses_one_without_a_matrix() -> None:
    assert run("check", "A[out inp] -> out inp", "-s", "out=3", "-s", "inp=4").exit_code == 0
    result = run("check", "A[o] -> o")
    assert result.exit_code == 2
    assert "the output has no rows and columns" in result.stderr


def test_budget_of_lines_and_with_ratios() -> None:
    sizes = ("-s", "layer=2", "-s", "proj=1", "-s", "out=64", "-s", "inp=32")
    family, line = (answer("budget", net, "-p", "3000", *sizes)["rows"][0] for net in ("lora", LORA))
    assert line == {**family, "family": LORA}
    tucker = "G[layer proj a b] U[out a] V[inp b] -> layer proj out inp"
    row = answer("budget", tucker, "-p", "3000", "--ratio", "a=2", *sizes)["rows"][0]
    assert row["below"]["ranks"] == {"a": 26, "b": 13}
    assert run("budget", tucker, "-p", "3000", "--ratio", "a=-1", *sizes).exit_code == 2
    assert run("budget", tucker, "-p", "3000", "--ratio", "z=2", *sizes).exit_code == 2


def test_families_in_a_pipe_are_one_row_each() -> None:
    rows = run("families").stdout.splitlines()
    starts = [row.split()[0] for row in rows[1:] if not row.startswith(" ")]
    assert starts == list(tnpeft.families.names())
    assert "layer*proj*r*(inp + out)" in next(row for row in rows if row.startswith("lora "))


def test_every_formula_is_an_expression() -> None:
    for row in answer("families"):
        for formula in row["formulas"]:
            names = {name: sympy.Symbol(name) for name in re.findall(r"[A-Za-z_]\w*", formula)}
            assert sympy.sympify(formula, locals=names).free_symbols or formula.isdigit(), row["name"]


@pytest.mark.parametrize("name", ["lora", "cp", "lorta", "vera", "lotr", "tensor_train", "ia3"])
@pytest.mark.parametrize("where", ["Qwen/Qwen2.5-7B q,v", "llama-3.2-1b all-linear", "opt-125m q,v"])
def test_degrees_of_freedom_of_a_model_never_exceed_its_parameters(name: str, where: str) -> None:
    model, targets = where.split()
    found = answer("count", name, "-m", model, "-t", targets)
    free = found["degrees_of_freedom"]
    assert sum(free.values() if isinstance(free, dict) else [free]) <= found["parameters"]
    if name == "lora":
        sites = tnpeft.counting.sites(model, targets)
        assert sum(free.values() if isinstance(free, dict) else [free]) == sum(
            8 * (s.out + s.inp) - 64 for s in sites
        )


def test_a_formula_is_that_of_the_line_in_use() -> None:
    assert answer("count", "ia3")["formula"] == answer("count", "ia3")["parameters"]
    assert set(answer("count", "ia3", "-m", "opt-125m", "-t", "all-linear")["formula"]) > {"*"}


def test_sizes_given_with_a_budget_are_used_or_refused() -> None:
    line = "B[layer proj out r] ^S[layer group] A[group r inp] -> layer proj out inp"
    row = tnpeft.budget(line, group=4, parameters=196608, model="opt-1.3b")[0]
    assert set(row.nearest.ranks) == {"r"}
    assert row.nearest.count == 2 * (48 * 2048 + 4 * 2048)
    for wrong in ({"banana": 4}, {"layer": 3}, {"out": 8}):
        with pytest.raises(tnpeft.NetworkError, match=next(iter(wrong))):
            tnpeft.budget(line, parameters=196608, model="opt-1.3b", **wrong)
    shown = answer("budget", line, "-p", "196608", "-m", "opt-1.3b", "-s", "group=4")["rows"][0]
    assert shown["nearest"]["ranks"] == {"r": 2}


def test_a_family_that_does_not_fit_is_a_row_that_says_so() -> None:
    found = {row.family: row for row in tnpeft.budget(["lora", "lotra"], parameters=196608, model="opt-1.3b")}
    assert found["lora"].nearest.count == 196608
    assert found["lotra"].nearest is None
    assert "basis" in found["lotra"].problem
    assert "basis" in str(tnpeft.budget(["lora", "lotra"], parameters=196608, model="opt-1.3b"))
    with pytest.raises(tnpeft.NetworkError, match="basis"):
        tnpeft.budget("lotra", parameters=196608, model="opt-1.3b")


def test_known_models_are_listed() -> None:
    assert "facebook/opt-1.3b" in answer("models")


def test_one_rank_stands_for_every_bond_that_is_not_named() -> None:
    line = "U[out a] G[a b] V[b inp] -> out inp"
    sizes = ["-s", "out=8", "-s", "inp=8"]
    assert answer("count", line, *sizes, "-r", "2")["parameters"] == 2 * 8 * 2 + 4
    assert answer("count", line, *sizes, "-r", "2", "-r", "b=3")["parameters"] == 16 + 6 + 24
