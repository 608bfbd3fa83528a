"""A study's tables: rows of plain values, written as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnpeft.studies.files import write_text
from tnpeft.studies.results import Point, nearest
from tnpeft.studies.statistics import Summary, best_under, paired, summary

Row = Mapping[str, Any]


def results_table(points: Sequence[Point]) -> list[Row]:
    """One row for each point: parameters, learning rate, seeds, mean, standard deviation, interval."""
    return [
        {
            "task": p.task,
            "method": p.label,
            "size": p.size,
            "parameters": p.parameters,
            "learning rate": f"{p.lr:g}{' (edge)' if p.edge else ''}",
            "seeds": p.summary.n,
            "mean": f"{p.summary.mean:.4f}",
            "sd": f"{p.summary.sd:.4f}" if p.summary.n > 1 else "",
            "95 % t interval": _interval(p.summary),
        }
        for p in points
    ]


def matched_table(points: Sequence[Point], reference: str) -> list[Row]:
    """Each rung of the reference beside every other method's point within 10 % of its parameters.

    The difference is method minus reference over shared seeds.
    """
    rows = []
    for base in (p for p in points if p.label == reference):
        others: dict[str, list[Point]] = {}
        for p in points:
            if p.task == base.task and p.label != reference and p.kind not in ("full", "none"):
                others.setdefault(p.label, []).append(p)
        for candidates in others.values():
            partner = nearest(candidates, base.parameters)
            difference = paired(partner.scores, base.scores) if partner else None
            if partner and difference:
                rows.append(_matched(base, partner, difference))
    return rows


def _matched(base: Point, partner: Point, difference: Summary) -> Row:
    return {
        "task": base.task,
        "reference": base.name,
        "method": partner.name,
        "parameters": f"{partner.parameters} / {base.parameters}",
        "reference mean": f"{base.summary.mean:.4f}",
        "method mean": f"{partner.summary.mean:.4f}",
        "difference": f"{difference.mean:+.4f}",
        "95 % t interval": _interval(difference, "+.4f"),
        "shared seeds": difference.n,
    }


def _interval(its: Summary, form: str = ".4f") -> str:
    return f"{its.low:{form}} to {its.high:{form}}" if its.n > 1 else ""


def curve_table(points: Sequence[Point]) -> list[Row]:
    """The best-under-budget curve of every method that has several sizes: one row where it rises."""
    rows = []
    groups: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        groups.setdefault((p.task, p.label), []).append(p)
    for (task, label), group in groups.items():
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


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table; empty text for no rows.

    >>> print(markdown([{"a": 1, "b": "x"}]))
    | a | b |
    | --- | --- |
    | 1 | x |
    """
    if not rows:
        return ""
    lines = [list(map(str, rows[0])), ["---"] * len(rows[0]), *([_cell(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return _text(value).replace("|", "\\|").replace("\n", " ")


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header.

    >>> as_csv([{"a": 1, "b": "x, y"}])
    'a,b\\n1,"x, y"\\n'
    """
    if not rows:
        return ""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


_TEX = {character: f"\\{character}" for character in "%_&#${}"}
_TEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
_TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "±": r"\textpm{}", "×": r"\texttimes{}", "−": "-", "\n": " "}


def latex(rows: Sequence[Row]) -> str:
    r"""The rows as a LaTeX ``tabular`` with the rules of booktabs.

    >>> print(latex([{"a": 1, "b": "5 %"}]))
    \begin{tabular}{rl}
    \toprule
    a & b \\
    \midrule
    1 & 5 \% \\
    \bottomrule
    \end{tabular}
    """
    if not rows:
        return ""

    def line(values: Any) -> str:
        return " & ".join("".join(_TEX.get(c, c) for c in _text(v)) for v in values) + r" \\"

    kinds = "".join("r" if isinstance(v, int) else "l" for v in rows[0].values())
    body = [line(row.values()) for row in rows]
    top = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", line(rows[0]), r"\midrule"]
    return "\n".join([*top, *body, r"\bottomrule", r"\end{tabular}"])


def write(rows: Sequence[Row], path: Path, caption: str = "") -> None:
    """Write ``path`` with the endings .md, .csv and .tex."""
    head = f"{caption}\n\n" if caption else ""
    write_text(path.with_suffix(".md"), f"{head}{markdown(rows)}\n")
    write_text(path.with_suffix(".csv"), as_csv(rows))
    write_text(path.with_suffix(".tex"), latex(rows) + "\n")
