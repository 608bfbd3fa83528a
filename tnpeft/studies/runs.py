"""Runs, each named by the hash of all that determines it; the folder of their results; making them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from tnpeft.networks import common
from tnpeft.studies import backbones, methods
from tnpeft.studies.data import load
from tnpeft.studies.files import StudyError, canonical, digest, read_json, write_json
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.tasks import Task
from tnpeft.studies.tasks import task as task_of

if TYPE_CHECKING:
    from tnpeft.studies.data import Splits
    from tnpeft.studies.scoring import Judged
    from tnpeft.studies.training import Course

SCHEMA = 2  # raise it when a change makes results of old runs incomparable
LIBRARIES = ("tnpeft", "torch", "transformers", "peft", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Run:
    """One training with one seed.

    Attributes:
        task: the task as a table.
        data: hash of its examples.
        method: what is trained.
        protocol: the settings of :attr:`Protocol.training`.
        lr: learning rate.
        seed: of the data order, the splits and the start values.
        backbone: the hash of the frozen model's weights, configuration and tokenizer.
        places: where model, data and cache are found; no part of the name.

    >>> one = Run({"name": "sst2"}, "d", {"family": "lora"}, {"steps": 1}, 1e-3, 0, "b")
    >>> one.key == Run({"name": "sst2"}, "d", {"family": "lora"}, {"steps": 1}, 1e-3, 0, "b", {"data": "x"}).key
    True
    """

    task: Mapping[str, Any]
    data: str
    method: Mapping[str, Any]
    protocol: Mapping[str, Any]
    lr: float
    seed: int
    backbone: str
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines the result, as JSON has it."""
        its = {"schema": SCHEMA, **{k: v for k, v in asdict(self).items() if k != "places"}}
        plain: dict[str, Any] = json.loads(canonical(its))
        return plain

    @property
    def key(self) -> str:
        """The hash of the identity: the run's name."""
        return digest(self.identity)

    def __str__(self) -> str:
        kind, name = next((k, v) for k, v in self.method.items() if k != "args")
        args = " ".join(f"{k}={v}" for k, v in self.method.get("args", {}).items())
        what = name if isinstance(name, str) else kind
        return f"{self.task['name']} {what}{' ' if args else ''}{args} lr={self.lr:g} seed={self.seed}"


Job = Sequence[Run]  # runs that are made in one pass


def packs(runs: Sequence[Run], size: int) -> list[tuple[Run, ...]]:
    """Return the runs as jobs of up to ``size`` that can share a pass, in the order of their first runs.

    They can if they train a family or a line and differ in seed, learning rate, ranks and scale alone. A new head
    or a backbone with random weights comes out of each run's seed, so these are made alone.

    >>> protocol = {"steps": 1, "head": "words"}
    >>> three = [Run({"name": "a"}, "d", {"family": "lora"}, protocol, 1e-3, seed, "b") for seed in (0, 1, 2)]
    >>> [len(job) for job in packs(three, 2)]
    [2, 1]
    """
    jobs: list[list[Run]] = []
    open_jobs: dict[str, list[Run]] = {}
    for run in runs:
        kind = _kind(run)
        job = open_jobs.get(kind)
        if job is None or len(job) >= size:
            job = []
            jobs.append(job)
            if kind:
                open_jobs[kind] = job
        job.append(run)
    return [tuple(job) for job in jobs]


def _kind(run: Run) -> str:
    """Return what runs of one pass have in common; nothing for a run that is made alone."""
    adapter = "family" in run.method or "line" in run.method
    length = run.protocol.get("epochs", 0) or run.protocol.get("steps", 0)
    words = run.protocol.get("head") == "words" and length > 0
    fixed = not run.places.get("model", run.backbone).startswith(backbones.RANDOM)
    if not (adapter and words and fixed) or run.protocol.get("precondition"):
        return ""
    shared = {k: v for k, v in run.identity.items() if k not in ("lr", "seed", "method")}
    by_rule = run.protocol.get("relative_step") or run.protocol.get("rate_rule") == "relative_step"
    method = run.method if by_rule else str(common(methods.factorization(run.method)))  # a rule depends on the ranks
    return canonical([shared, dict(run.places), method])


# ---- results on disk


