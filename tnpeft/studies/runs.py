"""Runs, each named by the hash of all that determines it, and the folder of their results."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import filelock

from tnpeft.networks import common
from tnpeft.studies import backbones, methods
from tnpeft.studies.files import StudyError, canonical, digest, read_json, write_json
from tnpeft.studies.schema import fits

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
    jobs, growing = list[list[Run]](), dict[str, list[Run]]()
    for run in runs:
        kind = _kind(run)
        if not kind or len(growing.get(kind, ())) % size == 0:
            jobs.append([])
            growing[kind] = jobs[-1]
        growing[kind].append(run)
    return [tuple(job) for job in jobs]


def _kind(run: Run) -> str:
    """Return what runs of one pass have in common; nothing for a run that is made alone."""
    adapter = "family" in run.method or "line" in run.method
    length = run.protocol.get("epochs", 0) or run.protocol.get("steps", 0)
    words = run.protocol.get("head") == "words" and length > 0
    fixed = not run.places.get("model", run.backbone).startswith(backbones.RANDOM)
    if not (adapter and words and fixed):
        return ""
    shared = {k: v for k, v in run.identity.items() if k not in ("lr", "seed", "method")}
    rule = run.protocol.get("rate_rule", "rate")
    if rule == "measured":
        return ""
    by_rule = run.protocol.get("relative_step") or rule != "rate"
    method = run.method if by_rule else str(common(methods.factorization(run.method)))  # a rule depends on the ranks
    return canonical([shared, dict(run.places), method])


# ---- results on disk


@dataclass(frozen=True)
class Store:
    """A folder of results, ``<key>.json`` for a run that ended well, ``<key>.failed.json`` for one that did not.

    >>> print(Store(Path("nowhere")).result("0123456789abcdef"))
    None
    """

    folder: Path

    def result(self, key: str) -> dict[str, Any] | None:
        """Return the result of a run, None if there is none.

        Raises:
            StudyError: the file is damaged, incomplete, or of another run; the message names it.
        """
        path = self.folder / f"{key}.json"
        record = read_json(path, _REDO)
        if record is not None and (problem := _problem(record, key)):
            raise StudyError(problem, where=str(path), remedy=_REDO)
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
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(filelock.Timeout):
                stack.enter_context(lock)
            yield lock.is_locked

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
                if problem := _problem(record, key):
                    raise StudyError(problem, where=str(file), remedy=_REDO)
                self._spread({key: record})
            file.unlink(missing_ok=True)

    def fail(self, run: Run, cause: str, trace: str = "") -> None:
        """Record a failure with its cause."""
        record = {"run": run.identity, "cause": cause, "trace": trace}
        write_json(self.folder / f"{run.key}.failed.json", record)


_REDO = "remove it, and the run is made again"
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("run", "scores", "timing"), Mapping),
    **dict.fromkeys(("parameters", "head_parameters", "best_step", "steps"), int),
    **dict.fromkeys(("dev", "eval"), float | int),
    "eval_loss": float | int | None,
    **{key: [object] for key in ("curve", "predictions", "labels")},
}


def _problem(record: Any, key: str) -> str:
    """Why a record is not the whole result of this run; nothing if it is."""
    if not isinstance(record, dict):
        return "is damaged"
    if record.get("key") != key:
        return f"holds the result of the run {record.get('key')!r}"
    for name, kind in _FIELDS.items():
        if name not in record or not fits(record[name], kind):
            return f"is damaged: {name} is {'wrong' if name in record else 'missing'}"
    if not fits([*record["scores"].values()], [float | int]):
        return "is damaged: scores is wrong"
    same = len(record["predictions"]) == len(record["labels"])
    return "" if same else "is damaged: predictions and labels differ in number"


def finite(value: float) -> float | None:
    """A number as JSON has it: none if it is not finite."""
    return value if math.isfinite(value) else None


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
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
