"""Examples of a task, read and checked line by line from files or the hub, and the splits that a seed draws."""

from __future__ import annotations

import csv
import gzip
import json
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
        _LOADED[key] = _read(task, str(folder))
    return _LOADED[key]


def _read(task: Task, folder: str) -> Data:
    train, evaluation = (_part(task, folder, place) for place in (0, 1))
    content = [[[e.prompt, e.label] for e in part] for part in (train, evaluation)]
    return Data(task, train, evaluation, digest([task.words, content]))


def _part(task: Task, folder: str, place: int) -> tuple[Example, ...]:
    """The examples to train on (place 0), or those to report on (1)."""
    name = (task.train, task.eval)[place]
    if name.startswith("digits:"):
        from tnpeft.studies.digits import rows as drawn

        return tuple(_example(task, row, name) for row in drawn(*name.removeprefix("digits:").split("/")))
    if folder == "hub":
        if len(task.hub) != 4:
            raise StudyError("is not on the hub", where=f"task {task.name!r}", remedy="pass a folder of files")
        path, configuration, split = task.hub[0], task.hub[1], task.hub[2 + place]
        where, rows = "/".join(filter(None, (path, configuration, split))), hub_rows(path, configuration, split)
        found = tuple(_example(task, row, f"{where} row {number}") for number, row in rows)
        problem, remedy = "the split holds no example", "check its name"
    else:
        if not name:
            raise StudyError("names no file", where=f"task {task.name!r}", remedy="give train and eval")
        where, rows = str(Path(folder) / name), read_rows(Path(folder) / name)
        found = tuple(_example(task, row, f"{where}:{line}") for line, row in rows)
        problem, remedy = "the file holds no example", "check that it is complete"
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
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in ENDINGS:
        raise StudyError(f"is none of {', '.join(ENDINGS)} (.gz)", where=str(path), remedy="rename or convert it")
    lines = _lines(path)
    return _json(path, lines) if suffix == ".jsonl" else _cells(path, lines, suffix == ".tsv")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if b"\0" in line:
                    raise StudyError("holds a NUL byte", where=f"{path}:{number}", remedy="save the file as UTF-8")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        where, remedy = f"{path}:{number}", "save the file as UTF-8"
        raise StudyError(f"is not in UTF-8 ({error.reason})", where=where, remedy=remedy) from None
    except (OSError, EOFError, zlib.error) as error:
        what = getattr(error, "strerror", None) or str(error)
        remedy = "it is cut off or damaged: get it again" if path.suffix == ".gz" else "check the path"
        if isinstance(error, FileNotFoundError):
            remedy = "check the path; --data names the folder that such files are below, or the hub"
        where = f"{path}:{number + 1}" if number else str(path)
        raise StudyError(f"cannot be read ({what})", where=where, remedy=remedy) from None


def _json(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Row]]:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=partial(_unique, where))
        except StudyError:
            raise
        except (ValueError, RecursionError) as error:
            remedy = "write one whole object a line"
            raise StudyError(f"invalid JSON: {error}", where=where, remedy=remedy) from None
        if not isinstance(row, dict):
            raise StudyError("expected a JSON object", where=where, remedy="write one object a line")
        yield number, row


def _unique(where: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    _once([name for name, _ in pairs], where)
    return dict(pairs)


def _once(names: Sequence[str], where: str) -> None:
    if (twice := repeated(names)) is not None:
        raise StudyError(f"two columns are called {twice!r}", where=where, remedy="rename or remove one")


def _cells(path: Path, lines: Iterator[tuple[int, str]], tabs: bool) -> Iterator[tuple[int, Row]]:
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader((line for _, line in lines), **style)
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not header:
                header = [cell.strip() for cell in cells]
                _once(header, where)
            elif len(cells) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            elif cells:
                problem = f"has {len(cells)} cells, the header {len(header)}"
                remedy = "each line needs as many tabs" if tabs else "quote cells that hold commas"
                raise StudyError(problem, where=where, remedy=remedy)
    except csv.Error as error:
        remedy = "quotes must be closed and lines end in \\n"
        raise StudyError(f"invalid CSV: {error}", where=f"{path}:{reader.line_num}", remedy=remedy) from None


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
