"""The answers of the live page: a question in, plain data out. Pyodide runs it in the browser, Python anywhere."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import tnpeft
from tnpeft.counting.parameters import layout_on, stored_megabytes, with_sizes
from tnpeft.families.catalogue import factorization
from tnpeft.layout import Layout
from tnpeft.models.cards import card, groups, names, sites

RANK, STACK = 8, 2  # of a bond of an own line, of a stack index that no model decides, until they are chosen


def choices() -> str:
    """The families with their lines, and the models with their default targets, as JSON."""
    lines = {name: str(tnpeft.families.get(name)().network) for name in tnpeft.families.names()}
    return json.dumps({"families": lines, "models": {name: list(card(name).default) for name in names()}})


def answer(question: str, stage: str) -> str:
    """Answer one stage of a question, as JSON; an error is Python's own message.

    The question has ``line`` (a line of einsum or a family), ``model``, ``targets``, ``tokens``, ``sizes`` (chosen
    ranks, splits and stack indices by name) and ``budget`` (None for the count itself).
    """
    asked = json.loads(question)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = STAGES[stage](asked)
        notes = [str(each.message) for each in caught]
        return json.dumps({**found, **({"notes": list(dict.fromkeys(notes))} if notes else {})})
    except (tnpeft.NetworkError, ModuleNotFoundError) as error:
        return json.dumps({"error": str(error)})


class Subject:
    """What a question is about: the factorization with the chosen sizes, over the sites of the model."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.text = " ".join(asked["line"].split("\n")).strip()
        f = factorization(self.text)
        if "[" in self.text:
            f = f.with_ranks(**dict.fromkeys(f.ranks, RANK))
        nets = [rule.network for rule in f.lines]
        decided = {"layer", "proj", "expert"}
        self.stack = {i: STACK for net in nets for i in net.stack if i not in decided}
        self.grouped = [i for net in nets for group in (net.rows, net.cols) if len(group) > 1 for i in group]
        known = {*f.ranks, *self.grouped, *self.stack}
        self.sizes = {name: size for name, size in asked["sizes"].items() if name in known}
        self.stack |= {i: size for i, size in self.sizes.items() if i in self.stack}
        chosen = {i: size for i, size in self.sizes.items() if i not in self.stack}
        self.f = with_sizes(f, chosen, chosen)
        self.model = asked["model"]
        self.targets: str = asked["targets"] or ",".join(card(self.model).default)

    @property
    def layout(self) -> Layout:
        return layout_on(self.f, self.stack, model=self.model, targets=self.targets)

    @property
    def free(self) -> list[str]:
        """The ranks that are numbers."""
        return [rank for rank, size in self.f.ranks.items() if isinstance(size, int)]

    def fields(self, found: Layout) -> Iterator[dict[str, Any]]:
        """What can be chosen, with its present size; a rank by rule with its rule."""
        for rank, size in self.f.ranks.items():
            yield {"name": rank, "size": size}
        first = found.site_layouts[0].sizes
        for index in dict.fromkeys(self.grouped):
            if index in first:
                yield {"name": index, "size": first[index], "open": index not in self.sizes}
        for index, size in self.stack.items():
            yield {"name": index, "size": size}


