"""Rows of files and of the hub, each with the place that an error names."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tnpeft.studies.files import StudyError

Row = Mapping[str, Any]
ENDINGS = (".jsonl", ".csv", ".tsv")


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line numbers and rows of a ``.jsonl``, ``.csv`` or ``.tsv`` file (tabs, no quotes), plain or with ``.gz``.

    Raises:
        StudyError: the file is missing or of another kind, or a line cannot be read; the message names file and line.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "two.csv"
    >>> _ = path.write_text("text,label\\nfine,1\\n")
    >>> list(read_rows(path))
    [(2, {'text': 'fine', 'label': '1'})]
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
        raise StudyError(
            f"is not in UTF-8 ({error.reason})", where=f"{path}:{number}", remedy="save the file as UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        what = getattr(error, "strerror", None) or str(error)
        where = f"{path}:{number + 1}" if number else str(path)
        raise StudyError(f"cannot be read ({what})", where=where, remedy=_remedy(path, error)) from None


def _remedy(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "check the path; --data names the folder that such files are below, or the hub"
    return "it is cut off or damaged: get it again" if path.suffix == ".gz" else "check the path"


def _json(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Row]]:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=lambda pairs, where=where: _unique(pairs, where))
        except (ValueError, RecursionError) as error:
            if isinstance(error, StudyError):
                raise
            remedy = "write one whole object a line"
            raise StudyError(f"invalid JSON: {error}", where=where, remedy=remedy) from None
        if not isinstance(row, dict):
            raise StudyError("expected a JSON object", where=where, remedy="write one object a line")
        yield number, row


def _unique(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    _once([name for name, _ in pairs], where)
    return dict(pairs)


def _once(names: Sequence[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
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
    """Numbers and rows of a split of a data set on the Hugging Face hub, or of a folder that is laid out like one.

    Raises:
        StudyError: it cannot be had: its name is wrong, or the hub is out of reach and not in the cache.
    """
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
