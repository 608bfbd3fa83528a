"""Build the studies' tables and figures, then paper/report.md from paper/report.in.md, all from files below paper/.

The template's expressions are those of Jinja; :class:`Facts` lists what they can ask for. A number that no file
holds ends the build with the name of what is missing, as does a study on a backbone that is not in
``paper/backbones.toml``.

    python scripts/build_report.py
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from tnpeft._text import Table
from tnpeft.studies.files import read_toml, write_text
from tnpeft.studies.reports import tables
from tnpeft.studies.reports.points import Point
from tnpeft.studies.reports.reporting import render
from tnpeft.studies.statistics import VERDICT, Finding, Summary, exchange_rate, paired, variance_ratio

PAPER = Path(__file__).resolve().parent.parent / "paper"
MEASURES = {"metric": ("scores", 100, " points"), "loss": ("losses", 1, "")}  # what is compared, times, unit


class Missing(LookupError):
    """A number that no result file holds."""


class Facts:
    """What the report can ask for."""

    def __init__(self, paper: Path) -> None:
        self.paper = paper
        self.data = cache(self._data)
        self.points = cache(self._points)

    # ---- files

    def _text(self, name: str) -> str:
        path = self.paper / "tables" / name
        if not path.exists():
            raise Missing(f"{path} is not there: run the script that writes it first")
        return path.read_text(encoding="utf-8")

    def _data(self, study: str) -> Any:
        found, known = json.loads(self._text(f"{study}.json")), read_toml(self.paper / "backbones.toml")
        if not found.get("backbones"):
            raise Missing(f"{study} names no backbone by its hash: run it again")
        for backbone, identity in found["backbones"].items():
            if known.get(Path(backbone).name) != identity:
                raise Missing(f"{study} was run on {backbone} ({identity}), which is not in backbones.toml")
        return found

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of a table."""
        return list(csv.DictReader(self._text(f"{name}.csv").splitlines()))

    def table(self, name: str) -> str:
        """A table as Markdown."""
        return Table.of(self.rows(name)).markdown()

    # ---- studies

    def _points(self, study: str, **fields: str) -> tuple[Point, ...]:
        found = map(Point.of, self.data(study)["points"])
        return tuple(p for p in found if fields.items() <= vars(p).items())

    def point(self, study: str, name: str) -> Point:
        """A study's point by its full name, ``"P1: LoRA (rank=2)"``, or without its size."""
        found = [p for p in self.points(study) if name in (p.name, p.name.partition(" (")[0])]
        if len(found) != 1:
            raise Missing(f"{study} has {len(found) or 'no'} {name}")
        return found[0]

    def mean(self, study: str, name: str) -> str:
        """The mean score over seeds in percent, with its interval and number."""
        return shown(self.point(study, name).summary, 100, " %", ".1f")

    def difference(self, study: str, one: str, other: str, measure: str = "metric") -> str:
        """``one`` minus ``other`` over shared replicates, in points or in cross-entropy, with interval and number."""
        held, scale, unit = MEASURES[measure]
        its = paired(*(getattr(self.point(study, name), held) for name in (one, other)))
        if its is None:
            raise Missing(f"{one} and {other} have no common seed in {study}")
        return shown(its, scale, unit)

    def _findings(self, study: str) -> Iterator[tuple[Finding, str, str]]:
        """The declared contrasts of a study, each with its difference and margin as text."""
        declared = self.data(study)["contrasts"]
        for its, row in zip(tables.contrasts(self.points(study), declared), declared, strict=True):
            _, scale, unit = MEASURES[row["measure"]]
            margin = its.margin * scale
            limit = f"{margin:g}{unit.rstrip('s') if margin == 1 else unit}"
            yield its, shown(its.summary, scale, unit) if its.summary else "not run", limit

    def contrast(self, study: str, name: str) -> str:
        """A declared contrast, ``+1.0 points (+0.1 to +1.9, n = 8; higher)``: the verdict where there is one."""
        for its, difference, _ in self._findings(study):
            if its.name == name:
                return f"{difference.removesuffix(')')}; {its.word})" if its.word else difference
        raise Missing(f"{study} declares no contrast {name!r}")

    def contrasts(self, *studies: str) -> str:
        """The declared contrasts of studies as a table, with the verdicts that there are."""
        verdict, none = "verdict at 5 % over all", f"none under {VERDICT} observations"
        return Table.of(
            {"contrast": its.name, "difference": difference, "margin": margin, verdict: its.word or none}
            for study in studies
            for its, difference, margin in self._findings(study)
        ).markdown()

    def variances(self, study: str, policy: str, base: str) -> str:
        """The variance between families under a policy over that under another, with its interval."""
        its = variance_ratio(
            *([p.losses for p in self.points(study, policy=name) if p.losses] for name in (policy, base))
        )
        if its is None:
            raise Missing(f"{study} has no variance between families under {policy} and {base}")
        return over(its, "backbones")

    def under(self, study: str, policy: str, own: str, points: float) -> str:
        """The families whose mean under a policy is more than so many points under their own tuned one."""
        tuned = {p.label: p.scores for p in reversed(self.points(study, policy=own))}
        gaps = [(p.label, paired(p.scores, tuned.get(p.label, {}))) for p in self.points(study, policy=policy)]
        low = [f"{label} {shown(its, 100, ' points')}" for label, its in gaps if its and 100 * its.mean < -points]
        return ", ".join(low) or "none"

    def near(self, study: str, policy: str, label: str) -> str:
        """How many methods chose a relative step within half a decade of one method's, and their learning rates.

        Methods whose grid is of learning rates are left out.
        """
        its = [p for p in self.points(study, policy=policy) if p.step]
        (own,) = [float(p.step) for p in its if p.label == label]
        close = [p for p in its if 0.3 < float(p.step) / own < 3.3]
        rates = sorted(float(p.lr) for p in its)
        return f"{len(close)} of {len(its)} (their learning rates: {rates[0]:.2g} to {rates[-1]:.2g})"

    def exchange(self, study: str, policy: str, of: str, against: str) -> str:
        """Parameters of one family that reach the loss of one parameter of another, with a jackknife interval."""
        curves = (self.points(study, policy=policy, label=label) for label in (of, against))
        its = exchange_rate(*([(p.parameters, p.losses) for p in curve] for curve in curves))
        return over(its, "seeds") if its else "cannot be read off: the curves have no common loss"

    def settings(self, *studies: str) -> str:
        """The settings of studies side by side, and their backbones."""
        keys = ("backbone", "targets", "train", "dev", "steps", "batch", "head", "max_length", "dtype", "seeds")
        found = {}
        for study in studies:
            data = self.data(study)
            own = {"targets": ", ".join(data["settings"]["targets"]), "seeds": str(len(data["seeds"]))}
            found[study] = {**data["settings"], **own, "backbone": data["backbone"]}
        rows = ({"setting": key, **{study: its[key] for study, its in found.items()}} for key in keys)
        return Table.of(rows).markdown()


