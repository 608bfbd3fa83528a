"""A study's results, gathered from its store into points: one method at one size on one task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from statistics import geometric_mean
from typing import Any

from tnpeft.studies import backbones, methods
from tnpeft.studies.design import Cell, full_name
from tnpeft.studies.runs import Store, finite
from tnpeft.studies.statistics import Summary, summary
from tnpeft.studies.study import Study, dev_loss


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
        search: the values that were tried for this method itself, each with its means over ``n`` tuning runs: rate
            ``lr`` (geometric: a relative step makes it different on every backbone), ``loss`` and ``score`` of dev;
            the loss is None if one run's is not finite.
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
    search: tuple[Mapping[str, Any], ...] = ()
    metric: str = "accuracy"

    @staticmethod
    def of(table: Mapping[str, Any]) -> Point:
        """The point in a report's JSON."""
        given = {"label" if key == "method" else key: value for key, value in table.items()}
        losses = {name: _number(value) for name, value in given.get("losses", {}).items()}
        return Point(**{**given, "losses": losses, "search": tuple(given.get("search", ()))})

    @property
    def table(self) -> dict[str, Any]:
        """The point as JSON has it, without what is empty; numbers that are not finite are null."""
        kept = ("size", "scores", "dev", "edge", "parameters", "head")
        table = {key: value for key, value in asdict(self).items() if value or key in kept}
        for name in ("scores", "dev", "losses"):
            if name in table:
                table[name] = {str(key): finite(value) for key, value in table[name].items()}
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


def grouped(points: Sequence[Point], *names: str) -> dict[Any, list[Point]]:
    """Return the points by attributes, such as the task, in the order of the first of each."""
    found: dict[Any, list[Point]] = {}
    for point in points:
        found.setdefault(attrgetter(*names)(point), []).append(point)
    return found


def span(counts: Sequence[int]) -> str:
    """Return counts as text.

    >>> span([3, 3]), span([5, 2])
    ('3', '2 to 5')
    """
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def collect(study: Study, store: Store) -> tuple[Point, ...]:
    """Every point with at least one result, in the order of the study."""
    return tuple(point for cell in study.cells if (point := _point(study, store, cell)))


def _point(study: Study, store: Store, cell: Cell) -> Point | None:
    chooser = study.chooser(cell)
    values, best = study.grid(chooser, store)
    if best is None:
        return None
    runs = {study.key(backbone, seed): study.run(cell, best, seed, backbone) for backbone, seed in study.replicates}
    results = {name: result for name, run in runs.items() if (result := store.result(run.key))}
    if not results:
        return None
    first = next(iter(results.values()))
    searched = study.tried(cell, store, values) if chooser == cell and len(values) > 1 else {}
    return Point(
        task=cell.task.name,
        label=cell.label,
        size=cell.size,
        policy=cell.policy,
        kind=next(kind for kind in methods.KINDS if kind in cell.method),
        parameters=first["parameters"],
        dof=methods.count(cell.method, backbones.shape(study.places["model"]), cell.protocol.targets, "dof"),
        head=first["head_parameters"],
        lr=_middle([runs[name].lr for name in results]),
        step=best if cell.relative else None,
        edge=len(values) > 1 and best in (values[0], values[-1]),
        scores={name: r["eval"] for name, r in results.items()},
        losses={name: _number(r["eval_loss"]) for name, r in results.items()},
        dev={name: r["dev"] for name, r in results.items()},
        also={
            metric: found
            for metric in cell.task.also
            if (found := {name: r["scores"][metric] for name, r in results.items() if metric in r["scores"]})
        },
        search=tuple(
            {
                "value": value,
                "lr": _middle([run.lr for run, _ in made]),
                "loss": finite(sum(dev_loss(result) for _, result in made) / len(made)),
                "score": sum(result["dev"] for _, result in made) / len(made),
                "n": len(made),
            }
            for value, made in searched.items()
        ),
        metric=cell.task.metric,
    )


def _middle(rates: Sequence[float]) -> float:
    """The geometric mean, exact where all are equal."""
    return rates[0] if len(set(rates)) == 1 else geometric_mean(rates)


def _number(value: float | None) -> float:
    return math.inf if value is None else value
