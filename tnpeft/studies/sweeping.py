"""The sweep: every run of a study once, side by side, stopped and started again at any moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tnpeft.studies.data import load
from tnpeft.studies.engines import Engine, Workers
from tnpeft.studies.files import StudyError
from tnpeft.studies.runs import Run, Store
from tnpeft.studies.study import Study

Say = Callable[[str], None]


@dataclass
class Tally:
    """How a sweep went."""

    done: int = 0
    kept: int = 0
    failed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.done} done", f"{self.kept} kept from before"]
        parts += [f"{self.failed} failed"] if self.failed else []
        return ", ".join(parts)


def sweep(study: Study, folder: str | Path, engine: Engine | None = None, say: Say = print) -> Tally:
    """Make every run of the study that has no result in ``folder`` yet; results there are kept.

    First the grids of rates and steps with the tuning seeds, for as long as they grow, then all seeds at each cell's
    best value.

    Runs that another sweep has under way in the same folder are waited for.

    Returns:
        How many runs were made, kept and failed.

    Raises:
        StudyError: it was started several times over by torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise StudyError("torchrun is for one run", where="sweep", remedy="use --workers or --engine ray here")
    engine, store, tally = engine or Engine(), Store(Path(folder)), Tally()
    store.recover()
    seen: set[str] = set()
    for task in study.tasks:
        load(task, study.places["data"])
    prepare(study)
    with engine.open(store.folder) as workers:

        def stage(title: str, runs: Sequence[Run]) -> bool:
            """Make what is missing of the runs; False if none of them is new."""
            fresh = {run.key: run for run in runs if run.key not in seen}
            seen.update(fresh)
            missing = [run for key, run in fresh.items() if not store.result(key)]
            tally.kept += len(fresh) - len(missing)
            if fresh:
                say(f"{study.name}, {title}: {len(fresh)} runs, {len(missing)} to make, {engine.width} side by side")
            _make(missing, store, workers, tally, say)
            return bool(fresh)

        while stage("rates", study.search(store)):
            pass  # a best value at the end of its grid asks for more
        stage("all seeds", study.confirmation(store))
    say(str(tally) + ("; failed runs stay so, --retry makes them again" if tally.failed else ""))
    return tally


def prepare(study: Study) -> None:
    """See that a study's backbones can be had, before workers ask for them, and that their tokenizers tell the label
    words apart.

    Raises:
        StudyError: it cannot, or does not.
    """
    from tnpeft.studies import backbones
    from tnpeft.studies.scoring import Scorer

    cache = Path(study.places["cache"])
    for name in study.backbones:
        words = backbones.reach(name, study.places["tokenizer"], cache)
        for its in study.tasks if words else ():
            Scorer(its, words, study.protocol.head)


def _make(runs: Sequence[Run], store: Store, workers: Workers, tally: Tally, say: Say) -> None:
    start, ended, waiting = time.perf_counter(), 0, list(runs)
    while waiting:
        busy: list[Run] = []
        for run, status, seconds in workers.map(waiting):
            if status == "busy":
                busy.append(run)
                continue
            ended += 1
            setattr(tally, status, getattr(tally, status) + 1)
            left = (time.perf_counter() - start) / ended * (len(runs) - ended)
            say(f"[{ended}/{len(runs)}] {run}: {_told(run, status, store)}, {seconds:.1f} s; {_time(left)} left")
        if busy and len(busy) != len(waiting):
            say(f"waiting for {len(busy)} runs that another process has under way")
        if busy:
            time.sleep(1)
        waiting = busy


def _told(run: Run, status: str, store: Store) -> str:
    if status == "failed":
        return f"FAILED ({(store.failure(run.key) or {}).get('cause', 'unknown')})"
    result = store.result(run.key)
    return f"dev {result['dev']:.3f}, eval {result['eval']:.3f}" if result else status


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
