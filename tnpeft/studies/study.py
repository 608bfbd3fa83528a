"""A study: families x sizes x tasks x learning rates x seeds, read from one TOML file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tnpeft.studies import backbones, methods
from tnpeft.studies.data import load
from tnpeft.studies.files import StudyError, digest, merged, read_toml
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.runs import Run, Store
from tnpeft.studies.tasks import Task, task

_KEYS = ("name", "title", "source", "ours", "backbone", "tokenizer", "data", "cache", "tasks", "seeds")
_METHOD_KEYS = (*methods.KINDS, "label", "args", "change", "grid", "budgets", "learning_rates", "protocol")
_CALLED = {str: "text", int: "whole number", float | int: "number", Mapping: "table", object: "value"}
_CALLED |= {str | Mapping: "name or table"}
_KINDS = dict.fromkeys(("name", "title", "source", "backbone", "tokenizer", "data", "cache"), str) | {
    "ours": [str],
    "tasks": [str | Mapping],
    "seeds": [int],
    "protocol": Mapping,
    "methods": [Mapping],
}
_METHOD_KINDS = dict.fromkeys(("family", "line", "peft", "label"), str) | {
    "args": Mapping,
    "change": Mapping,
    "grid": Mapping,
    "budgets": [int],
    "learning_rates": [float | int],
    "protocol": Mapping,
}


@dataclass(frozen=True)
class Cell:
    """One method at one size: a point of the study's figures; ``own`` are the settings that it changes."""

    label: str
    size: str
    method: Mapping[str, Any]
    own: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """Everything that a sweep runs and a report shows.

    Attributes:
        table: the file's content, with what it extends.
        places: model, tokenizer, data and cache, as given or relative to the file.
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
        unknown = sorted(set(table) - {*_KEYS, "protocol", "methods"})
        if unknown:
            raise StudyError(
                f"unknown key {unknown[0]!r}",
                where=where,
                remedy=f"the keys are {', '.join(_KEYS)}, protocol, methods",
            )
        for key in ("backbone", "tasks", "seeds", "methods"):
            if not table.get(key):
                raise StudyError(f"no {key}", where=where, remedy=f"add {key}")
        _kinds(table, _KINDS, where)
        if len(set(table["seeds"])) < len(table["seeds"]):
            raise StudyError("a seed stands twice", where=where, remedy="name each once")
        places = {}
        for key, name in (("model", "backbone"), ("tokenizer", "tokenizer"), ("data", "data"), ("cache", "cache")):
            value = str(table.get(name, "runs/cache" if name == "cache" else ""))
            local = base / value
            places[key] = str(local) if value and name not in as_given and local.exists() else value
        places["data"] = places["data"] or str(base)  # files that a study names lie beside it
        study = Study(table, places)
        for cell, its in itertools.product(study.cells, study.tasks):
            study.terms(cell, its)  # every setting is checked before anything runs
        return study

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.table.get("name", "study"))

    @cached_property
    def protocol(self) -> Protocol:
        """The settings that all methods share."""
        return Protocol.of(self.table.get("protocol", {}))

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks."""
        found = tuple(task(_without(given, "protocol")) for given in self._tasks)
        names = [its.name for its in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise StudyError(f"two tasks are called {twice!r}", where=self.name, remedy="name them apart")
        return found

    @cached_property
    def _tasks(self) -> list[Mapping[str, Any]]:
        """The tasks as the file has them, with the settings that each changes under ``protocol``."""
        return [given if isinstance(given, Mapping) else {"name": given} for given in self.table["tasks"]]

    def terms(self, cell: Cell, its: Task) -> Protocol:
        """The settings of a cell on a task: the method's own before the task's before the study's."""
        of_task = self._tasks[[known.name for known in self.tasks].index(its.name)].get("protocol", {})
        return Protocol.of(merged(merged(self.table.get("protocol", {}), of_task), cell.own))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every method at every size, in the order of the file."""
        found = [cell for given in self.table["methods"] for cell in self._cells(given)]
        names = [(cell.label, cell.size) for cell in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise StudyError(
                f"two methods are called {' '.join(twice)!r}", where=self.name, remedy="label them apart"
            )
        return tuple(found)

    def _cells(self, given: Mapping[str, Any]) -> Iterator[Cell]:
        unknown = sorted(set(given) - set(_METHOD_KEYS))
        if unknown:
            keys = ", ".join(_METHOD_KEYS)
            raise StudyError(
                f"unknown key {unknown[0]!r} in a method", where=self.name, remedy=f"the keys are {keys}"
            )
        _kinds(given, _METHOD_KINDS, f"{self.name}, a method")
        grid = given.get("grid", {})
        _kinds(grid, {key: [object] for key in grid}, f"{self.name}, a grid")
        kind = next((kind for kind in methods.KINDS if kind in given), "")
        own = dict(given.get("protocol", {}))
        own |= {"learning_rates": list(map(float, given["learning_rates"]))} if "learning_rates" in given else {}
        name = given[kind] if isinstance(given.get(kind), str) and kind != "line" else kind
        for args in self._sizes(given):
            method = {key: given[key] for key in methods.KINDS if key in given}
            method |= {"args": {**given.get("args", {}), **args}} if args or "args" in given else {}
            method |= {"change": given["change"]} if "change" in given else {}
            methods.check(method)
            size = ", ".join(f"{key}={value}" for key, value in args.items())
            yield Cell(str(given.get("label", name)), size, method, own)

    def _sizes(self, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if "budgets" in given:
            from tnpeft.studies.matching import ranks_for

            fixed = given.get("args", {})
            yield from ranks_for(
                given["family"], fixed, given["budgets"], backbones.shape(self.places["model"]), self.protocol.targets
            )
        elif "grid" in given:
            names = list(given["grid"])
            for values in itertools.product(*given["grid"].values()):
                yield dict(zip(names, values, strict=True))
        else:
            yield {}

    # ---- runs

    def run(self, cell: Cell, task: Task, lr: float, seed: int) -> Run:
        """The run of a cell on a task."""
        table = {key: value for key, value in asdict(task).items() if key not in ("train", "eval", "hub", "also")}
        files = {key: getattr(task, key) for key in ("train", "eval", "hub")}
        return Run(
            {**table, **files},
            load(task, self.places["data"]).digest,
            cell.method,
            self.terms(cell, task).training,
            lr,
            seed,
            self._backbone,
            self.places,
        )

    @cached_property
    def _backbone(self) -> str:
        words = self.places["tokenizer"]
        cache = Path(self.places["cache"])
        its = backbones.identity(self.places["model"], cache)
        return digest([its, backbones.identity(words, cache, weights=False)]) if words else its

    def seeds_to_tune(self, cell: Cell, task: Task) -> tuple[int, ...]:
        """The seeds that sweep the grid of learning rates: all of them if there is but one rate."""
        seeds, terms = tuple(self.table["seeds"]), self.terms(cell, task)
        return seeds if len(terms.learning_rates) == 1 else seeds[: terms.tune_seeds]

    def search(self) -> list[Run]:
        """The runs that choose the learning rates, seed by seed."""
        found = [
            (place, self.run(cell, task, lr, seed))
            for cell in self.cells
            for task in self.tasks
            for lr in self.terms(cell, task).learning_rates
            for place, seed in enumerate(self.seeds_to_tune(cell, task))
        ]
        return [run for _, run in sorted(found, key=lambda pair: pair[0])]

    def best_rate(self, cell: Cell, task: Task, store: Store) -> float | None:
        """The rate with the best mean dev score over the tuning seeds (ties: the smaller), or the only one there is;
        None before the search."""
        rates = self.terms(cell, task).learning_rates
        if len(rates) == 1:
            return rates[0]
        scores = []
        for lr in sorted(rates):
            results = [store.result(self.run(cell, task, lr, seed).key) for seed in self.seeds_to_tune(cell, task)]
            if all(results):
                scores.append((sum(r["dev"] for r in results if r) / len(results), -lr))
        return -max(scores)[1] if scores else None

    def confirmation(self, store: Store) -> list[Run]:
        """The runs of all seeds at the chosen rates, seed by seed."""
        return [
            self.run(cell, task, lr, seed)
            for seed in self.table["seeds"]
            for cell in self.cells
            for task in self.tasks
            if (lr := self.best_rate(cell, task, store)) is not None
        ]


def _kinds(table: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    """Refuse values of the wrong kind; ``[int]`` is a list of whole numbers."""
    for key, value in table.items():
        kind = kinds.get(key, object)
        fits = isinstance(value, list | tuple) if isinstance(kind, list) else isinstance(value, kind)
        if not fits or (isinstance(kind, list) and not all(isinstance(item, kind[0]) for item in value)):
            called = f"list of {_CALLED[kind[0]]}s" if isinstance(kind, list) else _CALLED[kind]
            raise StudyError(f"{key} = {value!r} is no {called}", where=where, remedy=f"give a {called}")


def _without(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}
