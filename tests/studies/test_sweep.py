"""Sweeps: every run once, whatever interrupts them; failures recorded; the same tables at the end, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies
from sweep_results import quietly, study_of
from typer.testing import CliRunner

from tnpeft.cli import app
from tnpeft.networks import TnpeftError
from tnpeft.studies import methods
from tnpeft.studies.files import StudyError, read_toml
from tnpeft.studies.methods import count, matched
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.reports.reporting import report
from tnpeft.studies.running.pool import Engine
from tnpeft.studies.running.sweeping import sweep
from tnpeft.studies.runs import Store

SERIAL = Engine("serial")


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swept")


def test_every_run_is_made_once_counted_and_described(table: dict[str, Any], swept: Path, tiny: Path) -> None:
    study = study_of(table)
    said: list[str] = []
    tally = sweep(study, swept, SERIAL, said.append)
    # LoRA 2 sizes x 2 seeds, CP 2 rates x 1 seed + 1, none 2 seeds
    assert (tally.done, tally.failed) == (9, 0)
    assert any("left" in line for line in said)
    files = sorted(swept.glob("*.json"))
    assert len(files) == 9
    record = json.loads(files[0].read_text())
    assert record["key"] == files[0].stem
    assert record["run"]["protocol"]["steps"] in (0, 4)
    assert {"torch", "peft", "transformers", "tnpeft"} <= set(record["versions"])
    assert record["run"]["data"]
    assert "train_seconds" in record["timing"]
    assert str(Path.home()) not in json.dumps(record)
    again = sweep(study, swept, SERIAL, quietly)
    assert (again.done, again.kept) == (0, 9)
    for cell in study.cells:
        result = Store(swept).result(study.run(cell, 1e-2, 0).key) or {}
        assert result["parameters"] == count(cell.method, str(tiny), ("q_proj", "v_proj"))


def test_all_that_matters_is_in_a_runs_name(table: dict[str, Any]) -> None:
    study = study_of(table)
    base = study.run(study.cells[0], 1e-2, 0)
    others = [
        study.run(study.cells[1], 1e-2, 0),
        study.run(study.cells[0], 2e-2, 0),
        study.run(study.cells[0], 1e-2, 1),
        *(
            changed.run(changed.cells[0], 1e-2, 0)
            for changed in (study_of(table, protocol={"steps": 5}), study_of(table, tasks=["digits_shifted"]))
        ),
    ]
    keys = {base.key, *(run.key for run in others)}
    assert len(keys) == 6
    same = study_of(table, protocol={"learning_rates": [1e-2, 5.0]})
    assert same.run(same.cells[0], 1e-2, 0).key == base.key


def test_another_tokenizer_is_another_study_to_sweep_and_report(
    table: dict[str, Any], tmp_path: Path, tiny: Path
) -> None:
    methods = '[[methods]]\nlabel = "none"\nnone = true\nprotocol = { steps = 0 }\n'
    head = f'name = "own"\nbackbone = "{tiny}"\ntasks = ["digits_upright"]\nseeds = [0]\n'
    (tmp_path / "own.toml").write_text(head + "[protocol]\ntrain = 64\ndev = 8\neval = 8\n" + methods)
    shutil.copytree(tiny, tmp_path / "words")
    places = [str(tmp_path / "own.toml"), "--tokenizer", str(tmp_path / "words"), "--out"]
    swept = CliRunner().invoke(app, ["sweep", *places, str(tmp_path / "runs"), "--engine", "serial"])
    assert swept.exit_code == 0, swept.output
    runs = ["--runs", str(tmp_path / "runs")]
    assert CliRunner().invoke(app, ["report", *places, str(tmp_path / "out"), *runs]).exit_code == 0
    plain = CliRunner().invoke(app, ["report", places[0], *runs])
    assert (plain.exit_code, "no results yet" in plain.output) == (2, True)


def test_a_failed_run_is_recorded_and_the_rest_goes_on(table: dict[str, Any], tmp_path: Path) -> None:
    table["methods"] = [
        {"label": "bad", "peft": "lora", "args": {"r": -1}},
        {"label": "none", "none": True, "protocol": {"steps": 0}},
    ]
    study = study_of(table)
    tally = sweep(study, tmp_path / "runs", SERIAL, quietly)
    assert (tally.done, tally.failed) == (2, 2)
    record = json.loads(next((tmp_path / "runs").glob("*.failed.json")).read_text())
    assert "r" in record["cause"]
    assert "Traceback" in record["trace"]
    report(study, tmp_path / "runs", tmp_path / "out")
    assert "ValueError" in (tmp_path / "out" / "tiny-failed.md").read_text()
    with pytest.raises(StudyError, match="unknown method 'nope'; there are none"):
        report(study, tmp_path / "runs", tmp_path / "out", "nope")
    said: list[str] = []
    alone = study_of({**table, "methods": table["methods"][:1]})
    sweep(alone, tmp_path / "runs", SERIAL, said.append)
    assert "--retry" in said[-1]
    with pytest.raises(StudyError, match="all 2 runs failed"):
        report(alone, tmp_path / "runs", tmp_path / "out")


def test_a_damaged_result_is_named(table: dict[str, Any], swept: Path, tmp_path: Path) -> None:
    sweep(study_of(table), swept, SERIAL, quietly)
    shutil.copytree(swept, tmp_path / "runs")
    file = sorted((tmp_path / "runs").glob("*.json"))[0]
    file.write_text(file.read_text()[:50])
    for make in (sweep, lambda study, runs, *_: report(study, runs, tmp_path / "out")):
        with pytest.raises(StudyError, match=f"{file.name}: is damaged"):
            make(study_of(table), tmp_path / "runs", SERIAL, quietly)


GOOD: dict[str, Any] = {
    "key": "a" * 16,
    "run": {},
    "parameters": 4,
    "head_parameters": 0,
    "dev": 0.5,
    "eval": 0.25,
    "eval_loss": None,
    "scores": {"accuracy": 0.25},
    "predictions": [1, 0],
    "labels": [1, 1],
    "best_step": 2,
    "steps": 4,
    "curve": [[2, 0.1, 0.5, 0.7], [4, 0.1, 0.5, None]],
    "timing": {"train_seconds": 1.0, "step_ms": 2.0},
}
WRONG = [float("nan"), float("inf"), "0.5", True, [], {}, None]


@given(data=strategies.data())
def test_a_record_is_believed_only_if_whole(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """A field left out, a value of another kind or not finite, another run's key, half a file, deep nesting."""
    store = Store(tmp_path_factory.mktemp("runs"))
    path = store.folder / f"{GOOD['key']}.json"
    path.write_text(json.dumps(GOOD))
    assert store.result(GOOD["key"]) == GOOD
    name = data.draw(strategies.sampled_from(sorted(set(GOOD) - {"key"})))
    kind = type(GOOD[name])
    fitting = {dict: (dict,), list: (list,), int: (int,), float: (int, float), type(None): (type(None),)}[kind]
    bad = WRONG[:2] + [value for value in WRONG[2:] if not isinstance(value, fitting) or isinstance(value, bool)]
    texts = strategies.one_of(
        strategies.just({key: value for key, value in GOOD.items() if key != name}).map(json.dumps),
        strategies.sampled_from(bad).map(lambda value: json.dumps({**GOOD, name: value})),
        strategies.just(json.dumps({**GOOD, "key": "b" * 16})),
        strategies.just(json.dumps({**GOOD, "labels": [1]})),
        strategies.integers(0, len(json.dumps(GOOD)) - 1).map(lambda n: json.dumps(GOOD)[:n]),
        strategies.integers(5000, 200_000).map(lambda n: '{"a": ' + "[" * n),
    )
    path.write_text(data.draw(texts))
    with pytest.raises(StudyError, match=f"{path.name}: (is damaged|holds the result)"):
        store.result(GOOD["key"])


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([{"family": "lora", "grid": {"rank": ["two"]}}], "two"),
        ([{"family": "lora", "args": {"rank": 1.5}}], "1.5"),
        ([{"family": "lora", "args": {"rank": 0}}], "rank|0"),
        ([{"family": "lora", "protocol": {"targets": ["query"]}}], "query"),
        ([{"peft": "lora", "protocol": {"targets": ["query"]}}], "query"),
        ([{"peft": "nothing"}], "nothing"),
        ([{"family": "lora", "protocol": {"max_length": 1}}], "max_length"),
    ],
)
def test_values_that_fit_nothing_are_refused_before_any_run(
    table: dict[str, Any], tmp_path: Path, methods: list[Any], message: str
) -> None:
    study_table = {**table, "methods": [*table["methods"], *({"label": "wrong", **each} for each in methods)]}
    with pytest.raises(TnpeftError, match=message):
        sweep(study_of(study_table), tmp_path, SERIAL, quietly)
    assert not list(tmp_path.glob("*.json"))


