"""Put every published table of results beside what was measured here, or say that it was not run and why.

Reads ``paper/published/results.toml`` (what was published), ``here.toml`` beside it (what has its like here) and the
studies' result files in ``paper/tables/``; writes ``paper/tables/results.md`` and ``results.csv``. A smaller model at
the same share of LoRA's budget does not reproduce it but comes nearest: every cell names its study.

    python scripts/reproduce_results.py
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnpeft._text import Table
from tnpeft.studies.files import write_text
from tnpeft.studies.statistics import summary

PAPER = Path(__file__).resolve().parent.parent / "paper"
SLACK = 0.1  # of the budget, within which sizes are counterparts
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A published score and the point of a study that stands beside it (None: not run)."""

    table: str
    row: Row
    column: str
    study: str
    point: Row | None

    @property
    def flat(self) -> dict[str, Any]:
        """As a row of the CSV file."""
        scores = list((self.point or {"scores": {}})["scores"].values())
        its = summary(scores) if scores else None
        return {
            "table": self.table,
            "task": self.row["task"],
            "method": self.row.get("method", self.column),
            "published": self.row[self.column],
            "study": self.study,
            "size here": self.point["size"] if self.point else "",
            "parameters here": self.point["parameters"] if self.point else "",
            "mean here": f"{its.mean:.4f}" if its else "not run",
            "sd here": f"{its.sd:.4f}" if its and its.n > 1 else "",
            "seeds here": its.n if its else 0,
        }

    def __str__(self) -> str:
        if self.point is None:
            return "not run"
        its = summary(self.point["scores"])
        spread = f" ± {its.sd:.3f}" if its.n > 1 else ""
        return f"{its.mean:.3f}{spread} ({self.point['size']}, {its.n} seed{'s' if its.n > 1 else ''})"


def counterpart(points: Sequence[Row], task: str, method: str, share: float) -> Row | None:
    """The point of a method whose parameters are nearest to ``share`` of LoRA's at rank 1, within a tenth."""
    unit = next((p["parameters"] for p in points if (p["method"], p["size"]) == ("LoRA", "rank=1")), None)
    own = [p for p in points if (p["task"], p["method"]) == (task, method)]
    if unit is None or not own:
        return None
    best = min(own, key=lambda p: abs(p["parameters"] - share * unit))
    return best if abs(best["parameters"] - share * unit) <= SLACK * share * unit else None


def beside(published: Row, here: Row, tables: Path) -> Iterator[Cell]:
    """Every score of a published table with its counterpart in every study that has one, or in none."""
    for row in published["rows"]:
        for column, its in here["columns"].items():
            method = row["method"] if its["method"] == "row" else its["method"]
            share = row[its["size"]] * here["steps"][method] / here["steps"]["LoRA"]
            for study in here["studies"]:
                points = read(tables / f"{study}.json")
                yield Cell(
                    published["id"],
                    row,
                    column,
                    study,
                    counterpart(points, here["tasks"][row["task"]], method, share),
                )


def read(path: Path) -> list[Row]:
    """The points of a study; none if it was not run."""
    return list(json.loads(path.read_text(encoding="utf-8"))["points"]) if path.exists() else []


def section(published: Row, here: Row, cells: Sequence[Cell]) -> str:
    """A published table as Markdown, with a column for each study that has something beside it."""
    lines = [f"## {published['id']}", "", f"{published['what']}. {published['model']}; {published['metric']}."]
    lines += [f"Evidence: {published['evidence']}, {published['source']}.", ""]
    if not cells:
        return "\n".join([*lines, f"**Not run**: {here['why']}.", ""])
    ran = [study for study in here["studies"] if any(cell.point and cell.study == study for cell in cells)]
    own = here["studies"][0]
    if own not in ran:
        lines += [f"`{own}`, the paper's own setting: **not run** ({here['why']}).", ""]
    rows = []
    for row in published["rows"]:
        found: dict[str, Any] = dict(row)
        for cell in cells:
            if cell.row is row and cell.study in ran:
                found[f"{cell.column}: {cell.study}"] = str(cell)
        rows.append(found)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return "\n".join([*lines, Table.of({key: row.get(key, "") for key in keys} for row in rows).markdown(), ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", type=Path, default=PAPER, help="folder with published/ and tables/")
    parser.add_argument("--out", type=Path, help="folder to write (default: its tables/)")
    options = parser.parse_args(arguments)
    folder = options.paper / "published"
    published = tomllib.loads((folder / "results.toml").read_text(encoding="utf-8"))["table"]
    entries = tomllib.loads((folder / "here.toml").read_text(encoding="utf-8"))["here"]
    matches = {its["table"]: its for its in entries}
    parts, flat = [], []
    for table in published:
        here = matches[table["id"]]
        cells = list(beside(table, here, options.paper / "tables")) if "studies" in here else []
        parts.append(section(table, here, cells))
        flat += [cell.flat for cell in cells]
    ran = sum(row["mean here"] != "not run" for row in flat)
    own = {its["studies"][0] for its in matches.values() if "studies" in its}
    same = sum(row["mean here"] != "not run" and row["study"] in own for row in flat)
    rows = sum(len(table["rows"]) for table in published)
    head = f"""# Published results, beside what was measured here

Of the {rows} published rows in {len(published)} tables, {same} scores were measured here in the paper's own setting.
{ran - same} have a counterpart on a smaller model: the same method at the same share of LoRA's budget at rank 1
(within {SLACK:.0%}), which reproduces no number and is to be read for its direction. Scores here are means and
standard deviations over seeds. What has its like where: `paper/published/here.toml`.
"""
    out = options.out or options.paper / "tables"
    write_text(out / "results.md", "\n".join([head, *parts]).rstrip() + "\n")
    write_text(out / "results.csv", Table.of(flat).csv())
    print(f"{len(published)} tables: {same} scores measured in their own setting, {ran - same} on smaller models")


if __name__ == "__main__":
    main()
