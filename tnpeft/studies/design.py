"""The cells of a study: what its file says of methods, sizes, policies and grids, read and checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tnpeft.counting.budgets import BY
from tnpeft.studies import backbones, methods
from tnpeft.studies.files import merged
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.schema import NUMBER, check
from tnpeft.studies.tasks.task import Task

_GRIDS = ("learning_rates", "relative_steps")
OURS = {  # settings of a study that a run has in another form
    "relative_steps": [NUMBER],
    "start": ("published", "rule"),
    "rates": ("one", "rule", "structure", "measured"),
}
STUDY_KINDS = {
    **dict.fromkeys(("name", "title", "source", "backbone", "tokenizer", "data", "cache"), str),
    **{key: [str] for key in ("ours", "controls", "backbones", "tune_backbones")},
    **{key: [int] for key in ("seeds", "tune_seeds")},
    **{key: [Mapping] for key in ("policies", "methods", "contrast")},
    "choose": ("loss", "metric"),
    "tasks": [str | Mapping],
    "extend": int,
    "margin": NUMBER,
    "protocol": Mapping,
}
_SETTINGS = {"learning_rates": [NUMBER], **OURS, "protocol": Mapping, "choose_on": str, "label": str}
_POLICY_KINDS = {**_SETTINGS, "precondition": bool, "methods": [str]}
_METHOD_KINDS = {
    **dict.fromkeys(("family", "line", "peft"), str),
    **_SETTINGS,
    **dict.fromkeys(("full", "none"), object),
    **dict.fromkeys(("args", "change", "grid"), Mapping),
    "match": BY,
    "budgets": [int],
}
CONTRAST_KINDS = {**dict.fromkeys(("name", "plus", "minus", "task"), str), "margin": NUMBER}
CONTRAST_KINDS |= {"measure": ("metric", "loss")}


@dataclass(frozen=True)
class Cell:
    """One method at one size under one policy on one task: a point of the study's figures.

    Attributes:
        label, size, policy: what it is called; the policy is empty where a study has none.
        method: what is trained.
        choose_on: the method whose best rate or step it takes; empty: its own.
        task: the task.
        protocol: its settings; a grid of relative steps stands under ``learning_rates``.
        relative: True if the grid holds relative steps.
    """

    label: str
    size: str
    policy: str
    method: Mapping[str, Any]
    choose_on: str
    task: Task
    protocol: Protocol
    relative: bool

    @property
    def name(self) -> str:
        """Policy, label and size."""
        return full_name(self.policy, self.label, self.size)

    def called(self, text: str) -> bool:
        """True if a contrast that says ``text`` may mean this cell."""
        return text in (self.name, full_name(self.policy, self.label))


def full_name(policy: str, label: str, size: str = "") -> str:
    """Return what a cell is called.

    >>> full_name("P1", "CP", "rank=2"), full_name("", "CP")
    ('P1: CP (rank=2)', 'CP')
    """
    return f"{policy}{': ' if policy else ''}{label}{f' ({size})' if size else ''}"


def cells(
    table: Mapping[str, Any],
    tasks: Iterable[tuple[Task, Mapping[str, Any]]],
    where: str,
    model: str,
    targets: tuple[str, ...],
) -> Iterator[Cell]:
    """Yield every method at every size under every policy, in the order of the file, for each task.

    A cell's settings are the method's own before the policy's, the task's and the study's. Budgets are counted on
    ``model`` with its ``targets``; ``where`` is the study's name, for errors.
    """
    policies, shared = table.get("policies", [{}]), table.get("protocol", {})
    for policy in policies:
        check(policy, _POLICY_KINDS, where, "a policy")
    pairs = itertools.product(policies, table["methods"])
    found = [its for policy, given in pairs for its in _sizes(given, policy, where, model, targets)]
    for (task, changed), (own, its) in itertools.product(tasks, found):
        settings = over(over(shared, changed), own)
        ours = {key: settings.pop(key) for key in OURS if key in settings}
        check(ours, OURS, where)
        if relative := "relative_steps" in ours:
            settings["learning_rates"] = list(map(float, ours["relative_steps"]))
            if (rates := ours.get("rates", "one")) != "one":
                settings["rate_rule"] = "relative_step" if rates == "rule" else rates
        yield Cell(**its, task=task, protocol=Protocol.of(settings), relative=relative)


def _sizes(
    given: Mapping[str, Any], policy: Mapping[str, Any], where: str, model: str, targets: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the settings and the names of a method under a policy, for each of its sizes."""
    check(given, _METHOD_KINDS, where, "a method")
    grid = given.get("grid", {})
    check(grid, {key: [object] for key in grid}, where, "a grid")
    kind = next((kind for kind in methods.KINDS if kind in given), "")
    name = given[kind] if isinstance(given.get(kind), str) and kind != "line" else kind
    label, wanted = str(given.get("label", name)), policy.get("methods")
    own: dict[str, Any] = {"precondition": True} if policy.get("precondition") else {}
    for its in (policy, given):
        own = over(own, {**its.get("protocol", {}), **{k: its[k] for k in ("learning_rates", *OURS) if k in its}})
    sizes: Iterable[tuple[dict[str, Any], dict[str, int]]]  # arguments of each, and the ranks that they do not reach
    if "budgets" in given:
        its_targets = tuple(given.get("protocol", {}).get("targets", targets))
        by = str(given.get("match", "parameters"))
        sizes = methods.matched(given, given["budgets"], backbones.shape(model), its_targets, by)
    else:
        sizes = ((dict(zip(grid, values, strict=True)), {}) for values in itertools.product(*grid.values()))
    for args, change in sizes:
        method = {key: given[key] for key in methods.KINDS if key in given}
        method |= {"args": {**given.get("args", {}), **args}} if args or "args" in given else {}
        changed = {**given.get("change", {}), **({"ranks": change} if change else {})}
        method |= {"change": changed} if changed else {}
        methods.check(method)
        if own.get("start") == "rule" and methods.is_network(method):
            method = methods.by_rule(method)
        size = ", ".join(f"{key}={value}" for key, value in args.items())
        if wanted is None or label in wanted or f"{label} ({size})" in wanted:
            chosen = str(given.get("choose_on", policy.get("choose_on", "")))
            names = {"label": label, "size": size, "policy": str(policy.get("label", ""))}
            yield own, {**names, "method": method, "choose_on": chosen}


def over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them; a grid of either kind replaces one of the other."""
    kept = {k: v for k, v in base.items() if k not in _GRIDS} if any(key in own for key in _GRIDS) else base
    return merged(kept, own)
