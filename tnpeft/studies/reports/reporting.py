"""The report of a study: its tables and figures, made from the result files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tnpeft.studies import packaged
from tnpeft.studies.files import StudyError, write_json
from tnpeft.studies.reports import figures as drawn
from tnpeft.studies.reports import tables
from tnpeft.studies.reports.points import Point, collect, on_backbones, span
from tnpeft.studies.runs import Store
from tnpeft.studies.study import Study


def report(
    study: Study, folder: str | Path, out: str | Path, reference: str = "", figures: str | Path = ""
) -> tuple[Point, ...]:
    """The study's points, after its tables and figures were written below ``out``.

    Files: ``<name>.json`` with every score, and what :func:`render` makes of it. Nothing in them depends on when or
    how often a sweep was interrupted.

    Args:
        study: the study.
        folder: where its results are.
        out: where to write.
        reference: the method that others are compared with; the study's first if empty.
        figures: where to write figures; ``out`` if empty.

    Raises:
        StudyError: there are results of no method yet, or the reference is unknown.

    >>> import tempfile
    >>> from tnpeft.studies import Engine, sweep
    >>> study = Study.of({
    ...     "backbone": "digits:0", "tasks": ["digits_upright"], "seeds": [0],
    ...     "protocol": {"targets": ["q_proj"], "steps": 1, "train": 8, "dev": 8, "learning_rates": [1e-2]},
    ...     "methods": [{"family": "lora", "args": {"rank": 1}}],
    ... }, Path("."))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     summary = sweep(study, folder, Engine("serial"), say=lambda line: None)
    ...     points = report(study, folder, f"{folder}/report")
    >>> [(point.label, len(point.scores)) for point in points]
    [('lora', 1)]
    """
    store, out = Store(Path(folder)), Path(out)
    points = collect(study, store)
    runs = {run.key: run for run in (*study.search(store), *study.confirmation(store))}
    records = ((str(run), store.failure(key)) for key, run in runs.items() if not store.result(key))
    failed = [{"run": run, "cause": record["cause"]} for run, record in records if record]
    if not points and failed:
        problem = f"no results: all {len(failed)} runs failed, {failed[0]['run']} with {failed[0]['cause']}"
        raise StudyError(problem, where=study.name, remedy="mend that and run the sweep with --retry")
    if not points:
        raise StudyError("no results yet", where=study.name, remedy="run the sweep first")
    labels = dict.fromkeys(point.label for point in points)
    if reference and reference not in labels:
        raise StudyError(f"unknown method {reference!r}", where=study.name, remedy=f"there are {', '.join(labels)}")
    facts = {
        "name": study.name,
        "title": str(study.table.get("title", "")),
        "reference": reference or points[0].label,
        "protocol": study.protocol.digest,
        "settings": asdict(study.protocol),
        "backbone": packaged.title(str(study.table["backbone"])),
        "backbones": {name: study.identity(name) for name in study.backbones},
        "controls": list(study.table.get("controls", [])),
        "contrasts": list(study.contrasts),
        "source": str(study.table.get("source", "")),
        "ours": list(study.table.get("ours", [])),
        "tasks": {task.name: {"prompt": task.prompt, "words": dict(task.words)} for task in study.tasks},
        "seeds": list(study.table["seeds"]),
        "reported": len(study.table.get("backbones", ())) or 1,
        "points": [p.table for p in points],
    }
    write_json(out / f"{study.name}.json", facts)
    if failed:
        tables.write(failed, out / f"{study.name}-failed.md")
    return render(facts, out, figures)


def render(facts: Mapping[str, Any], out: str | Path, figures: str | Path = "") -> tuple[Point, ...]:
    """The points of a study, after the tables and figures were written that its results (a report's JSON) show.

    Files: the tables ``<name>`` (all points), ``<name>-contrasts`` (declared comparisons), ``<name>-variance``
    (between families, by policy), ``<name>-curve`` (best under a budget) and ``<name>-metrics`` (.md, .csv, .tex);
    the figures ``<name>`` (against budget, or by rank), ``<name>-rates`` (searches), ``<name>-variance`` and
    ``<name>-contrasts``. What has no content is left out.
    """
    points = tuple(map(Point.of, facts["points"]))
    where, seen = Path(out), Path(figures or out)
    name, title = facts["name"], facts["title"]
    wanted = len(facts["seeds"]) * max(1, facts.get("reported", 1))
    gaps = sum(wanted - len(p.scores) for p in points)
    seeds = f"{span([p.summary.replicates for p in points])} seeds"
    if on_backbones(points):
        seeds = f"{seeds.replace('seeds', 'runs')} each on {max(p.summary.n for p in points)} backbones"
    caption = f"{title or name}: {seeds}{f', {gaps} runs missing' if gaps else ''}."
    tables.write(tables.results_table(points), where / f"{name}.md", caption)
    found = tables.contrasts(points, facts.get("contrasts", ()))
    controls = facts.get("controls", ())
    further = {
        "contrasts": tables.contrasts_table(found, facts.get("contrasts", ())),
        "variance": tables.variance_table(points, controls),
        "curve": tables.curve_table(points),
        "metrics": tables.metrics_table(points),
    }
    for kind, rows in further.items():
        if rows:
            tables.write(rows, where / f"{name}-{kind}.md")
    if not further["variance"]:
        draw = drawn.budget_figure if drawn.is_ladder(points) else drawn.ranked_figure
        draw(points, seen / name, title=title, reference=facts["reference"])
    if any(p.step is not None and len(p.search) > 1 for p in points):
        drawn.rates_figure(points, seen / f"{name}-rates", title=title)
    if further["variance"]:
        drawn.variance_figure(points, seen / f"{name}-variance", controls, title=title)
    if found:
        measures = {c["measure"] for c in facts["contrasts"]}
        unit = {"loss": "cross-entropy", "metric": points[0].metric}[measures.pop()] if len(measures) == 1 else ""
        drawn.forest_figure(found, seen / f"{name}-contrasts", title=title, unit=unit)
    return points
