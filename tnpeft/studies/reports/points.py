"""A study's results, gathered from its store into points: one method at one size on one task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from typing import Any

from tnpeft.studies import backbones, methods
from tnpeft.studies.design import Cell, full_name
from tnpeft.studies.runs import Run, Store, finite
from tnpeft.studies.statistics import Summary, summary
from tnpeft.studies.study import Study, dev_loss
from tnpeft.studies.tasks.task import Task


@dataclass(frozen=True)
class Tried:
    """One value of a search: what it was, and the means over the tuning runs.

    Attributes:
        value: the rate or relative step.
        lr: the learning rate, which a relative step makes different on every backbone: their geometric mean.
        loss, score: of dev; the loss is infinite if one run's is not finite.
        n: tuning runs.
    """

    value: float
    lr: float
    loss: float
    score: float
    n: int


@dataclass(frozen=True)
class Point:
    """A method at one size under one policy on one task.

    A replicate is a seed, or with several backbones a backbone and a seed, ``"digits:3/0"``.

    Attributes:
        task, label, size, policy: what was run.
        kind: family, line, peft, full or none.
        parameters: of the adapter, without a head.
        dof: parameters modulo gauge; None where no formula gives them.
        head: parameters of a new head.
        lr: the learning rate chosen on dev, or the geometric mean of those that a relative step gives.
        step: the relative step, if that was chosen.
        edge: the chosen value is the smallest or largest of several, so a wider grid might do better.
        scores, losses: on eval, by replicate.
        dev: dev score by replicate.
        also: eval scores by replicate of further metrics that the task names.
        search: the values that were tried for this method itself.
        metric: of the scores.
    """

    task: str
    label: str
    size: str
    kind: str
    parameters: int
    head: int
    lr: float
    edge: bool
    scores: Mapping[Any, float]
    dev: Mapping[Any, float]
    also: Mapping[str, Mapping[Any, float]] = field(default_factory=dict)
    losses: Mapping[Any, float] = field(default_factory=dict)
    policy: str = ""
    dof: int | None = None
    step: float | None = None
    search: tuple[Tried, ...] = ()
    metric: str = "accuracy"

    @staticmethod
    def of(table: Mapping[str, Any]) -> Point:
        """The point in a report's JSON."""
        given = {"label" if key == "method" else key: value for key, value in table.items()}
        tried = tuple(Tried(**{**its, "loss": _number(its["loss"])}) for its in given.pop("search", ()))
        losses = {name: _number(value) for name, value in given.pop("losses", {}).items()}
        return Point(**given, losses=losses, search=tried)

    @property
    def table(self) -> dict[str, Any]:
        """The point as JSON has it, without what is empty; numbers that are not finite are null."""
        kept = ("size", "scores", "dev", "edge", "parameters", "head")
        table = {key: value for key, value in asdict(self).items() if value or key in kept}
        for name in ("scores", "dev", "losses"):
            if name in table:
                table[name] = {str(key): finite(value) for key, value in table[name].items()}
        if self.search:
            table["search"] = [{**its, "loss": finite(its["loss"])} for its in table["search"]]
        return {"task": table.pop("task"), "method": table.pop("label"), **table}

    @property
    def name(self) -> str:
        """Policy, label and size."""
        return full_name(self.policy, self.label, self.size)

    @property
    def summary(self) -> Summary:
        """Of the eval scores."""
        return summary(self.scores)


def on_backbones(points: Sequence[Point]) -> bool:
    """Return True if replicates are named by a backbone and a seed."""
    return any("/" in str(key) for p in points for key in p.scores)


def span(counts: Sequence[int]) -> str:
    """Return counts as text.

    >>> span([3, 3]), span([5, 2])
    ('3', '2 to 5')
    """
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def collect(study: Study, store: Store) -> tuple[Point, ...]:
    """Every point with at least one result, in the order of the study."""
    found = (_point(study, store, cell, task) for task in study.tasks for cell in study.cells)
    return tuple(point for point in found if point)


def _point(study: Study, store: Store, cell: Cell, task: Task) -> Point | None:
    value = study.best_rate(cell, task, store)
    if value is None:
        return None
    runs = {
        study.key(backbone, seed): study.run(cell, task, value, seed, backbone) for backbone, seed in study.replicates
    }
    results = {name: result for name, run in runs.items() if (result := store.result(run.key))}
    if not results:
        return None
    first, chooser = next(iter(results.values())), study.chooser(cell)
    values = study.grid(chooser, task, store)
    searched = study.tried(cell, task, store, values) if chooser == cell and len(values) > 1 else {}
    return Point(
        task=task.name,
        label=cell.label,
        size=cell.size,
        policy=cell.policy,
        kind=next(kind for kind in methods.KINDS if kind in cell.method),
        parameters=first["parameters"],
        dof=methods.dof(cell.method, backbones.shape(study.places["model"]), study.terms(cell, task).targets),
        head=first["head_parameters"],
        lr=_middle([runs[name].lr for name in results]),
        step=value if study.relative(cell, task) else None,
        edge=len(values) > 1 and value in (values[0], values[-1]),
        scores={name: r["eval"] for name, r in results.items()},
        losses={name: _number(r["eval_loss"]) for name, r in results.items()},
        dev={name: r["dev"] for name, r in results.items()},
        also={
            metric: found
            for metric in task.also
            if (found := {name: r["scores"][metric] for name, r in results.items() if metric in r["scores"]})
        },
        search=tuple(_tried(value, its) for value, its in searched.items()),
        metric=task.metric,
    )


def _tried(value: float, its: Sequence[tuple[Run, Mapping[str, Any]]]) -> Tried:
    loss, score = (sum(of(result) for _, result in its) / len(its) for of in (dev_loss, itemgetter("dev")))
    return Tried(value, _middle([run.lr for run, _ in its]), loss, score, len(its))


def _middle(rates: Sequence[float]) -> float:
    """The geometric mean, exact where all are equal."""
    return rates[0] if len(set(rates)) == 1 else math.exp(math.fsum(map(math.log, rates)) / len(rates))


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def failures(study: Study, store: Store) -> list[tuple[str, str]]:
    """Runs of the study that failed, with their causes."""
    runs = {run.key: run for run in (*study.search(store), *study.confirmation(store))}
    records = ((str(run), store.failure(key)) for key, run in runs.items() if not store.result(key))
    return [(name, record["cause"]) for name, record in records if record]
