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
from tnpeft.studies.statistics import summary

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


def beside(published: Row, here: Row, tables: Path) -> Iterator[tuple[int, str, str, Row]]:
    """Every score of a published table with its counterpart in every study that may have one.

    Yields the published row's number, the column, the score here as text, and all of it as a row of the CSV file.
    """
    points = {}
    for study in here.get("studies", ()):
        path = tables / f"{study}.json"
        points[study] = json.loads(path.read_text(encoding="utf-8"))["points"] if path.exists() else []
    for number, row in enumerate(published["rows"]):
        for column, its in here["columns"].items() if points else ():
            method = row["method"] if its["method"] == "row" else its["method"]
            share = row[its["size"]] * here["steps"][method] / here["steps"]["LoRA"]
            for study, every in points.items():
                flat = {"table": published["id"], "task": row["task"], "method": row.get("method", column)}
                flat |= {"published": row[column], "study": study, "size here": "", "parameters here": ""}
                flat |= {"mean here": NOT_RUN, "sd here": "", "seeds here": 0}
                text = NOT_RUN
                if point := counterpart(every, here["tasks"][row["task"]], method, share):
                    scores, size = summary(point["scores"]), point["size"]
                    sd, plural = (f"{scores.sd:.4f}", "s") if scores.n > 1 else ("", "")
                    text = f"{scores.mean:.3f}{sd and f' ± {scores.sd:.3f}'} ({size}, {scores.n} seed{plural})"
                    flat |= {"size here": size, "parameters here": point["parameters"]}
                    flat |= {"mean here": f"{scores.mean:.4f}", "sd here": sd, "seeds here": scores.n}
                yield number, column, text, flat


def section(published: Row, here: Row, cells: Sequence[tuple[int, str, str, Row]]) -> str:
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
    for number, column, text, its in cells:
        if its["study"] in ran:
            rows[number][f"{column}: {its['study']}"] = text
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return "\n".join([*lines, Table.of({key: row.get(key, "") for key in keys} for row in rows).markdown(), ""])


def main(paper: Path = PAPER, out: Path = PAPER / "tables") -> None:
    """Write the tables of what is below ``paper`` into ``out``."""
    published = read_toml(paper / "published" / "results.toml")["table"]
    matches = {its["table"]: its for its in read_toml(paper / "published" / "here.toml")["here"]}
    cells = {table["id"]: [*beside(table, matches[table["id"]], paper / "tables")] for table in published}
    parts = [section(table, matches[table["id"]], cells[table["id"]]) for table in published]
    flat = [its for each in cells.values() for *_, its in each]
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
