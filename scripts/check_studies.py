"""Guards over the committed studies, and a run of minutes: are conclusions allowed that the report draws?

Fails if a chosen rate or step stands at an end of its grid, if a verdict stands on fewer than eight independent
observations, or if a study's backbone is not in ``paper/backbones.toml``. With ``--run`` the controls (LoRA, LoRA in
another gauge, MoSLoRA, Tucker, block terms) are trained with steps of the update on two backbones: their mean losses
must differ by no more than replicates of one control make likely.

    python scripts/check_studies.py
    python scripts/check_studies.py --run
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from build_report import PAPER, Facts, Missing, studies

from tnpeft.studies import Engine, Study, report, sweep
from tnpeft.studies.reports.points import Point
from tnpeft.studies.statistics import VERDICT, summary


def problems(paper: Path) -> Iterator[str]:
    """Yield what the committed results do not allow."""
    facts = Facts(paper)
    for name in studies(paper):
        try:
            for p in facts.points(name):
                if p.edge:
                    yield f"{name}: the value of {p.name} stands at an end of its grid"
            for row in facts.rows(f"{name}-contrasts") if facts.data(name)["contrasts"] else ():
                if row["verdict"] and int(row["n"]) < VERDICT:
                    yield f"{name}: {row['contrast']} has a verdict on {row['n']} observations"
        except Missing as error:
            yield str(error)


def spread(points: tuple[Point, ...]) -> tuple[float, float]:
    """Return the largest difference between the controls' mean losses, and the noise floor: the 95 % half-width of a
    difference of two such means, from the spread of one control over its replicates."""
    found = [summary(list(p.losses.values())) for p in points]
    means = [its.mean for its in found]
    return max(means) - min(means), 2.8 * fmean(its.sd**2 for its in found) ** 0.5 / found[0].n ** 0.5


def train() -> Iterator[str]:
    """Train the controls and yield that they differ, if they do."""
    with tempfile.TemporaryDirectory() as made:
        study = Study.read(PAPER.parent / "presets" / "controls_digits.toml", cache=made)
        sweep(study, Path(made) / "runs", Engine(pack=8), say=lambda line: None)
        gap, floor = spread(report(study, Path(made) / "runs", Path(made) / "report"))
    print(f"controls: mean losses within {gap:.3f}, noise floor {floor:.3f}")
    if gap > floor:
        yield f"the controls differ by {gap:.3f}, over their noise floor {floor:.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="train the controls as well, a minute or two")
    found = [*problems(PAPER), *(train() if parser.parse_args().run else ())]
    print(*found or ["studies: no guard is broken"], sep="\n")
    sys.exit(bool(found))
