"""A study: families x sizes x policies x tasks x rates x backbones x seeds, read from one TOML file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tnpeft.studies import backbones, methods
from tnpeft.studies.design import CONTRAST_KINDS, OURS, STUDY_KINDS, Cell, Contrast, cells, over
from tnpeft.studies.files import StudyError, digest, merged, read_toml
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.runs import Run, Store
from tnpeft.studies.schema import check, repeated
from tnpeft.studies.tasks.data import load
from tnpeft.studies.tasks.task import Task, task


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
        for cell, its in itertools.product(study.cells, study.tasks):
            study.terms(cell, its)  # every setting is checked before anything runs
            study.chooser(cell)
        _ = study.contrasts
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
        found = tuple(task(_without(given, "protocol")) for given in self._tasks)
        if twice := repeated([its.name for its in found]):
            raise StudyError(f"two tasks are called {twice!r}", where=self.name, remedy="name them apart")
        return found

    @cached_property
    def _tasks(self) -> list[Mapping[str, Any]]:
        """The tasks as the file has them, with the settings that each changes under ``protocol``."""
        return [given if isinstance(given, Mapping) else {"name": given} for given in self.table["tasks"]]

    def terms(self, cell: Cell, its: Task) -> Protocol:
        """The settings of a cell on a task: the method's own before the policy's, the task's and the study's.

        A grid of relative steps stands under ``learning_rates``.
        """
        given = self._settings(cell, its)
        settings, rates = _without(given, *OURS), given.get("rates", "one")
        if "relative_steps" in given:
            settings["learning_rates"] = list(map(float, given["relative_steps"]))
            if rates != "one":
                settings["rate_rule"] = "relative_step" if rates == "rule" else rates
        return Protocol.of(settings)

    def _settings(self, cell: Cell, its: Task) -> dict[str, Any]:
        of_task = self._tasks[self.tasks.index(its)].get("protocol", {})
        settings = over(over(self.table.get("protocol", {}), of_task), cell.own)
        check({key: settings[key] for key in OURS if key in settings}, OURS, self.name)
        return settings

    def relative(self, cell: Cell, its: Task) -> bool:
        """True if a cell's grid holds relative steps."""
        return "relative_steps" in self._settings(cell, its)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every method at every size under every policy, in the order of the file."""
        found = tuple(cells(self.table, self.name, self.places["model"], self.protocol.targets))
        if twice := repeated([cell.name for cell in found]):
            raise StudyError(f"two methods are called {twice!r}", where=self.name, remedy="label them apart")
        return found

    def find(self, text: str) -> Cell:
        """Return the cell that a contrast or ``choose_on`` names: ``"CP"``, ``"CP (rank=2)"``, ``"P1: CP (rank=2)"``.

        Raises:
            StudyError: there is none, or several.
        """
        found = [cell for cell in self.cells if cell.called(text)]
        if len(found) != 1:
            names = ", ".join(cell.name for cell in found or self.cells)
            problem = f"{'several cells are' if found else 'no cell is'} called {text!r}"
            raise StudyError(problem, where=self.name, remedy=f"name one of {names}")
        return found[0]

    def chooser(self, cell: Cell) -> Cell:
        """Return the cell whose search decides for this one."""
        if not cell.choose_on:
            return cell
        full = f"{cell.policy}: {cell.choose_on}" if cell.policy else cell.choose_on
        return next((its for its in self.cells if its.called(full)), None) or self.find(cell.choose_on)

    @cached_property
    def contrasts(self) -> tuple[Contrast, ...]:
        """The declared comparisons."""
        found, tasks = [], [its.name for its in self.tasks]
        for given in self.table.get("contrast", ()):
            where = f"{self.name}, a contrast"
            check(given, CONTRAST_KINDS, self.name, "a contrast")
            for key in ("plus", "minus"):
                if key not in given:
                    raise StudyError(f"no {key}", where=where, remedy=f"add {key}, a method of the study")
            its = {"measure": "metric", "task": tasks[0], "margin": self.table.get("margin", 0.01), **given}
            if its["task"] not in tasks:
                raise StudyError(
                    f"no task is called {its['task']!r}", where=where, remedy="name one of the study's tasks"
                )
            name = its.get("name", f"{given['plus']} minus {given['minus']}")
            plus, minus = (self.find(given[side]).name for side in ("plus", "minus"))
            found.append(Contrast(name, plus, minus, its["measure"], float(its["margin"]), its["task"]))
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

    def tuning(self, cell: Cell, task: Task) -> tuple[tuple[str, int], ...]:
        """Backbone and seed of the runs that choose a cell's value: all that are reported if there is but one."""
        terms = self.terms(cell, task)
        if len(terms.learning_rates) == 1:
            return self.replicates
        names = self.table.get("tune_backbones") or self._reported
        seeds = self.table.get("tune_seeds") or self.table["seeds"][: terms.tune_seeds]
        return tuple((name, seed) for seed in seeds for name in names)

    def run(self, cell: Cell, task: Task, value: float, seed: int, backbone: str = "") -> Run:
        """Return the run of a cell on a task at a rate or relative step, by default on the first backbone."""
        places, terms = self._places(backbone), self.terms(cell, task)
        if self.relative(cell, task) and terms.rate_rule == "rate":
            # Rounded, as it is part of the run's name: a sum over weights ends in other bits on other machines.
            value = float(f"{value * self.rate_of_step(cell, task, places['model']):.10g}")
        examples = load(task, self.places["data"]).digest
        its = _without(asdict(task), "also")
        return Run(its, examples, cell.method, terms.training, value, seed, self.identity(backbone), places)

    def _places(self, backbone: str) -> dict[str, str]:
        first = self.table["backbone"]
        return {**self.places, "model": backbone if backbone and backbone != first else self.places["model"]}

    def identity(self, backbone: str = "") -> str:
        """Return the hash that names a backbone (with a tokenizer of the study) in its runs."""
        model, words, cache = self._places(backbone)["model"], self.places["tokenizer"], Path(self.places["cache"])
        if model not in self._identities:
            its = backbones.identity(model, cache)
            self._identities[model] = digest([its, backbones.identity(words, cache, weights=False)]) if words else its
        return self._identities[model]

    @cached_property
    def _identities(self) -> dict[str, str]:
        return {}

    def rate_of_step(self, cell: Cell, task: Task, model: str) -> float:
        """Return the learning rate of a first step of relative size 1, in the mean square over sites.

        Raises:
            StudyError: the method is not a network, or the backbone's weights cannot be read.
        """
        import tnpeft

        if not methods.is_network(cell.method):
            raise StudyError(f"{cell.name} has no gain", where=self.name, remedy="give it learning_rates")
        targets = self.terms(cell, task).targets
        f = methods.factorization(cell.method)
        gains = tnpeft.gain(f, model=backbones.shape(model), targets=list(targets) or None)
        base = backbones.weight_rms(model, tuple(gains), Path(self.places["cache"]))
        squares = [(float(gains[proj]) / base[proj]) ** 2 for proj in gains]
        return 1 / math.sqrt(math.fsum(squares) / len(squares))

    def search(self, store: Store | None = None) -> list[Run]:
        """Return the runs that choose rates and steps, seed by seed; grids grow by what a store's results ask for."""
        found = [
            (place, self.run(cell, task, value, seed, backbone))
            for cell in self.cells
            for task in self.tasks
            if self.chooser(cell) == cell
            for value in self.grid(cell, task, store)
            for place, (backbone, seed) in enumerate(self.tuning(cell, task))
        ]
        return [run for _, run in sorted(found, key=lambda pair: pair[0])]

    def grid(self, cell: Cell, task: Task, store: Store | None = None) -> tuple[float, ...]:
        """Return a cell's rates or steps in order, with those that a best value at an end has added."""
        values = tuple(sorted(self.terms(cell, task).learning_rates))
        if store is None or len(values) < 2:
            return values
        low, high, most = values[0] / values[1], values[-1] / values[-2], len(values) + self.table.get("extend", 0)
        while len(values) < most:
            best = self._best(cell, task, store, values)
            if best not in (values[0], values[-1]):
                break
            values = (values[0] * low, *values) if best == values[0] else (*values, values[-1] * high)
        return values

    def tried(
        self, cell: Cell, task: Task, store: Store, values: Sequence[float]
    ) -> dict[float, list[tuple[Run, Mapping[str, Any]]]]:
        """Return the tuning runs with their results by rate or step, where every one of them has its result."""
        found = {}
        for value in values:
            runs = [self.run(cell, task, value, seed, backbone) for backbone, seed in self.tuning(cell, task)]
            results = [(run, result) for run in runs if (result := store.result(run.key))]
            if len(results) == len(runs):
                found[value] = results
        return found

    def _best(self, cell: Cell, task: Task, store: Store, values: Sequence[float]) -> float | None:
        """The value with the least mean dev loss, or the largest mean dev metric; None before all were tried."""
        tried = self.tried(cell, task, store, values)
        if len(tried) < len(values):
            return None
        by_metric = self.table.get("choose", "loss") == "metric"

        def merit(value: float) -> tuple[float, float]:
            merits = [-result["dev"] if by_metric else dev_loss(result) for _, result in tried[value]]
            return sum(merits) / len(merits), value

        return min(values, key=merit)

    def best_rate(self, cell: Cell, task: Task, store: Store) -> float | None:
        """Return the rate or step with the least mean dev loss over the tuning runs (ties: the smaller), or the only
        one there is; None before the search has ended."""
        cell = self.chooser(cell)
        values = self.grid(cell, task, store)
        return values[0] if len(values) == 1 else self._best(cell, task, store, values)

    def confirmation(self, store: Store) -> list[Run]:
        """Return the reported runs at the chosen rates and steps, seed by seed."""
        chosen = {(c.name, t.name): self.best_rate(c, t, store) for c in self.cells for t in self.tasks}
        return [
            self.run(cell, task, value, seed, backbone)
            for backbone, seed in self.replicates
            for cell in self.cells
            for task in self.tasks
            if (value := chosen[cell.name, task.name]) is not None
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
