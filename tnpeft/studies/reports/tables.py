"""A study's tables: rows of plain values, written as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnpeft._text import Table
from tnpeft.studies.files import write_text
from tnpeft.studies.reports.points import Point, grouped
from tnpeft.studies.statistics import (
    Finding,
    Summary,
    best_under,
    findings,
    summary,
    variance_between,
    variance_ratio,
)

Row = Mapping[str, Any]


def results_table(points: Sequence[Point]) -> list[Row]:
    """One row for each point: parameters and degrees of freedom, rate or step, mean score with interval, loss.

    Columns that no point fills are left out.
    """
    rows = [
        {
            "task": p.task,
            "policy": p.policy,
            "method": p.label,
            "size": p.size,
            "parameters": p.parameters,
            "dof": "" if p.dof is None else p.dof,
            "relative step": "" if p.step is None else f"{p.step:.3g}{' (edge)' if p.edge else ''}",
            "learning rate": f"{p.lr:.3g}{' (edge)' if p.edge and p.step is None else ''}",
            "seeds": p.summary.replicates,
            "backbones": p.summary.n if p.summary.n < p.summary.replicates else "",
            "mean": f"{p.summary.mean:.4f}",
            "sd": f"{p.summary.sd:.4f}" if p.summary.n > 1 else "",
            "95 % t interval": _interval(p.summary),
            "loss": f"{summary(p.losses).mean:.4f}" if p.losses else "",
        }
        for p in points
    ]
    empty = {key for key in (rows[0] if rows else {}) if all(row[key] == "" for row in rows)}
    return [{key: value for key, value in row.items() if key not in empty} for row in rows]


def contrasts(points: Sequence[Point], declared: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Return what a study's declared contrasts say, adjusted over all of them; those without results say nothing."""
    by_name = {(p.task, p.name): p for p in points}

    def scores(contrast: Mapping[str, Any], side: str) -> Mapping[Any, float]:
        point = by_name.get((contrast["task"], contrast[side]))
        return {} if point is None else point.losses if contrast["measure"] == "loss" else point.scores

    return findings([(c["name"], scores(c, "plus"), scores(c, "minus"), c["margin"]) for c in declared])


def contrasts_table(found: Sequence[Finding], declared: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each declared contrast; p values are adjusted by Holm's method over all of them."""
    return [
        {
            "contrast": its.name,
            "measure": c["measure"],
            "n": its.summary.n if its.summary else 0,
            "difference": f"{its.summary.mean:+.4f}" if its.summary else "not run",
            "95 % t interval": _interval(its.summary, "+.4f") if its.summary else "",
            "p, different": f"{its.different:.3g}",
            "p, within margin": f"{its.equivalent:.3g}",
            "margin": f"{its.margin:g}",
            "verdict": its.word,
        }
        for its, c in zip(found, declared, strict=True)
    ]


def variance_table(points: Sequence[Point], controls: Sequence[str]) -> list[Row]:
    """One row for each policy: the variance of the loss between families and between controls, and its ratio to the
    first policy's (geometric means over backbones); nothing where a study has one policy or no controls.
    """
    policies, rows, first = grouped(points, "policy"), [], None
    if len(policies) < 2 or not controls:
        return []
    for policy, group in policies.items():
        its = {
            "families": [p.losses for p in group if p.losses],
            "controls": [p.losses for p in group if p.losses and p.label in controls],
        }
        row: dict[str, Any] = {"policy": policy, "families": len(its["families"])}
        for name, losses in its.items():
            found = variance_between(losses)
            row |= {"n": len(found), f"variance, {name}": f"{sum(found.values()) / len(found):.3g}" if found else ""}
        first = its["families"] if first is None else first
        ratio = variance_ratio(its["families"], first)
        row["families, over the first policy's"] = f"{ratio.mean:.3g}" if ratio else ""
        row["95 % t interval"] = _interval(ratio, ".3g") if ratio else ""
        rows.append(row)
    return rows


def _interval(its: Summary, form: str = ".4f") -> str:
    return f"{its.low:{form}} to {its.high:{form}}" if its.n > 1 else ""


def curve_table(points: Sequence[Point]) -> list[Row]:
    """The best-under-budget curve of every method that has several sizes: one row where it rises."""
    rows = []
    for (task, _, label), group in grouped(points, "task", "policy", "label").items():
        if len(group) > 1:
            seeds = min(p.summary.n for p in group)
            for size, score in best_under([(p.parameters, p.summary.mean) for p in group]):
                at = {"task": task, "method": label, "parameters up to": size, "best mean": f"{score:.4f}"}
                rows.append({**at, "sizes tested": len(group), "seeds": seeds})
    return rows


def metrics_table(points: Sequence[Point]) -> list[Row]:
    """Further metrics of the tasks that name some: one row for each point and metric."""
    rows = []
    for p in points:
        for name, scores in p.also.items():
            its = summary(scores)
            at = {"task": p.task, "method": p.label, "size": p.size, "parameters": p.parameters, "metric": name}
            rows.append({**at, "seeds": its.n, "mean": f"{its.mean:.4f}", "sd": f"{its.sd:.4f}" if its.n > 1 else ""})
    return rows


def write(rows: Sequence[Row], path: Path, caption: str = "") -> None:
    """Write ``path`` with the endings .md, .csv and .tex."""
    head, table = f"{caption}\n\n" if caption else "", Table.of(rows)
    write_text(path.with_suffix(".md"), f"{head}{table.markdown()}\n")
    write_text(path.with_suffix(".csv"), table.csv())
    write_text(path.with_suffix(".tex"), table.latex() + "\n")
