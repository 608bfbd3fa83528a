"""Examples of a task, read and checked line by line from files or the hub, and the splits that a seed draws."""

from __future__ import annotations

import csv
import gzip
import json
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnpeft.studies.files import StudyError, digest
from tnpeft.studies.schema import repeated
from tnpeft.studies.tasks.task import Task

Row = Mapping[str, Any]
ENDINGS = (".jsonl", ".csv", ".tsv")


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
        train, evaluation = (_part(task, str(folder), place) for place in (0, 1))
        content = [[[e.prompt, e.label] for e in part] for part in (train, evaluation)]
        _LOADED[key] = Data(task, train, evaluation, digest([task.words, content]))
    return _LOADED[key]


def _part(task: Task, folder: str, place: int) -> tuple[Example, ...]:
    """The examples to train on (place 0), or those to report on (1)."""
    name, mark = (task.train, task.eval)[place], " row "
    problem, remedy = "the split holds no example", "check its name"
    if name.startswith("digits:"):
        from tnpeft.studies.digits import rows as drawn

        where, rows = name, enumerate(drawn(*name.removeprefix("digits:").split("/")))
    elif folder == "hub":
        if len(task.hub) != 4:
            raise StudyError("is not on the hub", where=f"task {task.name!r}", remedy="pass a folder of files")
        its = (*task.hub[:2], task.hub[2 + place])
        where, rows = "/".join(filter(None, its)), hub_rows(*its)
    else:
        if not name:
            raise StudyError("names no file", where=f"task {task.name!r}", remedy="give train and eval")
        where, rows, mark = str(Path(folder) / name), read_rows(Path(folder) / name), ":"
        problem, remedy = "the file holds no example", "check that it is complete"
    found = tuple(_example(task, row, f"{where}{mark}{number}") for number, row in rows)
    if not found:
        raise StudyError(problem, where=where, remedy=remedy)
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


# ---- rows of files and of the hub, each with its place


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line numbers and rows of a ``.jsonl``, ``.csv`` or ``.tsv`` file (tabs, no quotes), plain or with ``.gz``.

    What cannot be read is a StudyError that names file and line.
    """
    suffix, number = Path(path.name.removesuffix(".gz")).suffix, 0
    if suffix not in ENDINGS:
        raise StudyError(f"is none of {', '.join(ENDINGS)} (.gz)", where=str(path), remedy="rename or convert it")

    def lines() -> Iterator[str]:
        nonlocal number
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if b"\0" in line:
                    raise StudyError("holds a NUL byte", where=f"{path}:{number}", remedy="save the file as UTF-8")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    found = _objects(lines()) if suffix == ".jsonl" else _cells(lines(), suffix == ".tsv")
    try:
        for row in found:
            yield number, row
    except _Wrong as error:
        problem, remedy = error.args
    except UnicodeDecodeError as error:
        problem, remedy = f"is not in UTF-8 ({error.reason})", "save the file as UTF-8"
    except csv.Error as error:
        problem, remedy = f"invalid CSV: {error}", "quotes must be closed and lines end in \\n"
    except (OSError, EOFError, zlib.error) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        remedy = "it is cut off or damaged: get it again" if path.suffix == ".gz" else "check the path"
        if isinstance(error, FileNotFoundError):
            remedy = "check the path; --data names the folder that such files are below, or the hub"
        number += number > 0  # the line that could not be read
    else:
        return
    raise StudyError(problem, where=f"{path}:{number}" if number else str(path), remedy=remedy)


class _Wrong(Exception):
    """A problem in a line, and its remedy."""


def _objects(lines: Iterator[str]) -> Iterator[Row]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise _Wrong(f"invalid JSON: {error}", "write one whole object a line") from None
        if not isinstance(row, dict):
            raise _Wrong("expected a JSON object", "write one object a line")
        yield row


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated([name for name, _ in pairs])) is not None:
        raise _Wrong(f"two columns are called {twice!r}", "rename or remove one")
    return dict(pairs)


def _cells(lines: Iterator[str], tabs: bool) -> Iterator[Row]:
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    header: list[str] = []
    for cells in csv.reader(lines, **style):
        if not header:
            header = [cell.strip() for cell in cells]
            _unique([(name, "") for name in header])
        elif len(cells) == len(header):
            yield dict(zip(header, cells, strict=True))
        elif cells:
            remedy = "each line needs as many tabs" if tabs else "quote cells that hold commas"
            raise _Wrong(f"has {len(cells)} cells, the header {len(header)}", remedy)


def hub_rows(path: str, configuration: str, split: str) -> Iterator[tuple[int, Row]]:
    """Numbers and rows of a split of a data set on the Hugging Face hub, or of a folder that is laid out like one."""
    try:
        import datasets
    except ImportError:
        raise StudyError("the hub needs the library datasets", remedy="pip install 'tnpeft[studies]'") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        found = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:  # whatever the library, the connection or the file system has to say
        what = " ".join(f"{type(error).__name__}: {error}".split())
        where = "/".join(part for part in (path, configuration, split) if part)
        remedy = "check the name and the connection, or pass a folder of files with --data"
        raise StudyError(f"cannot be had from the hub ({what[:300]})", where=where, remedy=remedy) from None
    yield from enumerate(found)
