"""Examples of a task, read and checked line by line, and the splits that a seed draws from them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tnpeft.studies.files import StudyError, digest
from tnpeft.studies.tasks.readers import Row, hub_rows, read_rows
from tnpeft.studies.tasks.task import Task


@dataclass(frozen=True)
class Example:
    """One example: its prompt, its text for a head, and the place of its label among the task's labels."""

    prompt: str
    text: str
    label: int


@dataclass(frozen=True)
class Splits:
    """Examples to train on and to choose on (dev), drawn by a seed, and to report on (eval), the same always."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    eval: tuple[Example, ...]


@dataclass(frozen=True)
class Data:
    """All examples of a task; ``digest`` is the hash of every prompt and label in it.

    >>> from tnpeft.studies.tasks.task import task
    >>> splits = load(task("digits_upright")).splits(seed=0, train=64, dev=32)
    >>> len(splits.train), len(splits.dev), len(splits.eval)
    (64, 32, 797)
    """

    task: Task
    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    digest: str

    def splits(self, seed: int, train: int = 0, dev: int = 0, evaluation: int = 0) -> Splits:
        """Train and dev from a permutation of the training part; eval is the same for every seed.

        0 takes all there is (of dev: a tenth of the training part); less than asked for is taken as it is.

        Raises:
            StudyError: nothing is left to train on.
        """
        pool = random.Random(f"{seed} train").sample(self.train, len(self.train))
        held = random.Random("eval").sample(self.eval, len(self.eval))
        dev = dev or max(1, len(pool) // 10)
        if len(pool) <= dev:
            raise StudyError(
                f"{len(pool)} training examples leave none beside {dev} for dev",
                where=f"task {self.task.name!r}",
                remedy="ask for fewer dev examples (dev in the protocol, --settings 'dev=N')",
            )
        train = min(train or len(pool), len(pool) - dev)
        return Splits(tuple(pool[:train]), tuple(pool[train : train + dev]), tuple(held[: evaluation or None]))


_LOADED: dict[str, Data] = {}


def load(task: Task, folder: str | Path = "") -> Data:
    """The task's data: files below ``folder``, or from the hub if it is ``"hub"``.

    Raises:
        StudyError: a file is missing, empty or in another encoding, a column is missing, a label is unknown; the
            message names the file and the line.

    >>> from tnpeft.studies.tasks.task import task
    >>> data = load(task("digits_upright"))
    >>> len(data.eval), data.eval[0].prompt[:11]
    (797, 'p0 p60 p50 ')
    """
    parts = [Path(folder) / name for name in (task.train, task.eval) if name]
    stamps = [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in parts if p.exists()]
    key = digest([repr(task), str(folder), stamps])
    if key not in _LOADED:
        _LOADED[key] = _read(task, str(folder))
    return _LOADED[key]


def _read(task: Task, folder: str) -> Data:
    if folder == "hub" and not task.train.startswith("digits:"):
        train, evaluation = _from_hub(task, 2), _from_hub(task, 3)
    else:
        train, evaluation = _part(task, folder, task.train), _part(task, folder, task.eval)
    content = [[[e.prompt, e.label] for e in part] for part in (train, evaluation)]
    return Data(task, train, evaluation, digest([task.words, content]))


def _part(task: Task, folder: str, name: str) -> tuple[Example, ...]:
    if name.startswith("digits:"):
        from tnpeft.studies.digits import rows

        return tuple(_example(task, row, name) for row in rows(*name.removeprefix("digits:").split("/")))
    if not name:
        raise StudyError("names no file", where=f"task {task.name!r}", remedy="give train and eval")
    path = Path(folder) / name
    found = tuple(_example(task, row, f"{path}:{line}") for line, row in read_rows(path))
    if not found:
        raise StudyError("the file holds no example", where=str(path), remedy="check that it is complete")
    return found


def _example(task: Task, row: Row, where: str) -> Example:
    for name in (*task.fields, task.label):
        if name not in row:
            raise StudyError(f"no column {name!r}", where=where, remedy=f"the columns are {', '.join(map(str, row))}")
    texts = {}
    for name in task.fields:
        if not isinstance(row[name], str) or not row[name].strip():
            raise StudyError(f"{name!r} holds no text", where=where, remedy="fill it in or leave the row out")
        texts[name] = row[name].strip()
    label = row[task.label]
    label = str(int(label)) if isinstance(label, bool) else str(label).strip()
    if row[task.label] is None or not label:
        raise StudyError(f"{task.label!r} is empty", where=where, remedy="fill it in or leave the row out")
    if label not in task.words:
        known = ", ".join(task.labels)
        raise StudyError(f"unknown label {label!r}", where=where, remedy=f"the task's labels are {known}")
    prompt = task.prompt.format(**texts)
    return Example(prompt, task.text.format(**texts) if task.text else prompt, task.labels.index(label))


def _from_hub(task: Task, split: int) -> tuple[Example, ...]:
    if len(task.hub) != 4:
        raise StudyError("is not on the hub", where=f"task {task.name!r}", remedy="pass a folder of files")
    where = "/".join(part for part in (*task.hub[:2], task.hub[split]) if part)
    rows = hub_rows(task.hub[0], task.hub[1], task.hub[split])
    found = tuple(_example(task, row, f"{where} row {number}") for number, row in rows)
    if not found:
        raise StudyError("the split holds no example", where=where, remedy="check its name")
    return found
