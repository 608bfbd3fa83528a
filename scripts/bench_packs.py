"""Runs of the demo's study in packs against the same runs alone: processor time and results.

Eight runs, four seeds at two learning rates, are made alone and in packs of 2, 4 and 8, all of it from the loading of
the backbone to the last evaluation. Writes ``packs.json`` and ``packs.md``.

    python scripts/bench_packs.py --cache runs/cache
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _bench
import torch

from tnpeft.studies.execution import train_and_evaluate
from tnpeft.studies.study import Study
from tnpeft.studies.sweeping import prepare

SEEDS, PACKS = (0, 1, 2, 3), (2, 4, 8)
METHODS = (
    ({"family": "lora", "args": {"rank": 4}}, (3e-3, 1e-2)),
    ({"family": "cp", "args": {"rank": 8}}, (1e-2, 3e-2)),
    ({"family": "lorta", "args": {"rank": 8}}, (1e-2, 3e-2)),
)


def study(options: argparse.Namespace) -> Study:
    """The demo's backbone and task with a few steps of each run."""
    protocol = {"targets": ["q_proj", "v_proj"], "train": 700, "dev": 200, "eval": 0}
    protocol |= {"steps": options.steps, "batch": options.batch, "evaluate_every": max(1, options.steps // 2)}
    table = {"name": "packs", "backbone": options.backbone, "cache": str(options.cache), "tasks": ["digits_shifted"]}
    table |= {"seeds": list(SEEDS), "protocol": protocol}
    methods = [{**method, "learning_rates": list(rates)} for method, rates in METHODS]
    return Study.of({**table, "methods": methods}, Path("."))


def timed(make: Callable[[], list[dict[str, Any]]], clock: str) -> tuple[list[dict[str, Any]], float]:
    """What it makes, and the seconds that it took."""
    now = _bench.CLOCKS[clock]
    start = now()
    return make(), now() - start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every method's runs alone and in packs."""
    its = study(options)
    prepare(its, lambda line: print(line, file=sys.stderr))
    train_and_evaluate([its.run(its.cells[0], its.tasks[0], 1e-3, 0)])  # what is loaded once in a process
    rows = []
    for cell in its.cells:
        rates = its.terms(cell, its.tasks[0]).learning_rates
        runs = [its.run(cell, its.tasks[0], lr, seed) for lr in rates for seed in SEEDS]
        alone, seconds = timed(
            lambda runs=runs: [r for run in runs for r in train_and_evaluate([run])], options.clock
        )
        row: dict[str, Any] = {"method": cell.label, "runs": len(runs), "seconds": seconds, "packs": {}}
        for size in PACKS:
            lots = [tuple(runs[k : k + size]) for k in range(0, len(runs), size)]
            packed, its_seconds = timed(
                lambda lots=lots: [r for lot in lots for r in train_and_evaluate(lot)], options.clock
            )
            row["packs"][size] = {
                "seconds": its_seconds,
                "accuracy": max(abs(a["eval"] - b["eval"]) for a, b in zip(alone, packed, strict=True)),
                "loss": max(abs(a["eval_loss"] - b["eval_loss"]) for a, b in zip(alone, packed, strict=True)),
            }
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    settings = {name: getattr(options, name) for name in ("steps", "batch", "clock", "threads")}
    return {"settings": settings, "machine": _bench.machine(options.threads), "methods": rows}


def report(data: Mapping[str, Any]) -> str:
    """The measurement as a page."""
    s, m = data["settings"], data["machine"]
    rows = [
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
    return (
        "# Runs of a study in packs\n\n"
        "How many times faster runs of the demo's study are made in packs than alone: four seeds at two learning "
        f"rates, {s['steps']} steps of {s['batch']} lines, loading and evaluations included, {m['threads']} threads, "
        f"{s['clock']} clock ({m['processor']}; torch {m['torch']}). The last columns are the largest differences of "
        "a run's results on the evaluation set.\n\n" + _bench.markdown(rows)
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="digits")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=_bench.CLOCKS, default="cpu", help="cpu: time that other work cannot add to"
    )
    parser.add_argument("--out", type=Path, default=_bench.TABLES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = measure(options)
    _bench.write(options.out, "packs", data, report(data))
    print(report(data))


if __name__ == "__main__":
    main()
