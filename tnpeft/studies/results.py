"""A study's results, gathered from its store into points: one method at one size on one task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tnpeft.studies.runs import Store
from tnpeft.studies.statistics import Summary, summary
from tnpeft.studies.study import Cell, Study
from tnpeft.studies.tasks import Task


@dataclass(frozen=True)
class Point:
    """A method at one size on one task.

    Attributes:
        task, label, size: what was run.
        kind: family, line, peft, full or none.
        parameters: of the adapter, without a head.
        head: parameters of a new head.
        lr: the learning rate chosen on dev.
        edge: the chosen rate is the smallest or largest of several, so a wider grid might do better.
        scores: eval score by seed at that rate.
        dev: dev score by seed.
        also: eval scores by seed of further metrics that the task names.
    """

    task: str
    label: str
    size: str
    kind: str
    parameters: int
    head: int
    lr: float
    edge: bool
    scores: dict[int, float]
    dev: dict[int, float]
    also: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @staticmethod
    def of(table: Mapping[str, Any]) -> Point:
        """The point in a report's JSON."""
        rest = {key: table[key] for key in ("task", "size", "kind", "parameters", "head", "lr", "edge")}
        also = {name: _by_seed(scores) for name, scores in table.get("also", {}).items()}
        by_seed = {"scores": _by_seed(table["scores"]), "dev": _by_seed(table["dev"]), "also": also}
        return Point(label=table["method"], **by_seed, **rest)

    @property
    def table(self) -> dict[str, Any]:
        """The point as JSON has it; further metrics are there if there are some."""
        table = {key: value for key, value in asdict(self).items() if value or key != "also"}
        return {"task": table.pop("task"), "method": table.pop("label"), **table}

    @property
    def name(self) -> str:
        """Label and size."""
        return f"{self.label} ({self.size})" if self.size else self.label

    @property
    def summary(self) -> Summary:
        """Of the eval scores."""
        return summary(self.scores)


def collect(study: Study, store: Store) -> tuple[Point, ...]:
    """Every point with at least one result, in the order of the study."""
    found = (_point(study, store, cell, task) for task in study.tasks for cell in study.cells)
    return tuple(point for point in found if point)


def _point(study: Study, store: Store, cell: Cell, task: Task) -> Point | None:
    lr = study.best_rate(cell, task, store)
    if lr is None:
        return None
    seeds = study.table["seeds"]
    results: dict[int, dict[str, Any]] = {
        seed: result for seed in seeds if (result := store.result(study.run(cell, task, lr, seed).key))
    }
    if not results:
        return None
    first = next(iter(results.values()))
    rates = sorted(study.terms(cell, task).learning_rates)
    return Point(
        task=task.name,
        label=cell.label,
        size=cell.size,
        kind=next(iter(cell.method)),
        parameters=first["parameters"],
        head=first["head_parameters"],
        lr=lr,
        edge=len(rates) > 1 and lr in (rates[0], rates[-1]),
        scores={seed: r["eval"] for seed, r in results.items()},
        dev={seed: r["dev"] for seed, r in results.items()},
        also={name: found for name in task.also if (found := _of_metric(results, name))},
    )


def _by_seed(table: Mapping[str, float]) -> dict[int, float]:
    return {int(seed): value for seed, value in table.items()}


def _of_metric(results: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    return {seed: r["scores"][name] for seed, r in results.items() if name in r.get("scores", {})}


def failures(study: Study, store: Store) -> list[tuple[str, str]]:
    """Runs of the study that failed, with their causes."""
    runs = {run.key: run for run in (*study.search(), *study.confirmation(store))}
    records = ((str(run), store.failure(key)) for key, run in runs.items() if not store.result(key))
    return [(name, record["cause"]) for name, record in records if record]


def nearest(points: Sequence[Point], parameters: int, slack: float = 0.1) -> Point | None:
    """The point whose parameter count is nearest, if it is within ``slack`` of it."""
    found = min(points, key=lambda p: abs(p.parameters - parameters), default=None)
    return found if found and abs(found.parameters - parameters) <= slack * parameters else None
