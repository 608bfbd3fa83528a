"""Run the studies of the report in order and put their tables and figures into paper/.

Every sweep goes on where it was, so this can be stopped and started again at will; one name runs one study.

    python scripts/run_studies.py --data ../shared/data
    python scripts/run_studies.py --data ../shared/data cp_steps_small_opt
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from build_report import show

from tnpeft.studies import Engine, Study, report, sweep

ROOT = Path(__file__).resolve().parent.parent
STUDIES = (
    "cp_steps_small_opt_rates",
    "cp_steps_small_opt",
    "cp_steps_small_opt_pairs",
    "cp_steps_smollm2_rates",
    "cp_steps_smollm2_larger_rates",
    "cp_steps_smollm2",
    "families_digits",
    "tenslora_digits",
    "tenslora_small_opt",
    "families_small_opt",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "studies", nargs="*", default=STUDIES, help=f"names of presets (default: {' '.join(STUDIES)})"
    )
    parser.add_argument("--data", required=True, help="folder with the tasks' files, or hub")
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    parser.add_argument("--workers", type=int, default=0, help="runs side by side (default: one for each core)")
    args = parser.parse_args()
    for name in args.studies:
        study, runs = Study.read(ROOT / "presets" / f"{name}.toml", data=args.data), ROOT / "runs" / name
        if not args.report:
            sweep(study, runs, Engine(workers=args.workers), say=lambda line: print(line, flush=True))
        publish(study, runs)


def publish(study: Study, runs: Path) -> None:
    """Report a study in paper/, with the record of the backbone that was pretrained for it."""
    report(study, runs, runs / "report")
    tables = ROOT / "paper" / "tables"
    shutil.copyfile(runs / "report" / f"{study.name}.json", tables / f"{study.name}.json")
    record = Path(study.places["model"]) / "pretraining.json"
    if record.exists():
        shutil.copyfile(record, tables / "small_opt.json")
    show(ROOT / "paper", study.name)


if __name__ == "__main__":
    main()