def numbers(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Counts, cost of one more rank, rank bound, degrees of freedom, gain, and where the costs go."""
    subject = Subject(asked)
    found = subject.layout
    on: dict[str, Any] = {"model": subject.model, "targets": subject.targets}
    [row] = tnpeft.compare([subject.f], tokens=asked["tokens"], sort="", **on, **subject.stack)
    used = {index for shape in found.shapes() for index in shape.network.indices}
    return {
        "line": "\n".join(str(rule.network) for rule in subject.f.lines),
        "fields": list(subject.fields(found)),
        "sites": [str(group) for group in groups(sites(subject.model, subject.targets))],
        "parameters": row.parameters,
        "megabytes": stored_megabytes(row.parameters or 0),
        "factors": dict(found.by_factor()),
        "steps": {rank: step(subject, rank, found.count()) for rank in subject.free if rank in used},
        "rank_bound": row.rank_bound,
        "dof": row.dof,
        "gain": row.gain,
        "macs": row.macs,
        "saved_bytes": row.saved_bytes,
        "problem": row.problem,
        "shapes": [str(shape) for shape in found.shapes()],
        "code": code(subject, asked["line"]),
    }


def step(subject: Subject, rank: str, count: int) -> int:
    """The parameters that one more of a rank costs over all sites."""
    size = subject.f.ranks[rank]
    assert isinstance(size, int)  # a rule follows the others
    more = subject.f.with_ranks(**{rank: size + 1})
    return layout_on(more, subject.stack, model=subject.model, targets=subject.targets).count() - count


def plan(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The program of one site's step at a number of tokens, and the numbers of tokens where another is better."""
    shape = chosen_shape(asked)
    best = tnpeft.plan(shape.network, shape.sizes, tokens=asked["tokens"])
    rows = [[str(s), s.macs, s.backward_macs, s.written, s.saved] for s in best.steps]
    total = ["total", best.macs, best.backward_macs, best.written, best.saved]
    form = best.form if best.exact else f"{best.form}, by a greedy search: too many operands for an exact one"
    return {"form": form, "steps": [*rows, total], "sizes": dict(best.dims)}


def chosen_shape(asked: Mapping[str, Any]) -> Any:
    """The kind of site that the plan is for."""
    shapes = Subject(asked).layout.shapes()
    return shapes[min(asked.get("shape", 0), len(shapes) - 1)]


def picture(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The picture, as SVG."""
    subject = Subject(asked)
    found = subject.layout
    stack = {"layer": len(found.layers), "proj": len(found.projs), **subject.stack}
    return {"svg": tnpeft.drawing.svg(subject.f, stack)}


def ladder(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The budgets that the free ranks can meet, and the nearest one."""
    subject = Subject(asked)
    found = subject.layout
    [row] = tnpeft.budget(
        subject.f,
        subject.stack,
        parameters=asked.get("budget") or found.count(),
        model=subject.model,
        targets=subject.targets,
    )
    rung = {"nearest": row.nearest, "below": row.below}
    return {
        **{name: its and {"ranks": dict(its.ranks), "count": its.count} for name, its in rung.items()},
        "ladder": [{"ranks": dict(its.ranks), "count": its.count} for its in row.ladder],
    }


def intervals(asked: Mapping[str, Any]) -> dict[str, Any]:
    """From which number of tokens on which program is best."""
    shape = chosen_shape(asked)
    table = tnpeft.plan_table(shape.network, shape.sizes)
    return {"intervals": [[start, best.form] for start, best in zip(table.starts, table.plans, strict=True)]}


def formula(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The count as a formula, a line each, and the gain as one. The only answer that needs sympy."""
    subject = Subject(asked)
    shown: dict[str, Any] = {"formula": "\n".join(str(tnpeft.parameters(rule.network)) for rule in subject.f.lines)}
    if len(subject.f.lines) == 1:
        shown["gain_formula"] = str(tnpeft.gain(subject.text.partition(":")[0]))
    return shown


def code(subject: Subject, line: str) -> str:
    """Python to paste that asks the same."""
    f = subject.f
    splits = {side: list(parts) for side, parts in f.splits.items()}
    if "[" in line:
        kept = {"ranks": dict(f.ranks), "splits": splits}
        fields = "".join(
            f"    {name}={json.dumps(value).replace('null', 'None')},\n" for name, value in kept.items() if value
        )
        made = f'f = tnpeft.Factorization.of(\n    "{f.network}",\n{fields})'
    else:
        ranks = ", ".join(f"{rank}={f.ranks[rank]}" for rank in subject.free)
        made = f'f = tnpeft.families.get("{f.name}")().with_ranks({ranks})'
        if any(i in subject.sizes for i in subject.grouped):
            made = f"from dataclasses import replace\n\n{made}\nf = replace(f, splits={literal(splits)})"
    targets = literal([target.strip() for target in subject.targets.split(",")])
    stack = "".join(f", {index}={size}" for index, size in subject.stack.items())
    stacked = f", stack={literal(subject.stack)}" if subject.stack else ""
    return (
        f'import tnpeft\n\n{made}\non = dict(model="{subject.model}", targets={targets}{stack})\n'
        "print(tnpeft.parameters(f, **on))\nprint(tnpeft.compare([f], **on))\n"
        f"config = tnpeft.TensorNetworkConfig(network=f, target_modules={targets}{stacked})  # a PeftConfig\n"
    )


def literal(value: Any) -> str:
    """A value of plain data as Python writes it, in double quotes."""
    return json.dumps(value).replace("null", "None")


STAGES = {each.__name__: each for each in (numbers, plan, picture, ladder, formula, intervals)}
