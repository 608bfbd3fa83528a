"""A study: families x sizes x policies x tasks x rates x backbones x seeds, read from one TOML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tnpeft.studies import backbones, methods
from tnpeft.studies.design import CONTRAST_KINDS, OURS, STUDY_KINDS, Cell, cells, full_name
from tnpeft.studies.files import StudyError, merged, read_toml
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.runs import Run, Store
from tnpeft.studies.schema import check, repeated
from tnpeft.studies.tasks.data import load
from tnpeft.studies.tasks.task import Task, task

Made = tuple[Run, Mapping[str, Any]]  # a run and its result


@dataclass(frozen=True)
class Study:
    """Everything that a sweep runs and a report shows.

    Rates (``learning_rates``) or steps relative to the base weight (``relative_steps``) are chosen with the tuning
    seeds on the tuning backbones, by dev loss; what is reported are the other seeds on the other backbones. A grid
    grows by up to ``extend`` values at each end until its best value is inside. A relative step is one rate for all
    factors (``rates = "one"``: the step over the :func:`tnpeft.gain` of the line), or gives each factor the rate of
    :func:`tnpeft.learning_rates` (``rates = "rule"``; ``"structure"`` and ``"measured"`` are its other rules).
    ``start = "rule"`` replaces published initial values by the variance rule.

    Attributes:
        table: the file's content, with what it extends.
        places: model, tokenizer, data and cache, as given or relative to the file.

    >>> study = Study.of({
    ...     "backbone": "digits:0", "tasks": ["digits_upright"], "seeds": [0],
    ...     "protocol": {"targets": ["q_proj"], "steps": 1, "train": 8, "dev": 8, "learning_rates": [1e-2]},
    ...     "methods": [{"family": "lora", "args": {"rank": 1}}],
    ... }, Path("."))
    >>> study.name, [its.name for its in study.tasks], study.protocol.steps
    ('study', ['digits_upright'], 1)
    """

    table: Mapping[str, Any]
    places: Mapping[str, str]

    @staticmethod
    def read(path: str | Path, **over: Any) -> Study:
        """The study in a TOML file; ``over`` replaces top-level keys such as ``data`` or ``backbone``.

        Raises:
            StudyError: a key is unknown or missing, or a value makes no sense; the message names it.
        """
        given = {key: value for key, value in over.items() if value}
        return Study.of(merged(read_toml(path), given), Path(path).parent, where=str(path), as_given=set(given))

    @staticmethod
    def of(table: Mapping[str, Any], base: Path, *, where: str = "study", as_given: set[str] = frozenset()) -> Study:  # type: ignore[assignment]
        """A study from a table; relative paths in it start from ``base``, except those ``as_given``."""
        table = dict(table)
        if "backbone" in as_given:  # asked for by the caller: the only one
            table = {key: value for key, value in table.items() if key not in ("backbones", "tune_backbones")}
        check(table, STUDY_KINDS, where)
        if "backbones" in table and not table.get("backbone"):
            table["backbone"] = next(iter(table["backbones"]), "")
        for key in ("backbone", "tasks", "seeds", "methods"):
            if not table.get(key):
                raise StudyError(f"no {key}", where=where, remedy=f"add {key}")
        for key in ("seeds", "tune_seeds", "backbones", "tune_backbones"):
            if repeated(table.get(key, ())) is not None:
                raise StudyError(
                    f"a {key[:-1].removeprefix('tune_')} stands twice", where=where, remedy="name each once"
                )
        places = {}
        for key, name in (("model", "backbone"), ("tokenizer", "tokenizer"), ("data", "data"), ("cache", "cache")):
            value = str(table.get(name, "runs/cache" if name == "cache" else ""))
            local = base / value
            places[key] = str(local) if value and name not in as_given and local.exists() else value
        places["data"] = places["data"] or str(base)  # files that a study names lie beside it
        study = Study(table, places)
        for cell in study.cells:
            study.chooser(cell)
        _ = study.contrasts  # every setting is checked before anything runs
        return study

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.table.get("name", "study"))

    @cached_property
    def protocol(self) -> Protocol:
        """The settings that all methods share."""
        return Protocol.of(_without(self.table.get("protocol", {}), *OURS))

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks."""
        given = (each if isinstance(each, str) else _without(each, "protocol") for each in self.table["tasks"])
        found = tuple(map(task, given))
        if twice := repeated([its.name for its in found]):
            raise StudyError(f"two tasks are called {twice!r}", where=self.name, remedy="name them apart")
        return found

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every method at every size under every policy, in the order of the file, for each task."""
        changed = [{} if isinstance(given, str) else given.get("protocol", {}) for given in self.table["tasks"]]
        tasks = zip(self.tasks, changed, strict=True)
        found = tuple(cells(self.table, tasks, self.name, self.places["model"], self.protocol.targets))
        if twice := repeated([cell.name for cell in found if cell.task == self.tasks[0]]):
            raise StudyError(f"two methods are called {twice!r}", where=self.name, remedy="label them apart")
        return found

    def find(self, text: str, task: Task) -> Cell:
        """Return the cell that a contrast or ``choose_on`` names: ``"CP"``, ``"CP (rank=2)"``, ``"P1: CP (rank=2)"``.

        Raises:
            StudyError: there is none, or several.
        """
        its = [cell for cell in self.cells if cell.task == task]
        found = [cell for cell in its if cell.called(text)]
        if len(found) != 1:
            names = ", ".join(cell.name for cell in found or its)
            problem = f"{'several cells are' if found else 'no cell is'} called {text!r}"
            raise StudyError(problem, where=self.name, remedy=f"name one of {names}")
        return found[0]

    def chooser(self, cell: Cell) -> Cell:
        """Return the cell whose search decides for this one."""
        if not cell.choose_on:
            return cell
        full = full_name(cell.policy, cell.choose_on)
        own = (its for its in self.cells if its.task == cell.task and its.called(full))
        return next(own, None) or self.find(cell.choose_on, cell.task)

    @cached_property
    def contrasts(self) -> tuple[dict[str, Any], ...]:
        """The declared comparisons: the cell ``plus`` minus the cell ``minus``, in a measure on a task."""
        found, tasks = [], {its.name: its for its in self.tasks}
        for given in self.table.get("contrast", ()):
            where = f"{self.name}, a contrast"
            check(given, CONTRAST_KINDS, self.name, "a contrast")
            for key in ("plus", "minus"):
                if key not in given:
                    raise StudyError(f"no {key}", where=where, remedy=f"add {key}, a method of the study")
            its = {"measure": "metric", "task": self.tasks[0].name, "margin": self.table.get("margin", 0.01), **given}
            if its["task"] not in tasks:
                raise StudyError(
                    f"no task is called {its['task']!r}", where=where, remedy="name one of the study's tasks"
                )
            its |= {side: self.find(given[side], tasks[its["task"]]).name for side in ("plus", "minus")}
            name = f"{given['plus']} minus {given['minus']}"
            found.append({"name": name, **its, "margin": float(its["margin"])})
        return tuple(found)

    # ---- runs

    @property
    def _reported(self) -> list[str]:
        return list(self.table.get("backbones") or [self.table["backbone"]])

    @property
    def replicates(self) -> tuple[tuple[str, int], ...]:
        """Backbone and seed of every reported run, seed by seed."""
        return tuple((name, seed) for seed in self.table["seeds"] for name in self._reported)

    @cached_property
    def backbones(self) -> tuple[str, ...]:
        """Every backbone, by the place where it is found: the reported ones, then those that only choose rates."""
        names = (*self._reported, *self.table.get("tune_backbones", ()))
        return tuple(dict.fromkeys(self._places(name)["model"] for name in names))

    def key(self, backbone: str, seed: int) -> str:
        """Return what a replicate is called in results: its seed, or with several backbones both."""
        return f"{backbone}/{seed}" if len(self._reported) > 1 else str(seed)

    def tuning(self, cell: Cell) -> tuple[tuple[str, int], ...]:
        """Backbone and seed of the runs that choose a cell's value: all that are reported if there is but one."""
        if len(cell.protocol.learning_rates) == 1:
            return self.replicates
        names = self.table.get("tune_backbones") or self._reported
        seeds = self.table.get("tune_seeds") or self.table["seeds"][: cell.protocol.tune_seeds]
        return tuple((name, seed) for seed in seeds for name in names)

    def run(self, cell: Cell, value: float, seed: int, backbone: str = "") -> Run:
        """Return the run of a cell at a rate or relative step, by default on the first backbone."""
        places = self._places(backbone)
        if cell.relative and cell.protocol.rate_rule == "rate":
            # Rounded, as it is part of the run's name: a sum over weights ends in other bits on other machines.
            value = float(f"{value * self.rate_of_step(cell, places['model']):.10g}")
        examples, its = load(cell.task, self.places["data"]).digest, _without(asdict(cell.task), "also")
        training = cell.protocol.training
        return Run(its, examples, cell.method, training, value, seed, self.identity(backbone), places)

    def _places(self, backbone: str) -> dict[str, str]:
        first = self.table["backbone"]
        return {**self.places, "model": backbone if backbone and backbone != first else self.places["model"]}

    def identity(self, backbone: str = "") -> str:
        """Return the hash that names a backbone (with a tokenizer of the study) in its runs."""
        model = self._places(backbone)["model"]
        if model not in self._identities:
            its = backbones.identity(model, Path(self.places["cache"]), self.places["tokenizer"])
            self._identities[model] = its
        return self._identities[model]

    @cached_property
    def _identities(self) -> dict[str, str]:
        return {}

    def rate_of_step(self, cell: Cell, model: str) -> float:
        """Return the learning rate of a first step of relative size 1, in the mean square over sites.

        Raises:
            StudyError: the method is not a network, or the backbone's weights cannot be read.
        """
        import tnpeft

        if not methods.is_network(cell.method):
            raise StudyError(f"{cell.name} has no gain", where=self.name, remedy="give it learning_rates")
        targets = list(cell.protocol.targets) or None
        gains = tnpeft.gain(methods.factorization(cell.method), model=backbones.shape(model), targets=targets)
        base = backbones.weight_rms(model, tuple(gains), Path(self.places["cache"]))
        squares = [(float(gains[proj]) / base[proj]) ** 2 for proj in gains]
        return 1 / math.sqrt(math.fsum(squares) / len(squares))

    def search(self, store: Store | None = None) -> list[Run]:
        """Return the runs that choose rates and steps, seed by seed; grids grow by what a store's results ask for."""
        found = [
            (place, self.run(cell, value, seed, backbone))
            for cell in self.cells
            if self.chooser(cell) == cell
            for value in self.grid(cell, store)[0]
            for place, (backbone, seed) in enumerate(self.tuning(cell))
        ]
        return [run for _, run in sorted(found, key=lambda pair: pair[0])]

    def grid(self, cell: Cell, store: Store | None = None) -> tuple[tuple[float, ...], float | None]:
        """Return a cell's rates or steps in order, with those that a best value at an end has added, and the best.

        The best has the least mean dev loss over the tuning runs (ties: the smaller), or the largest mean dev metric;
        it is None before all were tried.
        """
        values = tuple(sorted(cell.protocol.learning_rates))
        if len(values) == 1:
            return values, values[0]
        low, high, most = values[0] / values[1], values[-1] / values[-2], len(values) + self.table.get("extend", 0)
        while store is not None and len(tried := self.tried(cell, store, values)) == len(values):
            best = min(values, key=lambda value: (self._merit(tried[value]), value))
            if best not in (values[0], values[-1]) or len(values) >= most:
                return values, best
            values = (values[0] * low, *values) if best == values[0] else (*values, values[-1] * high)
        return values, None

    def tried(self, cell: Cell, store: Store, values: Sequence[float]) -> dict[float, list[Made]]:
        """Return the tuning runs with their results by rate or step, where every one of them has its result."""
        found = {}
        for value in values:
            runs = [self.run(cell, value, seed, backbone) for backbone, seed in self.tuning(cell)]
            results = [(run, result) for run in runs if (result := store.result(run.key))]
            if len(results) == len(runs):
                found[value] = results
        return found

    def _merit(self, tried: Sequence[Made]) -> float:
        by_metric = self.table.get("choose", "loss") == "metric"
        return sum(-result["dev"] if by_metric else dev_loss(result) for _, result in tried) / len(tried)

    def best_rate(self, cell: Cell, store: Store) -> float | None:
        """Return the rate or step that the search for a cell has chosen; None before it has ended."""
        return self.grid(self.chooser(cell), store)[1]

    def confirmation(self, store: Store) -> list[Run]:
        """Return the reported runs at the chosen rates and steps, seed by seed."""
        chosen = [(cell, self.best_rate(cell, store)) for cell in self.cells]
        return [
            self.run(cell, value, seed, backbone)
            for backbone, seed in self.replicates
            for cell, value in chosen
            if value is not None
        ]


def dev_loss(result: Mapping[str, Any]) -> float:
    """Return the dev loss of a record at the step that is reported; infinite if it is not finite.

    >>> dev_loss({"best_step": 4, "curve": [[2, 1.0, 0.5, 0.9], [4, 0.8, 0.6, 0.7]]})
    0.7
    """
    found = next((row[3] for row in result["curve"] if row[0] == result["best_step"]), None)
    return math.inf if found is None else float(found)


def _without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in keys}
