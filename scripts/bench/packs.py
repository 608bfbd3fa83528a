"""Runs of the demo's study in packs against the same runs alone: processor time and results.

Eight runs, four seeds at two learning rates, are made alone and in packs of 2, 4 and 8, all of it from the loading of
the backbone to the last evaluation.

    python scripts/bench.py packs --cache runs/cache
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import driver
from tnpeft.studies.running.execution import train_and_evaluate
from tnpeft.studies.running.sweeping import prepare
from tnpeft.studies.runs import Run
from tnpeft.studies.study import Study

TITLE = "Runs of a study in packs"
ABOUT = """How many times faster runs of the demo's study are made in packs than alone: four seeds at two learning
rates, {steps} steps of {batch} lines, loading and evaluations included. The last columns are the largest differences
of a run's results on the evaluation set."""
OPTIONS = {
    "backbone": "digits",
    "cache": Path("runs/cache"),
    "steps": 100,
    "batch": 16,
    "clock": {**driver.CLOCK, "default": "cpu"},
}
SEEDS, PACKS = (0, 1, 2, 3), (2, 4, 8)
METHODS = (
    {"family": "lora", "args": {"rank": 4}, "learning_rates": [3e-3, 1e-2]},
    {"family": "cp", "args": {"rank": 8}, "learning_rates": [1e-2, 3e-2]},
    {"family": "lorta", "args": {"rank": 8}, "learning_rates": [1e-2, 3e-2]},
)


def study(options: argparse.Namespace) -> Study:
    """Return the demo's backbone and task with a few steps of each run."""
    protocol = {"targets": ["q_proj", "v_proj"], "train": 700, "dev": 200, "eval": 0}
    protocol |= {"steps": options.steps, "batch": options.batch, "evaluate_every": max(1, options.steps // 2)}
    table = {"name": "packs", "backbone": options.backbone, "cache": str(options.cache), "tasks": ["digits_shifted"]}
    table |= {"seeds": list(SEEDS), "protocol": protocol, "methods": list(METHODS)}
    return Study.of(table, Path("."))


def made(runs: list[Run], size: int, clock: str) -> tuple[list[dict[str, Any]], float]:
    """Return the records of runs made in packs of a size, and the seconds that it took."""
    lots = [runs[k : k + size] for k in range(0, len(runs), size)]
    return driver.once(lambda: [record for lot in lots for record in train_and_evaluate(lot)], clock)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return every method's runs alone and in packs."""
    its = study(options)
    prepare(its)
    train_and_evaluate([its.run(its.cells[0], its.tasks[0], 1e-3, 0)])  # what is loaded once in a process
    rows = []
    for cell in its.cells:
        rates = its.terms(cell, its.tasks[0]).learning_rates
        runs = [its.run(cell, its.tasks[0], lr, seed) for lr in rates for seed in SEEDS]
        alone, seconds = made(runs, 1, options.clock)
        row: dict[str, Any] = {"method": cell.label, "runs": len(runs), "seconds": seconds, "packs": {}}
        for size in PACKS:
            packed, its_seconds = made(runs, size, options.clock)
            pairs = list(zip(alone, packed, strict=True))
            row["packs"][size] = {
                "seconds": its_seconds,
                "accuracy": max(abs(a["eval"] - b["eval"]) for a, b in pairs),
                "loss": max(abs(a["eval_loss"] - b["eval_loss"]) for a, b in pairs),
            }
        rows.append(row)
        driver.progress(row)
    return {"methods": rows}


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each method."""
    return [
        {
            "method": row["method"],
            "runs": row["runs"],
            "alone, s": row["seconds"],
            **{f"packs of {size}": f"{row['seconds'] / its['seconds']:.2f}" for size, its in row["packs"].items()},
            "accuracies differ by": f"{max(its['accuracy'] for its in row['packs'].values()):.1g}",
            "losses differ by": f"{max(its['loss'] for its in row['packs'].values()):.1g}",
        }
        for row in data["methods"]
    ]
