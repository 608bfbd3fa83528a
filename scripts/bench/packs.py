"""Runs of a study in packs.

How many times faster runs of the demo's study are made in packs than alone: four seeds at two learning rates,
{{ steps }} steps of {{ batch }} lines, loading and evaluations included. The last columns are the largest differences
of a run's results on the evaluation set.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from bench import driver
from tnpeft.studies.running.execution import train_and_evaluate
from tnpeft.studies.running.sweeping import prepare
from tnpeft.studies.runs import Run
from tnpeft.studies.study import Study

OPTIONS = {
    "backbone": "digits",
    "cache": Path("runs/cache"),
    "steps": 100,
    "batch": 16,
    "clock": {**driver.CLOCK, "default": "cpu"},
}
PUBLISHED = {"packs": "--cache runs/cache"}
SEEDS, PACKS = (0, 1, 2, 3), (2, 4, 8)
METHODS = (
    {"family": "lora", "args": {"rank": 4}, "learning_rates": [3e-3, 1e-2]},
    {"family": "cp", "args": {"rank": 8}, "learning_rates": [1e-2, 3e-2]},
    {"family": "lorta", "args": {"rank": 8}, "learning_rates": [1e-2, 3e-2]},
)


def made(runs: list[Run], size: int) -> list[dict[str, Any]]:
    """Return the records of runs made in packs of a size."""
    return [record for k in range(0, len(runs), size) for record in train_and_evaluate(runs[k : k + size])]


def measure(options: driver.Options) -> dict[str, Any]:
    """Return every method's runs alone and in packs."""
    protocol = {"targets": ["q_proj", "v_proj"], "train": 700, "dev": 200, "eval": 0, "steps": options.steps}
    protocol |= {"batch": options.batch, "evaluate_every": max(1, options.steps // 2)}
    table = {"name": "packs", "backbone": options.backbone, "cache": str(options.cache), "tasks": ["digits_shifted"]}
    its = Study.of({**table, "seeds": [*SEEDS], "protocol": protocol, "methods": [*METHODS]}, Path("."))
    prepare(its)
    rows = []
    made([its.run(its.cells[0], 1e-3, 0)], 1)  # what is loaded once in a process
    for cell in its.cells:
        runs = [its.run(cell, lr, seed) for lr in cell.protocol.learning_rates for seed in SEEDS]
        found = {size: driver.once(partial(made, runs, size), options.clock) for size in (1, *PACKS)}
        alone, seconds = found.pop(1)
        packs = {}
        for size, (packed, took) in found.items():
            gaps = {
                what: max(abs(a[key] - b[key]) for a, b in zip(alone, packed, strict=True))
                for what, key in (("accuracy", "eval"), ("loss", "eval_loss"))
            }
            packs[size] = {"seconds": took, **gaps}
        rows.append(driver.told({"method": cell.label, "runs": len(runs), "seconds": seconds, "packs": packs}))
    return {"methods": rows}


def tables(data: Any) -> driver.Rows:
    """Yield a row for each method."""
    for row in data["methods"]:
        packs = row["packs"]
        most = {key: f"{max(its[key] for its in packs.values()):.1g}" for key in ("accuracy", "loss")}
        yield {
            "method": row["method"],
            "runs": row["runs"],
            "alone, s": row["seconds"],
            **{f"packs of {size}": f"{row['seconds'] / its['seconds']:.2f}" for size, its in packs.items()},
            "accuracies differ by": most["accuracy"],
            "losses differ by": most["loss"],
        }
