"""A run, named by the hash of all that determines it, and the folder that holds one result file for each."""

from __future__ import annotations

import contextlib
import fcntl
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

from tnpeft.studies.files import StudyError, canonical, digest, write_json
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.tasks import Task
from tnpeft.studies.tasks import task as task_of

if TYPE_CHECKING:
    from tnpeft.studies.data import Splits
    from tnpeft.studies.scoring import Judged
    from tnpeft.studies.training import Best

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


@dataclass(frozen=True)
class Store:
    """A folder of results, ``<key>.json`` for a run that ended well, ``<key>.failed.json`` for one that did not."""

    folder: Path

    def result(self, key: str) -> dict[str, Any] | None:
        """The result of a run, None if there is none."""
        return self._read(self.folder / f"{key}.json")

    def failure(self, key: str) -> dict[str, Any] | None:
        """The record of a failed run, None if it has not failed."""
        return self._read(self.folder / f"{key}.failed.json")

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise StudyError("is damaged", where=str(path), remedy="remove it, and the run is made again")
        return found

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the run is ours alone; the claim ends with the block or with the process, however that dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{key}.lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def keep(self, run: Run, record: Mapping[str, Any]) -> None:
        """Write the result of a run; it has not failed any more."""
        write_json(self.folder / f"{run.key}.json", record)
        (self.folder / f"{run.key}.failed.json").unlink(missing_ok=True)

    def keep_all(self, runs: Sequence[Run], records: Sequence[Mapping[str, Any]]) -> None:
        """Write the results of runs that were made in one pass: all of them or none, whenever it is cut off.

        They go into one file first, from which :meth:`recover` takes what a killed process left.
        """
        written = {run.key: dict(record) for run, record in zip(runs, records, strict=True)}
        self._spread(write_json(self.folder / f".{digest(sorted(written))}.pack.json", written))

    def _spread(self, file: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            for key, record in json.loads(file.read_text(encoding="utf-8")).items():
                write_json(self.folder / f"{key}.json", record)
                (self.folder / f"{key}.failed.json").unlink(missing_ok=True)
            file.unlink()

    def recover(self) -> None:
        """Finish what a process that was killed had begun to write."""
        for file in self.folder.glob(".*.pack.json"):
            self._spread(file)

    def fail(self, run: Run, cause: str, trace: str = "") -> None:
        """Record a failure with its cause."""
        record = {"run": run.identity, "cause": cause, "trace": trace}
        write_json(self.folder / f"{run.key}.failed.json", record)


def execute(run: Run, store: Store, *, retry: bool = False) -> str:
    """``done`` after making a run, ``kept`` if its result was there, ``failed``, or ``busy`` (made elsewhere)."""
    with store.claim(run.key) as ours:
        return settled(run, store, ours, retry) or make(run, store)


def settled(run: Run, store: Store, ours: bool, retry: bool) -> str:
    """What there is to say of a run that is not to be made now; nothing if it is."""
    if store.result(run.key):
        return "kept"
    if not ours:
        return "busy"
    return "failed" if store.failure(run.key) and not retry else ""


def make(run: Run, store: Store, **note: Any) -> str:
    """Make a run that is claimed and write its result, with the ``note`` in it, or its failure."""
    try:
        record = perform(run)
    except Exception as error:
        store.fail(run, f"{type(error).__name__}: {error}", traceback.format_exc())
        return "failed"
    store.keep(run, {**record, **note})
    return "done"


def backbone(run: Run, task: Task, protocol: Protocol) -> tuple[Any, Any]:
    """The frozen model of a run, and its tokenizer."""
    from tnpeft.studies import backbones

    return backbones.load(
        run.places.get("model", run.backbone),
        head=protocol.head,
        classes=len(task.labels),
        dtype=protocol.dtype,
        cache=Path(run.places.get("cache", "runs/cache")),
        tokenizer=run.places.get("tokenizer", ""),
    )


def perform(run: Run, *, folder: Path | None = None, progress: Any = None, keep: Any = None) -> dict[str, Any]:
    """Train, judge and describe a run; ``keep(model, tokenizer)`` gets the model at its best checkpoint."""
    import torch

    from tnpeft.studies import methods, processes, training
    from tnpeft.studies.data import load
    from tnpeft.studies.scoring import Scorer, judge

    quiet()
    task, protocol = terms(run)
    splits = load(task, run.places.get("data", "")).splits(run.seed, protocol.train, protocol.dev, protocol.eval)
    protocol = protocol.on(len(splits.train))
    torch.manual_seed(run.seed)  # a new classification head draws from it
    model, tokenizer = backbone(run, task, protocol)
    classifier = protocol.head == "classifier"
    model = methods.attach(model, run.method, protocol.targets, classifier=classifier, seed=run.seed)
    model.to(processes.device())
    scorer = Scorer(task, tokenizer, protocol.head, protocol.max_length)
    adapter, head = methods.trainable(model)
    best, seconds = training.fit(
        model, scorer, splits, protocol, lr=run.lr, seed=run.seed, folder=folder, progress=progress
    )
    (judged,) = judge(scorer, model, [scorer.encode(splits.eval)])
    if keep and processes.first():
        keep(model, tokenizer)
    return described(run, (adapter, head), splits, best, seconds, judged, str(model.device))


def terms(run: Run) -> tuple[Task, Protocol]:
    """The task and the protocol of a run."""
    task = task_of(dict(run.task))
    return task, Protocol.of({**run.protocol, "targets": list(run.protocol.get("targets", ()))})


def described(
    run: Run,
    parameters: tuple[int, int],
    splits: Splits,
    best: Best,
    seconds: float,
    judged: Judged,
    device: str,
) -> dict[str, Any]:
    """The record of a run: what its file holds; ``parameters`` of adapter and head, ``judged`` on eval."""
    import torch

    steps, task = best.curve[-1][0], terms(run)[0]
    scores = judged.scores(len(task.labels))
    return {
        "key": run.key,
        "run": run.identity,
        "model": Path(run.places.get("model", run.backbone)).name,
        "parameters": parameters[0],
        "head_parameters": parameters[1],
        "examples": [len(splits.train), len(splits.dev), len(splits.eval)],
        "metric": task.metric,
        "dev": best.dev,
        "eval": scores[task.metric],
        "eval_loss": finite(judged.loss),
        "scores": scores,
        "predictions": judged.guesses,
        "labels": judged.labels,
        "best_step": best.step,
        "steps": steps,
        "curve": [[row[0], *map(finite, row[1:])] for row in best.curve],
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
