"""The sweep: each run of a study once, side by side, stopped and started again at any moment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnpeft.studies import backbones, methods
from tnpeft.studies.design import Cell
from tnpeft.studies.files import StudyError
from tnpeft.studies.running.execution import one_process
from tnpeft.studies.running.pool import Engine, Workers
from tnpeft.studies.runs import Run, Store
from tnpeft.studies.study import Study
from tnpeft.studies.tasks.data import load

Say = Callable[[str], None]


@dataclass
class SweepSummary:
    """The numbers of runs that a sweep made, kept and saw fail."""

    done: int = 0
    kept: int = 0
    failed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.done} done", f"{self.kept} kept from before"]
        parts += [f"{self.failed} failed"] if self.failed else []
        return ", ".join(parts)


def sweep(study: Study, folder: str | Path, engine: Engine | None = None, say: Say = print) -> SweepSummary:
    """Make every run of the study that has no result in ``folder`` yet; results there are kept.

    First the grids of rates and steps with the tuning seeds, for as long as they grow, then all seeds at each
    method's best value. Runs that another sweep has under way in the same folder are waited for.

    Raises:
        StudyError: data, backbone or a method of the study cannot be had (nothing has run then), a result is damaged,
            or ``torchrun`` started the sweep.

    >>> import tempfile
    >>> from tnpeft.studies import Study
    >>> study = Study.of({
    ...     "backbone": "digits:0", "tasks": ["digits_upright"], "seeds": [0],
    ...     "protocol": {"targets": ["q_proj"], "steps": 1, "train": 8, "dev": 8, "learning_rates": [1e-2]},
    ...     "methods": [{"family": "lora", "args": {"rank": 1}}],
    ... }, Path("."))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     summary = sweep(study, folder, Engine("serial"), say=lambda line: None)
    >>> print(summary)
    1 done, 0 kept from before
    """
    one_process()
    engine, store, summary = engine or Engine(), Store(Path(folder)), SweepSummary()
    store.recover()
    prepare(study)
    seen: set[str] = set()
    with closing(Workers(engine, store.folder)) as workers:

        def stage(title: str, runs: Sequence[Run]) -> bool:
            """Make what is missing of the runs; False if none of them is new."""
            fresh = {run.key: run for run in runs if run.key not in seen}
            seen.update(fresh)
            missing = [run for key, run in fresh.items() if not store.result(key)]
            summary.kept += len(fresh) - len(missing)
            if fresh:
                say(f"{study.name}, {title}: {len(fresh)} runs, {len(missing)} to make, {engine.width} side by side")
            _make(missing, store, workers, summary, say)
            return bool(fresh)

        while stage("rates", study.search(store)):
            pass  # a best value at the end of its grid asks for more
        stage("all seeds", study.confirmation(store))
    say(str(summary) + ("; failed runs stay so, --retry makes them again" if summary.failed else ""))
    return summary


def prepare(study: Study) -> None:
    """Read the data, see that the backbones can be had, and check that tokenizers, label words and methods fit."""
    from tnpeft.studies.tasks.scoring import Scorer

    for task in study.tasks:
        load(task, study.places["data"])
    cache, seen = Path(study.places["cache"]), set[str]()
    for name in study.backbones:
        tokenizer = backbones.reach(name, study.places["tokenizer"], cache)
        for cell in study.cells:
            protocol = cell.protocol
            key = str([name, dict(cell.method), protocol.targets])
            if key not in seen:
                looked = "peft" in cell.method and tokenizer
                modules = backbones.module_names(name, protocol.head, cache) if looked else None
                _check_method(cell, backbones.shape(name), modules)
            seen.add(key)
            if cell.relative and protocol.rate_rule == "rate":
                study.rate_of_step(cell, name)
            if tokenizer:
                Scorer(cell.task, tokenizer, protocol.head, protocol.max_length)


def _check_method(cell: Cell, model: Any, modules: Sequence[str] | None) -> None:
    """Refuse a method that cannot be counted; one of PEFT's that it does not have, or whose targets match nothing."""
    where, targets = f"method {cell.label!r} {cell.size}".strip(), cell.protocol.targets
    try:
        methods.count(cell.method, model, targets)
    except StudyError:
        raise
    except (TypeError, ValueError) as error:
        raise StudyError(f"wrong values: {error}", where=where, remedy="check args, grid and targets") from None
    if modules is not None:
        methods.peft_config(cell.method)
        for target in targets:
            if not any(f".{name}".endswith(f".{target}") for name in modules):
                raise StudyError(f"the model has no module {target!r}", where=where, remedy="correct targets")


def _make(runs: Sequence[Run], store: Store, workers: Workers, summary: SweepSummary, say: Say) -> None:
    start, ended, waiting = time.perf_counter(), 0, list(runs)
    while waiting:
        busy: list[Run] = []
        for run, status, seconds in workers.map(waiting):
            if status == "busy":
                busy.append(run)
                continue
            ended += 1
            setattr(summary, status, getattr(summary, status) + 1)
            left = (time.perf_counter() - start) / ended * (len(runs) - ended)
            if status == "failed":
                outcome = f"FAILED ({(store.failure(run.key) or {}).get('cause', 'unknown')})"
            else:
                result = store.result(run.key) or {"dev": math.nan, "eval": math.nan}
                outcome = f"dev {result['dev']:.3f}, eval {result['eval']:.3f}"
            say(f"[{ended}/{len(runs)}] {run}: {outcome}, {seconds:.1f} s; {_time(left)} left")
        if busy and len(busy) != len(waiting):
            say(f"waiting for {len(busy)} runs that another process has under way")
        if busy:
            time.sleep(1)
        waiting = busy


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
