"""Pools of workers for runs: this process, processes of this machine, or Ray."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tnpeft.studies.files import StudyError
from tnpeft.studies.running.execution import run_once
from tnpeft.studies.runs import Job, Run, Store, packs
from tnpeft.studies.schema import at_least

Outcome = tuple[Run, str, float]  # a run, its status, seconds
DIED = "its process died (killed, or out of memory)"


@dataclass(frozen=True)
class Engine:
    """A kind of workers for runs, and their number.

    Attributes:
        kind: ``processes`` of this machine, ``serial`` in this process, or ``ray``: a cluster that ``RAY_ADDRESS``
            names, else one that Ray starts here. Its machines must see the same folders.
        workers: runs side by side; 0 for as many as there are cores for.
        threads: of each run.
        retry: True to make runs again that failed before.
        pack: runs that differ in seed, learning rate, ranks and scale alone and are trained in one pass (see
            :func:`tnpeft.studies.runs.packs`): faster where a step's fixed costs count, and equal to rounding only.
        gpus: of each run on Ray, if the cluster has any; 0.5 lets two share one.

    >>> Engine("serial").width, Engine(workers=4).width
    (1, 4)
    """

    kind: str = "processes"
    workers: int = 0
    threads: int = 1
    retry: bool = False
    pack: int = 1
    gpus: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in _POOLS:
            raise StudyError(f"unknown engine {self.kind!r}", remedy=f"use one of {', '.join(_POOLS)}")
        at_least(self, "engine", pack=1, threads=1, workers=0, gpus=0)

    @property
    def width(self) -> int:
        """Runs side by side."""
        if self.kind == "serial":
            return 1
        return self.workers or max(1, _cores(self.kind) // self.threads)


class Workers:
    """Workers for the runs whose results are in a folder.

    They live from the first job until they are closed, and are replaced when one dies.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.rest = engine, (str(folder.resolve()), engine.threads, engine.retry)
        self.pool: Any = None

    def close(self) -> None:
        """End the workers, if there are any."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        self.pool = None

    def map(self, runs: Sequence[Run]) -> Iterator[Outcome]:
        """Yield outcomes of the runs as they come in.

        A worker may die (out of memory, killed). The jobs under way are then made again one at a time: first as they
        were, then run by run, and a run that dies alone is recorded as failed.
        """
        waiting, suspects = deque[Job](packs(runs, self.engine.pack)), deque[Job]()
        while waiting:
            suspects += yield from self._until_one_dies(waiting, self.engine.width)
        while suspects:
            job = suspects.popleft()
            if not (yield from self._until_one_dies(deque([job]), 1)):
                continue
            if len(job) > 1:
                suspects.extendleft((run,) for run in reversed(job))
            else:
                Store(Path(self.rest[0])).fail(job[0], DIED)
                yield job[0], "failed", 0.0

    def _until_one_dies(self, waiting: deque[Job], width: int) -> Generator[Outcome, None, list[Job]]:
        """Yield the jobs' outcomes until a worker dies; return the lost jobs. Others stay in ``waiting``."""
        lost, under_way = list[Job](), dict[Future[list[Outcome]], Job]()
        while under_way or (waiting and not lost):
            while waiting and not lost and len(under_way) < width:
                job = waiting.popleft()
                self.pool = self.pool or _POOLS[self.engine.kind](self.engine)
                try:
                    under_way[self.pool.submit(work, job, *self.rest)] = job
                except BrokenExecutor:  # while it had nothing to do
                    lost.append(job)
            for task in wait(under_way, return_when=FIRST_COMPLETED).done:
                job = under_way.pop(task)
                try:
                    outcomes = task.result()
                except (BrokenExecutor, *getattr(self.pool, "died", ())):
                    lost.append(job)
                else:
                    yield from outcomes
        if lost:
            self.close()
        return lost


class _Here(Executor):
    """This process, which makes a job while it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        done = Future[Any]()
        done.set_result(fn(*args))
        return done


class _Ray(Executor):
    """Tasks of a Ray cluster; one that is there already stays, one that is started here ends with this process."""

    def __init__(self, engine: Engine) -> None:
        ray = _ray()
        self.died = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
        gpus = engine.gpus if ray.cluster_resources().get("GPU") else 0
        self.remote = ray.remote(num_cpus=engine.threads, num_gpus=gpus, max_retries=0)

    def submit(self, fn: Callable[..., Any], job: Job, /, *args: Any, **_: Any) -> Future[Any]:
        return self.remote(fn).remote(tuple(map(_anywhere, job)), *args).future()


_POOLS: dict[str, Callable[[Engine], Executor]] = {
    "serial": lambda engine: _Here(),
    "processes": lambda engine: processes(engine.width),
    "ray": _Ray,
}


def processes(width: int) -> ProcessPoolExecutor:
    """Return fresh processes of this machine that end with this one."""
    return ProcessPoolExecutor(width, mp_context=get_context("spawn"), initializer=_follow, initargs=(os.getpid(),))


def _follow(parent: int) -> None:
    """Let a worker end with its parent, however that dies."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cores(kind: str) -> int:
    if kind == "ray":
        return int(_ray().cluster_resources().get("CPU", 1))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ray() -> Any:
    """Return the library, connected."""
    try:
        import ray
    except ImportError:
        raise StudyError("the engine ray needs Ray", remedy="pip install 'tnpeft[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="warning", include_dashboard=False)
    return ray


def _anywhere(run: Run) -> Run:
    """Return the run with its folders as a process of another working directory finds them."""
    places = dict(run.places)
    for key, place in run.places.items():
        if place and (key == "cache" or Path(place).exists()):
            places[key] = str(Path(place).resolve())
    return replace(run, places=places)


def work(job: Job, folder: str, threads: int, retry: bool) -> list[Outcome]:
    """Make the runs of a job that have no result in ``folder`` yet, with so many threads."""
    import torch

    torch.set_num_threads(threads)
    start = time.perf_counter()
    statuses = run_once(job, Store(Path(folder)), retry=retry)
    seconds = (time.perf_counter() - start) / len(job)
    return [(run, status, seconds) for run, status in zip(job, statuses, strict=True)]