def test_ranks_of_a_line_stand_by_themselves(table: dict[str, Any]) -> None:
    line = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
    table["methods"] = [{"label": "mine", "line": line, "grid": {"r": [1, 2]}, "args": {"scale": 2.0}}]
    cells = study_of(table).cells
    assert [(cell.size, methods.factorization(cell.method).ranks) for cell in cells] == [
        ("r=1", {"r": 1}),
        ("r=2", {"r": 2}),
    ]
    with pytest.raises(StudyError, match="wrong arguments"):
        methods.factorization({"line": line, "args": {"r": 1, "q": 2}})


def test_the_rate_is_chosen_on_dev_alone(table: dict[str, Any], swept: Path) -> None:
    study, store = study_of(table), Store(swept)
    sweep(study, swept, SERIAL, quietly)
    cell = study.cells[2]
    rates = cell.protocol.learning_rates
    dev = {lr: store.result(study.run(cell, lr, 0).key) or {} for lr in rates}
    best = min(rates, key=lambda lr: (dev[lr]["curve"][-1][3], lr))
    assert study.best_rate(cell, store) == best
    by_metric = study_of(table, choose="metric")
    best = max(rates, key=lambda lr: (dev[lr]["dev"], -lr))
    assert by_metric.best_rate(cell, store) == best


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"seeds": []}, "no seeds"),
        ({"methods": [{"family": "lora", "peft": "lora"}]}, "names family and peft"),
        ({"methods": [{"family": "lora", "args": {"rnak": 1}}]}, "wrong arguments"),
        ({"methods": [{"family": "lora"}, {"family": "lora"}]}, "two methods are called"),
        ({"methods": [{"family": "lora", "ranks": 3}]}, "unknown key 'ranks' in a method"),
        ({"protocol": {"stpes": 3}}, "unknown key 'stpes'"),
        ({"protocol": {"steps": "many"}}, "steps = 'many' is not an integer"),
        ({"protocol": {"head": "tail"}}, "head = 'tail' is unknown"),
        ({"tasks": ["sst9"]}, "no task is called"),
        ({"tasks": "sst2"}, "tasks = 'sst2' is not a list of names or tables"),
        ({"seeds": [-1]}, r"seeds = \[-1\]; give finite numbers"),
        ({"margin": float("nan")}, "margin = nan; give finite numbers"),
        ({"methods": [{"family": "lora", "learning_rates": [float("inf")]}]}, "give finite numbers from 0 on"),
        ({"seeds": 3}, "seeds = 3 is not a list of integers"),
        ({"seeds": [0, 1, 0]}, "a seed stands twice"),
        ({"methods": {"family": "lora"}}, "is not a list of tables"),
        ({"methods": [{"family": "lora", "grid": {"rank": 3}}]}, "rank = 3 is not a list of values"),
        ({"methods": [{"family": "lora", "learning_rates": 0.1}]}, "learning_rates = 0.1 is not a list of numbers"),
        ({"methods": [{"family": ["lora"]}]}, "is not a string"),
        ({"backbone": 5}, "backbone = 5 is not a string"),
        ({"protocol": {"steps": -2}}, "steps = -2; give finite numbers from 0 on"),
        ({"protocol": {"learning_rates": [0.0]}}, "must be positive"),
    ],
)
def test_wrong_studies_are_refused_before_anything_runs(
    table: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        _ = study_of(table, **change).tasks


def test_toml_extends_and_refuses_circles(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('name = "base"\nseeds = [0, 1]\n[protocol]\nsteps = 5\nbatch = 2\n')
    (tmp_path / "own.toml").write_text('extends = "base.toml"\nname = "own"\n[protocol]\nsteps = 9\n')
    assert read_toml(tmp_path / "own.toml") == {
        "name": "own",
        "seeds": [0, 1],
        "protocol": {"steps": 9, "batch": 2},
    }
    (tmp_path / "base.toml").write_text('extends = "own.toml"\n')
    with pytest.raises(StudyError, match="extends itself"):
        read_toml(tmp_path / "own.toml")


def test_matched_ranks_are_the_nearest() -> None:
    targets = ("q_proj", "v_proj")
    budgets = [196608, 393216, 589824, 786432, 1179648, 1572864]
    found = [args["rank"] for args, _ in matched({"family": "cp"}, budgets, "facebook/opt-1.3b", targets)]
    assert found == [21, 42, 64, 85, 127, 170]  # nearest, where the paper's own partners are 21, 43, 64, 85, 128, 171


def test_the_protocol_has_a_hash_of_all_settings() -> None:
    changed = [Protocol(steps=7), Protocol(learning_rates=(1e-4,)), Protocol(targets=("q_proj",))]
    assert len({Protocol().digest, *(p.digest for p in changed)}) == 4
    assert Protocol.of({"warmup": 0}).warmup == 0.0
