"""The report of a study: its tables and figures, made from the result files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tnpeft.studies import figures, tables
from tnpeft.studies.files import StudyError, write_json
from tnpeft.studies.results import Point, collect, failures
from tnpeft.studies.runs import Store
from tnpeft.studies.study import Study


def report(study: Study, folder: str | Path, out: str | Path, reference: str = "") -> tuple[Point, ...]:
    """The study's points, after its tables and figures were written below ``out``.

    Files: ``<name>.json`` with every score, and what :func:`render` makes of it. Nothing in them depends on when or
    how often a sweep was interrupted.

    Args:
        study: the study.
        folder: where its results are.
        out: where to write.
        reference: the method that others are compared with; the study's first if empty.

    Raises:
        StudyError: no result is there yet, or there is no such reference.
    """
    store, out = Store(Path(folder)), Path(out)
    points = collect(study, store)
    failed = failures(study, store)
    if not points and failed:
        problem = f"no results: all {len(failed)} runs failed, {failed[0][0]} with {failed[0][1]}"
        raise StudyError(problem, where=study.name, remedy="mend that and run the sweep with --retry")
    if not points:
        raise StudyError("no results yet", where=study.name, remedy="run the sweep first")
    labels = dict.fromkeys(point.label for point in points)
    if reference and reference not in labels:
        raise StudyError(
            f"there is no method {reference!r}", where=study.name, remedy=f"there are {', '.join(labels)}"
        )
    facts = {
        "name": study.name,
        "title": str(study.table.get("title", "")),
        "reference": reference or points[0].label,
        "protocol": study.protocol.digest,
        "settings": asdict(study.protocol),
        "backbone": str(study.table["backbone"]),
        "source": str(study.table.get("source", "")),
        "ours": list(study.table.get("ours", [])),
        "tasks": {task.name: {"prompt": task.prompt, "words": dict(task.words)} for task in study.tasks},
        "seeds": list(study.table["seeds"]),
        "points": [p.table for p in points],
    }
    write_json(out / f"{study.name}.json", facts)
    if failed:
        tables.write([{"run": run, "cause": cause} for run, cause in failed], out / f"{study.name}-failed.md")
    return render(facts, out)


def render(facts: Mapping[str, Any], out: str | Path) -> tuple[Point, ...]:
    """The points of a study, after the tables and figures were written that its results (a report's JSON) show.

    Files: the tables ``<name>`` (all points), ``<name>-matched``, ``<name>-curve`` and, if a task has further
    metrics, ``<name>-metrics`` (.md, .csv, .tex), the figures ``<name>`` and ``<name>-curve``.
    """
    points = tuple(map(Point.of, facts["points"]))
    where, title, reference = Path(out) / facts["name"], facts["title"], facts["reference"]
    gaps = sum(len(set(facts["seeds"]) - set(p.scores)) for p in points)
    caption = f"{title or facts['name']}: {_seeds(points)}{f', {gaps} runs missing' if gaps else ''}."
    tables.write(tables.results_table(points), where.with_suffix(".md"), caption)
    further = {"matched": tables.matched_table(points, reference), "curve": tables.curve_table(points)}
    for name, rows in {**further, "metrics": tables.metrics_table(points)}.items():
        if rows:
            tables.write(rows, where.with_name(f"{facts['name']}-{name}.md"))
    ladder = figures.is_ladder(points)
    draw = figures.budget_figure if ladder else figures.ranked_figure
    draw(points, where, title=title, reference=reference)
    if ladder:
        figures.curve_figure(points, where.with_name(f"{facts['name']}-curve"), title=title)
    return points


def _seeds(points: Sequence[Point]) -> str:
    seeds = sorted({p.summary.n for p in points})
    return str(seeds[0]) + " seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
