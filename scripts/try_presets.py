"""Try every preset that holds a paper's own settings: a few steps of each method on random weights of its model.

Shows that the settings run here, unchanged but for the number of steps and examples, and nothing of how well: the
weights are random and tokens are bytes. Writes ``paper/tables/presets.md``, ``.csv`` and ``.tex``, a row as soon as
it is there; presets that are not named keep theirs.

    python scripts/try_presets.py --data ../shared/data
    python scripts/try_presets.py --data ../shared/data tera_opt
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tnpeft.studies import Study, trial
from tnpeft.studies.reports import tables

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("cp_steps", "tenslora_roberta", "lorta_roberta", "tera_opt")
INSTEAD = {"tenslora_roberta": "rte"}  # CoLA and MRPC may not be at hand: another pair of sentences in their place
CAPTION = """Papers' presets, each tried for a few steps with **random weights** of the model's shape, **bytes as
tokens** (a stand-in: no vocabulary of these models is at hand) and real examples. *counted* is worked out without
a model, *trained* is what the model trains; *peak* is the memory of the whole process; times are of a machine that
other work shared. A loss of random weights says nothing but that it is finite."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=PRESETS, help=f"names (default: {' '.join(PRESETS)})")
    parser.add_argument("--data", required=True, help="folder with the tasks' files")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="examples a step (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "paper" / "tables", help="folder of the table")
    args = parser.parse_args()
    path = args.out / "presets.md"
    rows = [row for row in read(path.with_suffix(".csv")) if row["preset"] not in args.presets]
    for name in args.presets:
        preset = ROOT / "presets" / f"{name}.toml"
        study = Study.read(preset, data=args.data)
        if name in INSTEAD and not (Path(args.data) / study.tasks[0].train).exists():
            study = Study.read(preset, data=args.data, tasks=[INSTEAD[name]])
        for row in trial(study, steps=args.steps, batch=args.batch):
            del row["study"]
            rows.append({"preset": name, **row})
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            order = sorted(rows, key=lambda row: PRESETS.index(row["preset"]))
            tables.write(order, path, " ".join(CAPTION.split()))
    sys.exit(any(row["outcome"] != "losses finite" for row in rows))


def read(path: Path) -> list[Mapping[str, Any]]:
    """The rows of an earlier run, its numbers as numbers."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [{k: int(v) if v.isdecimal() else v for k, v in row.items()} for row in csv.DictReader(stream)]


if __name__ == "__main__":
    main()
