"""A dry run of a study: a few steps of every method, on random weights where a hub would be asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tnpeft.networks import NetworkError
from tnpeft.studies import backbones, methods
from tnpeft.studies.design import Cell
from tnpeft.studies.files import StudyError
from tnpeft.studies.running.execution import train_and_evaluate
from tnpeft.studies.running.pool import DIED, processes
from tnpeft.studies.runs import Run
from tnpeft.studies.study import Study
from tnpeft.studies.tasks.data import load
from tnpeft.studies.tasks.task import Task

Row = Mapping[str, Any]
_MEASURED = ("backbone", "trained", "head", "steps", "outcome", "loss", "peak GB", "s a step", "s in all")


def trial(study: Study, *, steps: int = 2, batch: int = 2) -> Iterator[Row]:
    """Yield one row for each method of a study (its first rank), on the first task that has data, for a few steps.

    What the study says stays, but for the number of steps and the sizes of batch, dev and eval (``batch`` examples at
    most). A backbone of the hub that :func:`tnpeft.counting.card` knows is given random weights, and a tokenizer
    that takes bytes for tokens if the study names none: that shows that the settings run, and nothing of how well.
    Every run has a process, so that the peak of its memory can be told.

    Args:
        study: the study.
        steps: optimizer steps.
        batch: examples of a step.

    Raises:
        StudyError: no task has data, or ``steps`` or ``batch`` is below 1.

    >>> from pathlib import Path
    >>> study = Study.of({
    ...     "backbone": "digits:0", "tasks": ["digits_upright"], "seeds": [0],
    ...     "protocol": {"targets": ["q_proj"], "learning_rates": [1e-2]},
    ...     "methods": [{"family": "lora", "args": {"rank": 1}}],
    ... }, Path("."))
    >>> [(row["method"], row["steps"], row["outcome"]) for row in trial(study, steps=1)]
    [('lora', 1, 'losses finite')]
    """
    if min(steps, batch) < 1:
        raise StudyError(f"steps = {steps}, batch = {batch}", where="trial", remedy="give at least 1 of each")
    task, study = _task(study), _at_hand(study)
    firsts: dict[str, Cell] = {}
    for cell in study.cells:
        if cell.task == task and "none" not in cell.method:
            firsts.setdefault(cell.label, cell)
    short = {"steps": steps, "evaluate_every": steps, "train": steps * batch, "dev": batch, "eval": batch}
    short |= {"batch": batch, "accumulate": 1, "epochs": 0}
    for cell in firsts.values():
        if study.places["model"].startswith(backbones.RANDOM):
            cell = replace(cell, relative=False)  # random weights have no size that a step could be relative to
        run = study.run(cell, cell.protocol.learning_rates[0], study.table["seeds"][0])
        counted = methods.count(cell.method, backbones.shape(study.places["model"]), cell.protocol.targets)
        row = {"study": study.name, "model": study.places["model"], "task": task.name, "method": cell.label}
        row |= {"size": cell.size, "counted": "" if counted is None else counted, "batch": batch}
        with processes(1) as pool:
            try:
                measured = pool.submit(_measured, replace(run, protocol={**run.protocol, **short})).result()
            except BrokenExecutor:
                measured = {"outcome": f"FAILED ({DIED})"}
        yield row | dict.fromkeys(_MEASURED, "") | measured


def _task(study: Study) -> Task:
    """Return the first task whose data are there."""
    troubles: list[StudyError] = []
    for task in study.tasks:
        try:
            load(task, study.places["data"])
            return task
        except StudyError as error:
            troubles.append(error)
    raise troubles[0]


def _at_hand(study: Study) -> Study:
    """Return the study with random weights for a hub's model, and bytes for its tokens."""
    name = study.places["model"]
    try:
        backbones.known(name)
    except NetworkError:
        return study
    words = study.places["tokenizer"] or backbones.BYTES
    return replace(study, places={**study.places, "model": backbones.RANDOM + name, "tokenizer": words})


def _measured(run: Run) -> dict[str, Any]:
    """Make a run; return its counts, whether its losses are finite, memory and time."""
    start, frozen = time.perf_counter(), [0]

    def count(model: Any, _: Any) -> None:
        whole = sum(p.numel() for name, p in model.named_parameters() if "original_module" not in name)
        frozen[0] = whole - sum(methods.trainable(model))

    try:
        (record,) = train_and_evaluate([run], keep=count)
    except Exception as error:
        return {"outcome": f"FAILED ({type(error).__name__}: {error}".partition("\n")[0] + ")"}
    losses = [value for row in record["curve"] for value in row[1:]] + [record["eval_loss"]]
    peak = ""
    with suppress(ImportError):  # not on Windows
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak = f"{used / 1e9:.1f}"
    return {
        "backbone": frozen[0],
        "trained": record["parameters"],
        "head": record["head_parameters"],
        "steps": record["steps"],
        "outcome": "losses finite" if None not in losses else "LOSSES NOT FINITE",
        "loss": "" if record["curve"][-1][1] is None else f"{record['curve'][-1][1]:.4f}",
        "peak GB": peak,
        "s a step": f"{record['timing']['step_ms'] / 1000:.2f}",
        "s in all": f"{time.perf_counter() - start:.0f}",
    }