@dataclass(frozen=True)
class Store:
    """A folder of results, ``<key>.json`` for a run that ended well, ``<key>.failed.json`` for one that did not."""

    folder: Path

    def result(self, key: str) -> dict[str, Any] | None:
        """Return the result of a run, None if there is none.

        Raises:
            StudyError: the file is damaged, incomplete, or of another run; the message names it.
        """
        path = self.folder / f"{key}.json"
        record = read_json(path, _REDO)
        if record is not None:
            _check_result(record, key, path)
        return record

    def failure(self, key: str) -> dict[str, Any] | None:
        """Return the record of a failed run, None if it has not failed.

        Raises:
            StudyError: the file is damaged.
        """
        path = self.folder / f"{key}.failed.json"
        record = read_json(path, _REDO)
        if record is not None and not isinstance(record.get("cause"), str):
            raise StudyError("is damaged: it has no cause", where=str(path), remedy=_REDO)
        return record

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """True if the run is ours alone; the claim ends with the block or with the process, however that dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.folder / f".{key}.lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def keep(self, runs: Job, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the results of runs that were made in one pass: all of them or none, whenever it is cut off.

        Several go into one file first, from which :meth:`recover` takes what a killed process left.
        """
        written = {run.key: dict(record) for run, record in zip(runs, records, strict=True)}
        journal = self.folder / f".{digest(sorted(written))}.pack.json"
        if len(runs) > 1:
            write_json(journal, written)
        self._spread(written)
        journal.unlink(missing_ok=True)

    def _spread(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        for key, record in records.items():
            write_json(self.folder / f"{key}.json", record)
            (self.folder / f"{key}.failed.json").unlink(missing_ok=True)

    def recover(self) -> None:
        """Finish what a process that was killed had begun to write."""
        for file in self.folder.glob(".*.pack.json"):
            for key, record in (read_json(file, _REDO) or {}).items():  # none: another process was faster
                _check_result(record, key, file)
                self._spread({key: record})
            file.unlink(missing_ok=True)

    def fail(self, run: Run, cause: str, trace: str = "") -> None:
        """Record a failure with its cause."""
        record = {"run": run.identity, "cause": cause, "trace": trace}
        write_json(self.folder / f"{run.key}.failed.json", record)


_REDO = "remove it, and the run is made again"
_NUMBER, _COUNT = (int, float), (int,)
_FIELDS: dict[str, Any] = {
    "run": dict,
    "scores": dict,
    "timing": dict,
    "parameters": _COUNT,
    "head_parameters": _COUNT,
    "best_step": _COUNT,
    "steps": _COUNT,
    "dev": _NUMBER,
    "eval": _NUMBER,
    "eval_loss": (*_NUMBER, type(None)),
    "curve": list,
    "predictions": list,
    "labels": list,
}


def _check_result(record: Any, key: str, path: Path) -> None:
    """Refuse a record that is not the whole result of this run."""
    problem = ""
    if not isinstance(record, dict):
        problem = "is damaged"
    elif record.get("key") != key:
        problem = f"holds the result of the run {record.get('key')!r}"
    else:
        for name, kind in _FIELDS.items():
            if name not in record:
                problem = f"is damaged: {name} is missing"
            elif not isinstance(record[name], kind) or isinstance(record[name], bool):
                problem = f"is damaged: {name} is wrong"
    if not problem and not all(type(score) in _NUMBER for score in record["scores"].values()):
        problem = "is damaged: scores is wrong"
    if not problem and len(record["predictions"]) != len(record["labels"]):
        problem = "is damaged: predictions and labels differ in number"
    if problem:
        raise StudyError(problem, where=str(path), remedy=_REDO)


# ---- making runs


def run_once(job: Job, store: Store, *, retry: bool = False) -> list[str]:
    """Make the runs of a job that have no result yet, in one pass, and return the status of each.

    ``done`` after making it, ``kept`` if its result was there, ``failed``, or ``busy`` (made elsewhere). Each run has
    its file as if it had been made alone, with their number under ``pack``. A job of which a run is under way
    elsewhere is left alone as a whole: which runs share a pass does not depend on what else is going on.
    """
    with contextlib.ExitStack() as stack:
        claimed = all(stack.enter_context(store.claim(run.key)) for run in job)
        store.recover()
        status = {run.key: cached_status(run, store, claimed, retry) for run in job}
        fresh = [run for run in job if not status[run.key]]
        if fresh:
            status |= zip((run.key for run in fresh), run_and_store(fresh, store), strict=True)
        return [status[run.key] for run in job]


def cached_status(run: Run, store: Store, claimed: bool, retry: bool) -> str:
    """Return the status of a run that is not to be made now; nothing if it is."""
    if store.result(run.key):
        return "kept"
    if not claimed:
        return "busy"
    return "failed" if store.failure(run.key) and not retry else ""


def run_and_store(job: Job, store: Store, **note: Any) -> list[str]:
    """Make claimed runs in one pass and write their results, with the ``note`` in them, or a failure.

    If a pass of several fails, they are made one by one, and their files say why under ``unpacked``.
    """
    cause = trace = ""
    try:
        store.keep(job, [{**record, **note} for record in train_and_evaluate(job)])
    except Exception as error:
        cause, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    if not cause:
        return ["done"] * len(job)
    if len(job) > 1:
        return [status for run in job for status in run_and_store([run], store, unpacked=cause)]
    store.fail(job[0], cause, trace)
    return ["failed"]


def train_and_evaluate(
    job: Job, *, folder: Path | None = None, progress: Any = None, say: Any = None, keep: Any = None
) -> list[dict[str, Any]]:
    """Train the runs of a job side by side, evaluate them, and return their records.

    Args:
        job: one run, or several that :func:`packs` put together.
        folder: of checkpoints, from which an interrupted job goes on.
        progress, say: see :func:`tnpeft.studies.training.fit`.
        keep: called with the trained model and the tokenizer.

    Raises:
        StudyError: the runs cannot share a pass, or data, tokenizer and model do not fit each other.
    """
    import torch

    import tnpeft
    from tnpeft.studies import training
    from tnpeft.studies.scoring import Scorer, judge

    quiet()
    first, several = job[0], len(job) > 1
    task, protocol = terms(first)
    data = load(task, first.places.get("data", ""))
    splits = [data.splits(run.seed, protocol.train, protocol.dev, protocol.eval) for run in job]
    protocol = protocol.on(len(splits[0].train))
    torch.manual_seed(first.seed)  # a new classification head draws from it
    model, tokenizer = backbones.load(
        first.places.get("model", first.backbone),
        head=protocol.head,
        classes=len(task.labels),
        dtype=protocol.dtype,
        cache=Path(first.places.get("cache", "runs/cache")),
        tokenizer=first.places.get("tokenizer", ""),
    )
    if several:
        _refuse_dropout(model.config.to_dict())
    scorer = Scorer(task, tokenizer, protocol.head, protocol.max_length)
    held = [scorer.encode(each.eval) for each in splits]
    training.check_rows(model, scorer, held[0])
    model = methods.attach(
        model,
        first.method,
        protocol.targets,
        classifier=protocol.head == "classifier",
        seed=first.seed,
        replicas=[(run.method, run.seed) for run in job] if several else (),
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [(tnpeft.replicas.parameters(model, k), 0) for k in range(len(job))] if several else []
    sizes = sizes or [methods.trainable(model)]
    lrs, seeds = [run.lr for run in job], [run.seed for run in job]
    courses, seconds = training.fit(
        model, scorer, splits, protocol, lrs=lrs, seeds=seeds, folder=folder, progress=progress, say=say
    )
    if say:
        say(f"evaluating on {len(held[0])} held-out examples")
    reached = judge(scorer, model, held)
    if keep:
        keep(model, tokenizer)
    also = {"pack": len(job)} if several else {}
    parts = zip(job, sizes, splits, courses, reached, strict=True)
    return [{**described(*part, seconds / len(job), str(model.device)), **also} for part in parts]


def _refuse_dropout(config: dict[str, Any]) -> None:
    """Refuse dropout in a pass of several runs: their masks would come out of one stream of random numbers."""
    found = [name for name, value in config.items() if "drop" in name and isinstance(value, float) and value > 0]
    if found:
        raise StudyError(f"the backbone trains with {found[0]} = {config[found[0]]}", remedy="make such runs alone")


def terms(run: Run) -> tuple[Task, Protocol]:
    """Return the task and the protocol of a run."""
    task = task_of(dict(run.task))
    return task, Protocol.of({**run.protocol, "targets": list(run.protocol.get("targets", ()))})


def described(
    run: Run,
    parameters: tuple[int, int],
    splits: Splits,
    course: Course,
    judged: Judged,
    seconds: float,
    device: str,
) -> dict[str, Any]:
    """Return the record of a run, the content of its file; ``parameters`` of adapter and head, ``judged`` on eval."""
    import torch

    steps, task = course.curve[-1][0], terms(run)[0]
    scores = judged.scores(len(task.labels))
    return {
        "key": run.key,
        "run": run.identity,
        "model": Path(run.places.get("model", run.backbone)).name,
        "parameters": parameters[0],
        "head_parameters": parameters[1],
        "examples": [len(splits.train), len(splits.dev), len(splits.eval)],
        "metric": task.metric,
        "dev": course.dev,
        "eval": scores[task.metric],
        "eval_loss": finite(judged.loss),
        "scores": scores,
        "predictions": judged.guesses,
        "labels": judged.labels,
        "best_step": course.step,
        "steps": steps,
        "curve": [[row[0], *map(finite, row[1:])] for row in course.curve],
        "timing": {"train_seconds": round(seconds, 3), "step_ms": round(1000 * seconds / max(1, steps), 3)},
        "versions": versions(),
        "machine": {"device": device, "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def finite(value: float) -> float | None:
    """A number as JSON has it: none if it is not finite.

    >>> finite(0.5), finite(float("nan"))
    (0.5, None)
    """
    return value if math.isfinite(value) else None


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on.

    >>> sorted(versions())[0]
    'numpy'
    """
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def quiet() -> None:
    """Turn off the progress bars and notes of the libraries inside: a sweep prints one line for each run."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ["TQDM_DISABLE"] = "1"
