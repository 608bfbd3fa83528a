"""The files and results of a sweep, for comparing one sweep with another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tnpeft.studies.files import merged
from tnpeft.studies.study import Study


def study_of(table: dict[str, Any], **over: Any) -> Study:
    """Return the study in a table, with other settings over it."""
    return Study.of(merged(table, over), Path("."))


def quietly(_: str) -> None:
    """Say nothing."""


def written(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def results(folder: Path) -> dict[str, Any]:
    """Return the results of the runs to the last bit, without times and machines."""
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {n: {k: v for k, v in r.items() if k not in ("timing", "finished", "machine")} for n, r in found.items()}
