"""Put every published table of results beside what was measured here, or say that it was not run and why.

Reads ``paper/published/results.toml`` (what was published), ``here.toml`` beside it (what has its like here) and the
studies' result files in ``paper/tables/``; writes ``paper/tables/results.md`` and ``results.csv``. A smaller model at
the same share of LoRA's budget does not reproduce it but comes nearest: every cell names its study.

    python scripts/reproduce_results.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tnpeft._text import Table
from tnpeft.studies.files import read_toml, write_text
from tnpeft.studies.statistics import Summary, summary

PAPER = Path(__file__).resolve().parent.parent / "paper"
SLACK = 0.1  # of the budget, within which sizes are counterparts
NOT_RUN = "not run"
Row = Mapping[str, Any]


def counterpart(points: Sequence[Row], task: str, method: str, share: float) -> Row | None:
    """The point of a method whose parameters are nearest to ``share`` of LoRA's at rank 1, within a tenth."""
    unit = next((p["parameters"] for p in points if (p["method"], p["size"]) == ("LoRA", "rank=1")), 0)
    own = [p for p in points if (p["task"], p["method"]) == (task, method)]
    best = min(own, key=lambda p: abs(p["parameters"] - share * unit), default=None)
    return best if best and abs(best["parameters"] - share * unit) <= SLACK * share * unit else None


def beside(published: Row, here: Row, tables: Path) -> Iterator[tuple[Row, str, str, Row]]:
    """Every score of a published table with its counterpart in every study that has one, or in none.

    Yields the published row, the column, the score here as text, and all of it as a row of the CSV file.
    """
    for row in published["rows"]:
        for column, its in here["columns"].items():
            method = row["method"] if its["method"] == "row" else its["method"]
            share = row[its["size"]] * here["steps"][method] / here["steps"]["LoRA"]
            for study in here["studies"]:
                point = counterpart(read(tables / f"{study}.json"), here["tasks"][row["task"]], method, share) or {}
                scores = summary(point["scores"]) if point else None
                yield (
                    row,
                    column,
                    shown(scores, point["size"]) if scores else NOT_RUN,
                    {
                        "table": published["id"],
                        "task": row["task"],
                        "method": row.get("method", column),
                        "published": row[column],
                        "study": study,
                        "size here": point.get("size", ""),
                        "parameters here": point.get("parameters", ""),
                        "mean here": f"{scores.mean:.4f}" if scores else NOT_RUN,
                        "sd here": f"{scores.sd:.4f}" if scores and scores.n > 1 else "",
                        "seeds here": scores.n if scores else 0,
                    },
                )


def shown(its: Summary, size: str) -> str:
    """A score as text."""
    spread, plural = (f" ± {its.sd:.3f}", "s") if its.n > 1 else ("", "")
    return f"{its.mean:.3f}{spread} ({size}, {its.n} seed{plural})"


def read(path: Path) -> list[Row]:
    """The points of a study; none if it was not run."""
    return list(json.loads(path.read_text(encoding="utf-8"))["points"]) if path.exists() else []


def section(published: Row, here: Row, cells: Sequence[tuple[Row, str, str, Row]]) -> str:
    """A published table as Markdown, with a column for each study that has something beside it."""
    lines = [f"## {published['id']}", "", f"{published['what']}. {published['model']}; {published['metric']}."]
    lines += [f"Evidence: {published['evidence']}, {published['source']}.", ""]
    if not cells:
        return "\n".join([*lines, f"**Not run**: {here['why']}.", ""])
    ran = {its["study"] for *_, text, its in cells if text != NOT_RUN}
    own = here["studies"][0]
    if own not in ran:
        lines += [f"`{own}`, the paper's own setting: **not run** ({here['why']}).", ""]
    rows = [dict(row) for row in published["rows"]]
    for row, found in zip(published["rows"], rows, strict=True):
        kept = (cell for cell in cells if cell[0] is row and cell[3]["study"] in ran)
        found |= {f"{column}: {its['study']}": text for _, column, text, its in kept}
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return "\n".join([*lines, Table.of({key: row.get(key, "") for key in keys} for row in rows).markdown(), ""])


def main(paper: Path = PAPER, out: Path = PAPER / "tables") -> None:
    """Write the tables of what is below ``paper`` into ``out``."""
    published = read_toml(paper / "published" / "results.toml")["table"]
    matches = {its["table"]: its for its in read_toml(paper / "published" / "here.toml")["here"]}
    parts, flat = [], []
    for table in published:
        here = matches[table["id"]]
        cells = list(beside(table, here, paper / "tables")) if "studies" in here else []
        parts.append(section(table, here, cells))
        flat += [its for *_, its in cells]
    own = {its["studies"][0] for its in matches.values() if "studies" in its}
    ran = [row["study"] in own for row in flat if row["mean here"] != NOT_RUN]
    same, smaller = sum(ran), len(ran) - sum(ran)
    rows = sum(len(table["rows"]) for table in published)
    head = f"""# Published results, beside what was measured here

Of the {rows} published rows in {len(published)} tables, {same} scores were measured here in the paper's own setting.
{smaller} have a counterpart on a smaller model: the same method at the same share of LoRA's budget at rank 1
(within {SLACK:.0%}), which reproduces no number and is to be read for its direction. Scores here are means and
standard deviations over seeds. What has its like where: `paper/published/here.toml`.
"""
    write_text(out / "results.md", "\n".join([head, *parts]).rstrip() + "\n")
    write_text(out / "results.csv", Table.of(flat).csv())
    print(f"{len(published)} tables: {same} scores measured in their own setting, {smaller} on smaller models")


if __name__ == "__main__":
    main()