def over(its: Summary, what: str) -> str:
    """A ratio with its interval and the number behind it."""
    return f"{its.mean:.2g} ({its.low:.2g} to {its.high:.2g}, {its.n} {what})"


def shown(its: Summary, scale: float, unit: str, form: str = "") -> str:
    """A mean with its interval and the number behind it."""
    form = form or ("+.1f" if scale > 1 else "+.3f")
    within = f"{scale * its.low:{form}} to {scale * its.high:{form}}, n = {its.n}" if its.n > 1 else "n = 1"
    return f"{scale * its.mean:{form}}{unit} ({within})"


def show(paper: Path, name: str) -> None:
    """Make the tables and figures of one study from its results."""
    facts = json.loads((paper / "tables" / f"{name}.json").read_text(encoding="utf-8"))
    render(facts, paper / "tables", paper / "figures")


def studies(paper: Path) -> list[str]:
    """The names of the studies whose results are there."""
    paths = sorted((paper / "tables").glob("*.json"))
    return [path.stem for path in paths if "points" in json.loads(path.read_text(encoding="utf-8"))]


def build(paper: Path) -> None:
    """Write ``report.md`` beside ``report.in.md``.

    Raises:
        Missing: the template asks for a number that no file holds, or a study's backbone is unknown.
    """
    facts = Facts(paper)
    for name in studies(paper):
        facts.data(name)
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
