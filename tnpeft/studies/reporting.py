"""The report of a study: its tables and figures, made from the result files alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tnpeft.studies import figures, tables
from tnpeft.studies.files import StudyError, write_json
from tnpeft.studies.results import Point, collect, failures
from tnpeft.studies.runs import Store
from tnpeft.studies.study import Study


def report(study: Study, folder: str | Path, out: str | Path, reference: str = "") -> tuple[Point, ...]:
    """The study's points, after its tables and figures were written below ``out``.

    Files: the tables ``<name>`` (all points), ``<name>-matched``, ``<name>-curve`` and, if a task has further
    metrics, ``<name>-metrics`` (.md, .csv, .tex), the figures ``<name>`` and ``<name>-curve``, and ``<name>.json``
    with every score. Nothing in them depends on when or how often a sweep was interrupted.

    Args:
        study: the study.
        folder: where its results are.
        out: where to write.
        reference: the method that others are compared with; the study's first if empty.

    Raises:
        StudyError: no result is there yet.
    """
    store, out = Store(Path(folder)), Path(out)
    points = collect(study, store)
    if not points:
        raise StudyError("no results yet", where=study.name, remedy="run the sweep first")
    reference = reference or points[0].label
    caption = f"{study.table.get('title', study.name)}: {_missing(points)}."
    tables.write(tables.results_table(points), out / f"{study.name}.md", caption)
    further = {"matched": tables.matched_table(points, reference), "curve": tables.curve_table(points)}
    for name, rows in {**further, "metrics": tables.metrics_table(points)}.items():
        if rows:
            tables.write(rows, out / f"{study.name}-{name}.md")
    failed = failures(study, store)
    if failed:
        tables.write([{"run": run, "cause": cause} for run, cause in failed], out / f"{study.name}-failed.md")
    title = str(study.table.get("title", ""))
    ladder = figures.is_ladder(points)
    draw = figures.budget_figure if ladder else figures.ranked_figure
    draw(points, out / study.name, title=title, reference=reference)
    if ladder:
        figures.curve_figure(points, out / f"{study.name}-curve", title=title)
    write_json(
        out / f"{study.name}.json",
        {
            "name": study.name,
            "protocol": study.protocol.digest,
            "settings": asdict(study.protocol),
            "backbone": str(study.table["backbone"]),
            "source": str(study.table.get("source", "")),
            "ours": list(study.table.get("ours", [])),
            "tasks": {task.name: {"prompt": task.prompt, "words": dict(task.words)} for task in study.tasks},
            "seeds": list(study.table["seeds"]),
            "points": [
                {
                    "task": p.task,
                    "method": p.label,
                    "size": p.size,
                    "parameters": p.parameters,
                    "head": p.head,
                    "lr": p.lr,
                    "edge": p.edge,
                    "scores": {str(seed): score for seed, score in p.scores.items()},
                    "dev": {str(seed): score for seed, score in p.dev.items()},
                }
                for p in points
            ],
        },
    )
    return points


def _missing(points: tuple[Point, ...]) -> str:
    seeds = sorted({p.summary.n for p in points})
    number = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    gaps = sum(len(p.missing) for p in points)
    return f"{number} seeds" + (f", {gaps} runs missing" if gaps else "")
