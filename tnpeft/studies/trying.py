"""Whether a study's settings run: a few steps of every method, on random weights where a hub would be asked."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from tnpeft.networks import NetworkError
from tnpeft.studies import backbones, methods
from tnpeft.studies.data import load
from tnpeft.studies.design import Cell
from tnpeft.studies.engines import follow
from tnpeft.studies.files import StudyError
from tnpeft.studies.runs import Run, perform
from tnpeft.studies.study import Study
from tnpeft.studies.tasks import Task

Row = Mapping[str, Any]


def trial(study: Study, *, steps: int = 2, batch: int = 2) -> Iterator[Row]:
    """One row for each method of a study (its first rank), on the first task that has data, for a few steps.

    What the study says stays, but for the number of steps and the sizes of batch, dev and eval (``batch`` examples at
    most). A backbone of the hub that :func:`tnpeft.counting.card` knows is given random weights, and a tokenizer
    that takes bytes for tokens if the study names none: that shows that the settings run, and nothing of how well.
    Every run has a process of its own, so that the peak of its memory is its own.

    Args:
        study: the study.
        steps: optimizer steps.
        batch: examples of a step.

    Raises:
        StudyError: no task has data, or ``steps`` or ``batch`` is below 1.
    """
    if min(steps, batch) < 1:
        raise StudyError(f"steps = {steps}, batch = {batch}", where="trial", remedy="give at least 1 of each")
    its, study = _task(study), _at_hand(study)
    firsts: dict[tuple[str, ...], Cell] = {}
    for cell in study.cells:
        if "none" not in cell.method:
            firsts.setdefault(_kind(cell), cell)
    for cell in firsts.values():
        run = study.run(cell, its, study.terms(cell, its).learning_rates[0], study.table["seeds"][0])
        short = {"steps": steps, "evaluate_every": steps, "train": steps * batch, "dev": batch, "eval": batch}
        run = replace(run, protocol={**run.protocol, **short, "batch": batch, "accumulate": 1, "epochs": 0})
        counted = methods.count(cell.method, backbones.shape(study.places["model"]), study.terms(cell, its).targets)
        row = {"study": study.name, "model": study.places["model"], "task": its.name}
        row |= {
            "method": cell.label,
            "size": cell.size,
            "counted": "" if counted is None else counted,
            "batch": batch,
        }
        yield {**row, **_alone(run)}


def _kind(cell: Cell) -> tuple[str, ...]:
    """What cells share that differ in ranks alone."""
    return cell.label, *(f"{k}={v}" for k, v in cell.method.get("args", {}).items() if not isinstance(v, int))


def _task(study: Study) -> Task:
    """The first task whose data are there."""
    trouble: StudyError | None = None
    for its in study.tasks:
        try:
            load(its, study.places["data"])
        except StudyError as error:
            trouble = trouble or error
        else:
            return its
    assert trouble is not None
    raise trouble


def _at_hand(study: Study) -> Study:
    """The study with random weights for a hub's model, and bytes for its tokens."""
    name = study.places["model"]
    try:
        backbones.known(name)
    except NetworkError:
        return study
    words = study.places["tokenizer"] or backbones.BYTES
    return replace(study, places={**study.places, "model": backbones.RANDOM + name, "tokenizer": words})


def _alone(run: Run) -> Row:
    """What making a run in a fresh process says: its counts, whether its losses are finite, memory and time."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=follow, initargs=(os.getpid(),)) as pool:
        try:
            return pool.submit(_measured, run).result()
        except BrokenProcessPool:
            return _failed("its process died (killed, or out of memory)")


def _measured(run: Run) -> Row:
    start, frozen = time.perf_counter(), [0]

    def count(model: Any, _: Any) -> None:
        whole = sum(p.numel() for name, p in model.named_parameters() if "original_module" not in name)
        frozen[0] = whole - sum(methods.trainable(model))

    try:
        record = perform(run, keep=count)
    except Exception as error:
        return _failed(f"{type(error).__name__}: {error}".partition("\n")[0])
    numbers = [value for row in record["curve"] for value in row[1:]] + [record["eval_loss"]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "backbone": frozen[0],
        "trained": record["parameters"],
        "head": record["head_parameters"],
        "steps": record["steps"],
        "outcome": "losses finite" if None not in numbers else "LOSSES NOT FINITE",
        "loss": "" if record["curve"][-1][1] is None else f"{record['curve'][-1][1]:.4f}",
        "peak GB": f"{peak / 1e9:.1f}",
        "s a step": f"{record['timing']['step_ms'] / 1000:.2f}",
        "s in all": f"{time.perf_counter() - start:.0f}",
    }


def _failed(cause: str) -> Row:
    columns = ("backbone", "trained", "head", "steps", "outcome", "loss", "peak GB", "s a step", "s in all")
    return {**dict.fromkeys(columns, ""), "outcome": f"FAILED ({cause})"}
