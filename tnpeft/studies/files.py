"""Files that are written whole or not at all, and names made from content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tnpeft._files import whole
from tnpeft.networks.errors import StudyError

_NUMBERS = re.compile(r"\[\n[\d\s,.eE+-]+\]")  # lists of numbers, which are written on one line


def canonical(value: Any) -> str:
    """``value`` as JSON with sorted keys and no spaces: equal values give equal text.

    >>> canonical({"b": 1, "a": (2, 3)})
    '{"a":[2,3],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 16) -> str:
    """The first ``length`` hex digits of the SHA-256 of ``value`` as canonical JSON.

    >>> digest({"a": 1}) == digest({"a": 1}), len(digest("x"))
    (True, 16)
    """
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def write_text(path: Path, text: str) -> Path:
    """``path``, after the text has been written to it, atomically; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    return path


def write_json(path: Path, value: Any) -> Path:
    """``path``, after ``value`` has been written to it as readable JSON, atomically.

    >>> import tempfile
    >>> write_json(Path(tempfile.mkdtemp()) / "a.json", {"b": 1}).read_text()
    '{\\n "b": 1\\n}\\n'
    """
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    return write_text(path, _NUMBERS.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", text) + "\n")


def folder_made_once(path: Path, fill: Callable[[Path], object]) -> str:
    """``path``, a folder that ``fill`` has filled as a whole, unless it was there or another process was first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            fill(work)
            with contextlib.suppress(OSError):
                os.replace(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return str(path)


def read_json(path: Path, remedy: str) -> dict[str, Any] | None:
    """Return the JSON object in a file, None without one; a file with a number that is not finite is damaged."""

    def refuse(text: str) -> Any:
        raise ValueError(text)

    try:
        found = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=refuse,
            parse_float=lambda text: x if math.isfinite(x := float(text)) else refuse(text),
        )
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise StudyError("is damaged", where=str(path), remedy=remedy)
    return found


def read_toml(path: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A TOML file; ``extends = "other.toml"`` names one (relative to it) whose tables it completes or overrides.

    ``seen`` are the files that extend it.
    """
    path = Path(path)
    if path.resolve() in seen:
        raise StudyError("the file extends itself", where=str(path), remedy="remove one of the extends lines")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"cannot be read ({error.strerror})", where=str(path), remedy="check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"invalid TOML: {error}", where=str(path)) from None
    base = found.pop("extends", None)
    return merged(read_toml(path.parent / base, (*seen, path.resolve())), found) if base else found


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``; tables are merged, everything else is replaced.

    >>> merged({"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"y": 3}, "b": [2]})
    {'a': {'x': 1, 'y': 3}, 'b': [2]}
    """
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out
