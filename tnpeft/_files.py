"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write; at the end it becomes ``path``. A reader sees the old file or the new one.

    >>> import tempfile
    >>> goal = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with whole(goal) as part:
    ...     _ = part.write_text("done")
    >>> [file.name for file in goal.parent.iterdir()]
    ['note.txt']
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("r+b") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a matplotlib figure in the format of the file's ending, PNG without one.

    >>> import tempfile
    >>> from matplotlib.figure import Figure
    >>> goal = Path(tempfile.mkdtemp()) / "empty.svg"
    >>> save_figure(Figure(), goal)
    >>> [file.name for file in goal.parent.iterdir()]
    ['empty.svg']
    """
    image = BytesIO()
    figure.savefig(image, format=path.suffix.lower()[1:] or "png", **options)
    with whole(path) as part:
        part.write_bytes(image.getvalue())
