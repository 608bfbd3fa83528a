"""STUDIES: tasks, backbones, protocol, training, sweeps, results, statistics, tables, figures."""

from __future__ import annotations

from tnpeft._lazy import lazy

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
__getattr__, __dir__ = lazy(__name__, _HOME)
