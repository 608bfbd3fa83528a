"""The answers of the live page are those of the public functions, and its errors Python's own."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from live_page import FAMILIES, MALFORMED, MODELS, message, page, question

import tnpeft

LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"


def answered(stage: str, line: str, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.answer(json.dumps(question(line, **more)), stage))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_numbers_are_those_of_the_public_functions(model: str) -> None:
    for name in FAMILIES:
        f = tnpeft.families.get(name)()
        found = answered("numbers", name, model=model)
        stack = {index: 2 for rule in f.lines for index in {*rule.network.stack} - {"layer", "proj", "expert"}}
        on: dict[str, Any] = {"model": model, "targets": MODELS[model], **stack}
        if "error" in found:
            with pytest.raises(tnpeft.NetworkError) as caught:
                tnpeft.parameters(f, **on)
            assert found["error"] == str(caught.value)
            continue
        count = tnpeft.parameters(f, **on)
        [row] = tnpeft.compare([f], tokens=2048, **on)
        assert found["parameters"] == count == sum(found["factors"].values())
        assert (found["dof"], found["rank_bound"], found["gain"]) == (row.dof, row.rank_bound, row.gain)
        assert (found["macs"], found["saved_bytes"]) == (row.macs, row.saved_bytes)


def test_steps_plan_ladder_formula_and_picture() -> None:
    f = tnpeft.families.cp(rank=21)
    on: dict[str, Any] = {"model": "facebook/opt-1.3b", "targets": "q_proj,v_proj"}
    assert answered("numbers", "cp")["steps"] == {"r": tnpeft.parameter_step(f, "r", **on)} == {"r": 9264}
    assert answered("formula", "cp")["formula"] == str(tnpeft.parameters(f.network))
    assert answered("formula", LORA)["gain_formula"] == str(tnpeft.gain(LORA))
    plan = answered("plan", "cp", tokens=64)
    expected = tnpeft.plan(f, tokens=64, **on)
    assert [row[0] for row in plan["steps"][:-1]] == [str(step) for step in expected.steps]
    assert plan["steps"][-1] == ["total", expected.macs, expected.backward_macs, expected.written, expected.saved]
    ladder = answered("ladder", "cp", budget=100_000)
    row = tnpeft.budget(f, parameters=100_000, **on)[0]
    assert row.nearest is not None
    assert ladder["nearest"] == {"ranks": row.nearest.ranks, "count": row.nearest.count}
    assert [rung["count"] for rung in ladder["ladder"]] == [rung.count for rung in row.ladder]
    assert [start for start, _ in answered("intervals", "cp")["intervals"]] == list(tnpeft.plan_table(f, **on).starts)
    assert answered("picture", "cp")["svg"] == tnpeft.drawing.svg(f, {"layer": 24, "proj": 2})


def test_a_line_of_more_operands_than_an_exact_search_takes_has_a_plan_that_says_so() -> None:
    cores = " ".join(f"G{k}[a{k} a{k + 1}]" for k in range(13))
    line = f"{cores} B[layer proj out a0] A[layer proj a13 inp] -> layer proj out inp"
    plan = answered("plan", line)
    assert plan["form"].endswith("by a greedy search: too many operands for an exact one")
    assert len(plan["steps"]) >= 15
    assert answered("numbers", line)["macs"] > 0
    assert "greedy" not in answered("plan", LORA)["form"]


@pytest.mark.parametrize("line", ["cp", LORA, "A[scene out r] B[r o2 inp] -> scene (out o2) inp", "lora:4"])
@pytest.mark.parametrize("sizes", [{}, {"r": 3, "scene": 5, "o2": 8}])
def test_the_python_to_paste_gives_the_same_count(line: str, sizes: dict[str, int]) -> None:
    found = answered("numbers", line, sizes=sizes)
    scope: dict[str, Any] = {}
    *algebra, config = found["code"].replace("print(", "last = (").strip().split("\n")
    exec("\n".join(algebra), scope)
    assert scope["last"][0].parameters == found["parameters"]
    assert config.startswith("config = tnpeft.TensorNetworkConfig(network=f, target_modules=[")


def test_own_lines_start_at_a_rank_and_take_sizes() -> None:
    assert answered("numbers", LORA)["fields"] == [{"name": "r", "size": 8}]
    assert answered("numbers", LORA, sizes={"r": 2})["parameters"] == 2 * 196608
    assert "rank" in answered("numbers", LORA, sizes={"r": 4096})["notes"][0]
    grouped = answered("numbers", "A[o1 r] B[o2 r] C[inp r] -> (o1 o2) inp", sizes={"o1": 4})
    assert [(field["name"], field["size"]) for field in grouped["fields"]] == [("r", 8), ("o1", 4), ("o2", 512)]


def test_fifty_malformed_lines_give_pythons_messages() -> None:
    assert len(set(MALFORMED)) >= 50
    for line in MALFORMED:
        assert answered("numbers", line) == {"error": message(line)}
    carets = [line for line in MALFORMED if re.search(r"\n +\^", message(line))]
    assert len(carets) >= 30


def test_choices() -> None:
    found = json.loads(page.choices())
    assert list(found["families"]) == list(tnpeft.families.names())
    assert found["models"]["facebook/opt-1.3b"] == ["q_proj", "v_proj"]
