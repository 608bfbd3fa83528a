"""The cells of a study: what its file says of methods, sizes, policies and grids, read and checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tnpeft.counting.budgets import BY
from tnpeft.studies import backbones, methods
from tnpeft.studies.files import merged
from tnpeft.studies.schema import check, check_choices

_TEXTS = ("name", "title", "source", "backbone", "tokenizer", "data", "cache", "choose")
_GRIDS = ("learning_rates", "relative_steps")
_RULES = ("start", "rates")
OURS = ("relative_steps", *_RULES)  # settings of a study that a run has in another form
CHOICES = {
    "choose": ("loss", "metric"),
    "match": BY,
    "start": ("published", "rule"),
    "measure": ("metric", "loss"),
    "rates": ("one", "rule", "structure", "measured"),
}
STUDY_KINDS = dict.fromkeys(_TEXTS, str) | {
    "ours": [str],
    "controls": [str],
    "backbones": [str],
    "tune_backbones": [str],
    "tasks": [str | Mapping],
    "seeds": [int],
    "tune_seeds": [int],
    "extend": int,
    "margin": float | int,
    "protocol": Mapping,
    "policies": [Mapping],
    "methods": [Mapping],
    "contrast": [Mapping],
}
_SETTINGS = {key: [float | int] for key in _GRIDS} | dict.fromkeys(_RULES, str)
_SETTINGS |= {"protocol": Mapping, "choose_on": str}
_POLICY_KINDS = {**_SETTINGS, "label": str, "precondition": bool, "methods": [str]}
_METHOD_KINDS = dict.fromkeys(("family", "line", "peft", "label", "match"), str) | {
    **_SETTINGS,
    **dict.fromkeys(("full", "none"), object),
    "args": Mapping,
    "change": Mapping,
    "grid": Mapping,
    "budgets": [int],
}
CONTRAST_KINDS = {"name": str, "plus": str, "minus": str, "measure": str, "margin": float | int, "task": str}


@dataclass(frozen=True)
class Cell:
    """One method at one size under one policy: a point of the study's figures.

    Attributes:
        label, size, policy: what it is called; the policy is empty where a study has none.
        method: what is trained.
        own: settings that it changes, with its grid.
        choose_on: the method whose best rate or step it takes; empty: its own.
    """

    label: str
    size: str
    method: Mapping[str, Any]
    own: Mapping[str, Any]
    policy: str = ""
    choose_on: str = ""

    @property
    def name(self) -> str:
        """Policy, label and size."""
        size = f" ({self.size})" if self.size else ""
        return f"{self.policy}{': ' if self.policy else ''}{self.label}{size}"

    def called(self, text: str) -> bool:
        """True if a contrast that says ``text`` may mean this cell."""
        lead = f"{self.policy}: " if self.policy else ""
        return text in (self.name, f"{lead}{self.label}")


@dataclass(frozen=True)
class Contrast:
    """A comparison that a study declares before it is run: ``plus`` minus ``minus`` in a measure on a task."""

    name: str
    plus: Cell
    minus: Cell
    measure: str
    margin: float
    task: str


def cells(table: Mapping[str, Any], where: str, model: str, targets: tuple[str, ...]) -> Iterator[Cell]:
    """Yield every method at every size under every policy, in the order of the file.

    Args:
        table: the study's content.
        where: the study's name, for errors.
        model: the backbone on which budgets are counted.
        targets: projections that get an adapter.

    Raises:
        StudyError: a key is unknown, or a value makes no sense.
    """
    policies = table.get("policies", [{}])
    for policy in policies:
        known(policy, _POLICY_KINDS, where, "a policy")
    for policy, given in itertools.product(policies, table["methods"]):
        yield from _cells(given, policy, where, model, targets)


def _cells(
    given: Mapping[str, Any], policy: Mapping[str, Any], where: str, model: str, targets: tuple[str, ...]
) -> Iterator[Cell]:
    known(given, _METHOD_KINDS, where, "a method")
    grid = given.get("grid", {})
    check(grid, {key: [object] for key in grid}, where, "a grid")
    kind = next((kind for kind in methods.KINDS if kind in given), "")
    name = given[kind] if isinstance(given.get(kind), str) and kind != "line" else kind
    label = str(given.get("label", name))
    wanted = policy.get("methods")
    own: dict[str, Any] = {"precondition": True} if policy.get("precondition") else {}
    for its in (policy, given):
        own = over(own, {**its.get("protocol", {}), **{k: its[k] for k in (*_GRIDS, *_RULES) if k in its}})
    chosen = str(given.get("choose_on", policy.get("choose_on", "")))
    targets = tuple(given.get("protocol", {}).get("targets", targets))
    for args, change in _sizes(given, model, targets):
        method = {key: given[key] for key in methods.KINDS if key in given}
        method |= {"args": {**given.get("args", {}), **args}} if args or "args" in given else {}
        changed = {**given.get("change", {}), **({"ranks": change} if change else {})}
        method |= {"change": changed} if changed else {}
        methods.check(method)
        if own.get("start") == "rule" and ("family" in method or "line" in method):
            method = methods.by_rule(method)
        size = ", ".join(f"{key}={value}" for key, value in args.items())
        if wanted is None or label in wanted or f"{label} ({size})" in wanted:
            yield Cell(label, size, method, own, str(policy.get("label", "")), chosen)


def _sizes(
    given: Mapping[str, Any], model: str, targets: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """Arguments of each size, and the ranks that they do not reach."""
    if "budgets" in given:
        by = str(given.get("match", "parameters"))
        yield from methods.matched(given, given["budgets"], backbones.shape(model), targets, by)
    elif "grid" in given:
        names = list(given["grid"])
        for values in itertools.product(*given["grid"].values()):
            yield dict(zip(names, values, strict=True)), {}
    else:
        yield {}, {}


def over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them; a grid of either kind replaces one of the other."""
    kept = {k: v for k, v in base.items() if k not in _GRIDS} if any(key in own for key in _GRIDS) else base
    return merged(kept, own)


def known(table: Mapping[str, Any], kinds: Mapping[str, Any], where: str, part: str = "") -> None:
    """Refuse unknown keys, values of the wrong kind, and a choice that there is not."""
    check(table, kinds, where, part)
    check_choices(table, CHOICES, where)
