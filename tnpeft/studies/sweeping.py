"""The sweep: every run of a study once, side by side, stopped and started again at any moment."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tnpeft.studies.files import StudyError
from tnpeft.studies.packing import Job, execute_pack, packs
from tnpeft.studies.runs import Run, Store
from tnpeft.studies.study import Study

Say = Callable[[str], None]
Outcome = tuple[Run, str, float]
ENGINES = ("processes", "serial", "ray")


@dataclass(frozen=True)
class Engine:
    """Where runs are made: ``processes`` on this machine, ``serial`` in this process, or ``ray``.

    ``pack`` runs that differ in seed and learning rate alone are trained in one pass (see
    :mod:`tnpeft.studies.packing`): faster where a step's fixed costs count, and equal to rounding only.
    """

    kind: str = "processes"
    workers: int = 0
    threads: int = 1
    retry: bool = False
    pack: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ENGINES:
            raise StudyError(f"unknown engine {self.kind!r}", remedy=f"use one of {', '.join(ENGINES)}")
        if self.pack < 1:
            raise StudyError(f"pack = {self.pack}", remedy="give 1 for runs one by one, or how many share a pass")

    @property
    def width(self) -> int:
        """Runs side by side: as many as there are cores for, unless it is said."""
        return 1 if self.kind == "serial" else self.workers or max(1, (os.cpu_count() or 1) // self.threads)

    def map(self, runs: Sequence[Run], folder: Path) -> Iterator[Outcome]:
        """Outcomes of the runs as they come in."""
        jobs = packs(runs, self.pack)
        if self.kind == "serial":
            return (outcome for job in jobs for outcome in _work(job, str(folder), self.threads, self.retry))
        return self._ray(jobs, folder) if self.kind == "ray" else self._processes(jobs, folder)

    def _processes(self, jobs: Sequence[Job], folder: Path) -> Iterator[Outcome]:
        """A worker that dies (out of memory, killed) takes its pool along: what was under way is made again, one by
        one, and the run that dies alone is recorded as failed."""
        alone: list[Job] = []
        waiting = list(jobs)
        while waiting or alone:
            batch, width = (waiting, self.width) if waiting else ([alone.pop(0)], 1)
            ended: set[str] = set()
            try:
                for outcome in self._pool(batch, folder, width):
                    ended.add(outcome[0].key)
                    yield outcome
                waiting = [] if batch is waiting else waiting
            except BrokenProcessPool:
                left = [job for job in batch if job[0].key not in ended]
                if batch is waiting:
                    alone, waiting = [(run,) for job in left[: self.width] for run in job], left[self.width :]
                else:
                    Store(folder).fail(batch[0][0], "its process died (killed, or out of memory)")
                    yield batch[0][0], "failed", 0.0

    def _pool(self, jobs: Sequence[Job], folder: Path, width: int) -> Iterator[Outcome]:
        spawn = get_context("spawn")
        with ProcessPoolExecutor(width, mp_context=spawn, initializer=_start, initargs=(os.getpid(),)) as pool:
            queue = iter(jobs)
            pending: set[Future[list[Outcome]]] = set()
            while True:
                for job in queue:
                    pending.add(pool.submit(_work, job, str(folder), self.threads, self.retry))
                    if len(pending) >= width:
                        break
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()

    def _ray(self, jobs: Sequence[Job], folder: Path) -> Iterator[Outcome]:
        try:
            import ray
        except ImportError:
            raise StudyError(
                "the engine ray needs Ray", remedy="pip install ray, or use --engine processes"
            ) from None
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        remote: Any = ray.remote(num_cpus=self.threads)(_work)
        pending = [remote.remote(job, str(folder.resolve()), self.threads, self.retry) for job in jobs]
        while pending:
            done, pending = ray.wait(pending)
            yield from ray.get(done[0])


def _start(parent: int) -> None:
    """A worker ends with its parent, however that dies."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job, folder: str, threads: int, retry: bool) -> list[Outcome]:
    import torch

    torch.set_num_threads(threads)
    start = time.perf_counter()
    statuses = execute_pack(job, Store(Path(folder)), retry=retry)
    seconds = (time.perf_counter() - start) / len(job)
    return [(run, status, seconds) for run, status in zip(job, statuses, strict=True)]


@dataclass
class Tally:
    """How a sweep went."""

    done: int = 0
    kept: int = 0
    failed: int = 0
    busy: int = 0

    def __str__(self) -> str:
        parts = [f"{self.done} done", f"{self.kept} kept from before"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.busy} under way elsewhere"] if self.busy else []
        return ", ".join(parts)


def sweep(study: Study, folder: str | Path, engine: Engine | None = None, say: Say = print) -> Tally:
    """Make every run of the study that has no result in ``folder`` yet; results there are kept.

    First the grid of learning rates with the tuning seeds, then all seeds at each cell's best rate.

    Returns:
        How many runs were made, kept and failed.
    """
    engine, store, tally = engine or Engine(), Store(Path(folder)), Tally()
    seen: set[str] = set()
    prepare(study, say)
    for title, runs in (("learning rates", study.search), ("all seeds", lambda: study.confirmation(store))):
        fresh = {run.key: run for run in runs() if run.key not in seen}
        seen |= set(fresh)
        missing = [run for key, run in fresh.items() if not store.result(key)]
        tally.kept += len(fresh) - len(missing)
        say(f"{study.name}, {title}: {len(fresh)} runs, {len(missing)} to make, {engine.width} side by side")
        _make(missing, store, engine, tally, say)
    say(str(tally))
    return tally


def prepare(study: Study, say: Say = print) -> None:
    """Make the backbone that a study needs, if it is one that is made here, before workers ask for it."""
    from tnpeft.studies import backbones

    if study.places["model"] == backbones.DIGITS:
        cache = Path(study.places["cache"])
        if not (cache / f"digits-{backbones.digits_key()}" / "config.json").exists():
            say("pretraining the small OPT on upright digits")
        backbones.digits_backbone(cache)


def _make(runs: Sequence[Run], store: Store, engine: Engine, tally: Tally, say: Say) -> None:
    start = time.perf_counter()
    for number, (run, status, seconds) in enumerate(engine.map(runs, store.folder), 1):
        setattr(tally, status, getattr(tally, status) + 1)
        left = (time.perf_counter() - start) / number * (len(runs) - number)
        say(f"[{number}/{len(runs)}] {run}: {_told(run, status, store)}, {seconds:.1f} s; {_time(left)} left")


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
