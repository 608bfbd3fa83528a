"""Build the studies' tables and figures, then paper/report.md from paper/report.in.md, all from files below paper/.

The template's expressions are those of Jinja; :class:`Facts` lists what they can ask for. A number that no file
holds ends the build with the name of what is missing.

    python scripts/build_report.py
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from tnpeft.studies.files import write_text
from tnpeft.studies.reporting import render
from tnpeft.studies.statistics import Summary, paired, summary
from tnpeft.studies.tables import markdown

PAPER = Path(__file__).resolve().parent.parent / "paper"
Row = Mapping[str, Any]


class Missing(LookupError):
    """A number that no result file holds."""


class Facts:
    """What the report can ask for."""

    def __init__(self, paper: Path) -> None:
        self.paper = paper
        self.data = cache(self._data)
        self.rows = cache(self._rows)

    # ---- files

    def has(self, name: str) -> bool:
        """Whether a study's results are there."""
        return (self.paper / "tables" / f"{name}.json").exists()

    def _data(self, name: str) -> Any:
        path = self.paper / "tables" / f"{name}.json"
        if not path.exists():
            raise Missing(f"{path} is not there: run the script that writes it first")
        return json.loads(path.read_text(encoding="utf-8"))

    def _rows(self, name: str) -> list[dict[str, str]]:
        path = self.paper / "tables" / f"{name}.csv"
        if not path.exists():
            raise Missing(f"{path} is not there: run the script that writes it first")
        with path.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    def table(self, name: str, *columns: str, **where: str) -> str:
        """Rows of a table as Markdown: those whose columns have the values given, some columns of them."""
        rows = [row for row in self.rows(name) if all(row[key] == value for key, value in where.items())]
        if not rows:
            raise Missing(f"no row of {name} has {where}")
        return markdown([{key: row[key] for key in columns or row if key not in where} for row in rows])

    def published(self, name: str) -> str:
        """A published table, with the evidence mark of every column."""
        tables = tomllib.loads((self.paper / "published" / "results.toml").read_text(encoding="utf-8"))["table"]
        found = next((table for table in tables if table["id"] == name), None)
        if found is None:
            raise Missing(f"no published table is called {name}")
        marks = found.get("evidence_columns", {})
        keys = list(dict.fromkeys(key for row in found["rows"] for key in row))
        titles = {
            key: f"{key.replace('_', ' ')} ({marks[key]})" if key in marks else key.replace("_", " ") for key in keys
        }
        rows = [{titles[key]: row.get(key, "") for key in keys} for row in found["rows"]]
        about = f"{found['model']}; {found['metric']}. Evidence: {found['evidence']}, {found['source']}."
        return f"{about}\n\n{markdown(rows)}"

    # ---- studies

    def point(self, study: str, task: str, method: str, size: str = "") -> dict[str, Any]:
        """A study's point: parameters, lr, scores and dev by seed."""
        for point in self.data(study)["points"]:
            if (point["task"], point["method"], point["size"]) == (task, method, size):
                return dict(point)
        raise Missing(f"{study} has no {method} {size} on {task}")

    def mean(self, study: str, task: str, method: str, size: str = "") -> str:
        """The mean score over seeds, in percent."""
        return f"{100 * self._summary(study, task, method, size).mean:.1f} %"

    def _summary(self, study: str, task: str, method: str, size: str) -> Summary:
        return summary(self.point(study, task, method, size)["scores"])

    def seeds(self, study: str) -> int:
        """The least number of seeds behind a point."""
        return min(len(point["scores"]) for point in self.data(study)["points"])

    def difference(self, study: str, task: str, one: Sequence[str], other: Sequence[str]) -> str:
        """``one`` minus ``other`` (method, size) over shared seeds, in points, with its interval."""
        its = self._difference(study, task, one, other)
        within = f"{100 * its.low:+.1f} to {100 * its.high:+.1f}, {its.n} seeds" if its.n > 1 else "1 seed"
        return f"{100 * its.mean:+.1f} points ({within})"

    def _difference(self, study: str, task: str, one: Sequence[str], other: Sequence[str]) -> Summary:
        first, second = (self.point(study, task, *of)["scores"] for of in (one, other))
        its = paired(first, second)
        if its is None:
            raise Missing(f"{one} and {other} share no seed in {study}")
        return its

    def ranking(self, study: str, task: str) -> str:
        """All points of a task by their means, with the learning rate and the difference from the first method."""
        points = [p for p in self.data(study)["points"] if p["task"] == task]
        base = points[0]
        rows = []
        for p in sorted(points, key=lambda p: -summary(p["scores"]).mean):
            its, gap = summary(p["scores"]), paired(p["scores"], base["scores"])
            rows.append(
                {
                    "method": p["method"],
                    "size": p["size"],
                    "parameters": p["parameters"],
                    "learning rate": f"{p['lr']:g}{' (edge)' if p.get('edge') else ''}",
                    "mean ± sd, %": f"{100 * its.mean:.1f} ± {100 * its.sd:.1f}",
                    f"minus {base['method']} {base['size']}, points": (
                        f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
                        if gap and p is not base
                        else ""
                    ),
                    "seeds": its.n,
                }
            )
        return markdown(rows)

    def settings(self, *studies: str) -> str:
        """The settings of studies side by side."""
        keys = (
            "backbone",
            "targets",
            "train",
            "dev",
            "eval",
            "steps",
            "batch",
            "schedule",
            "warmup",
            "clip",
            "max_length",
        )
        keys += ("evaluate_every", "best_by", "head", "dtype", "by_length")
        rows = []
        for key in (*keys, "words"):
            row = {"setting": key}
            for study in studies:
                data = self.data(study)
                words = "; ".join(f"{n}: {' /'.join(t['words'].values())}" for n, t in data["tasks"].items())
                value = {**data["settings"], "backbone": Path(data["backbone"]).name, "words": words}[key]
                row[study] = ", ".join(value) if isinstance(value, list) else value
            rows.append(row)
        return markdown(rows)


def show(paper: Path, name: str) -> None:
    """Make the tables and figures of one study from its results; of a search for learning rates only its table."""
    facts = json.loads((paper / "tables" / f"{name}.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as made:
        render(facts, made)
        for path in sorted(Path(made).iterdir()):
            if not name.endswith("_rates") or (path.stem == name and path.suffix in (".md", ".csv")):
                folder = paper / ("figures" if path.suffix in (".png", ".pdf", ".svg") else "tables")
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / path.name)


def studies(paper: Path) -> list[str]:
    """The names of the studies whose results are there."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((paper / "tables").glob("*.json"))
    }
    return [name for name, facts in found.items() if isinstance(facts, dict) and "points" in facts]


def build(paper: Path) -> None:
    """Write ``report.md`` beside ``report.in.md``.

    Raises:
        Missing: the template asks for a number that no file holds.
    """
    facts = Facts(paper)
    its = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    names = {name: getattr(facts, name) for name in dir(facts) if not name.startswith("_") and name != "paper"}
    text = its.from_string((paper / "report.in.md").read_text(encoding="utf-8")).render(**names)
    write_text(paper / "report.md", text.rstrip() + "\n")


if __name__ == "__main__":
    try:
        for study in studies(PAPER):
            show(PAPER, study)
        build(PAPER)
    except Missing as error:
        sys.exit(str(error))
