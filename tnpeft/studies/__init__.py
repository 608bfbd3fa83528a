"""STUDIES: tasks, backbones, protocol, training, sweeps, results, statistics, tables, figures."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Data": "tasks.data",
    "Engine": "running.pool",
    "Protocol": "protocol",
    "Run": "runs",
    "Scorer": "tasks.scoring",
    "Store": "runs",
    "Study": "study",
    "StudyError": "files",
    "TASKS": "tasks.task",
    "Task": "tasks.task",
    "report": "reports.reporting",
    "sweep": "running.sweeping",
    "task": "tasks.task",
    "train": "running.execution",
    "trial": "running.dry_run",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tnpeft.studies' has no attribute {name!r}")
    return getattr(import_module(f"tnpeft.studies.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
