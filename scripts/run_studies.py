"""Run the studies of the report in order and put their tables and figures into paper/.

Every sweep goes on where it was, so this can be stopped and started again at will; one name runs one study.

    python scripts/run_studies.py --data DATA
    python scripts/run_studies.py --data DATA --pack 16 study1_structure_or_step
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from build_report import show

from tnpeft.studies import Engine, Store, Study, report, sweep
from tnpeft.studies.files import whole

ROOT = Path(__file__).resolve().parent.parent
STUDIES = (
    "study0_smollm2",
    "study1_structure_or_step",
    "study1_controls",
    "study1_own_steps",
    "study2_finer_steps",
    "study3_constructions",
    "study2_mpnet",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "studies", nargs="*", default=STUDIES, help=f"names of presets (default: {' '.join(STUDIES)})"
    )
    parser.add_argument("--data", required=True, help="folder with the tasks' files, or hub")
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    parser.add_argument("--workers", type=int, default=0, help="runs side by side (default: one for each core)")
    parser.add_argument("--pack", type=int, default=1, help="runs trained in one pass (default: 1)")
    args = parser.parse_args()
    for name in args.studies:
        study, runs = Study.read(ROOT / "presets" / f"{name}.toml", data=args.data), ROOT / "runs" / name
        if not args.report:
            sweep(study, runs, Engine(workers=args.workers, pack=args.pack), say=lambda line: print(line, flush=True))
        publish(study, runs)


def publish(study: Study, runs: Path) -> None:
    """Report a study in paper/, with the records of its runs."""
    report(study, runs, runs / "report")
    write_records(study, runs, ROOT / "paper" / "records" / f"{study.name}.jsonl.gz")
    shutil.copyfile(runs / "report" / f"{study.name}.json", ROOT / "paper" / "tables" / f"{study.name}.json")
    show(ROOT / "paper", study.name)


def write_records(study: Study, runs: Path, path: Path) -> None:
    """Write the records of a study's runs, predictions and all, as one compressed file without times of writing."""
    store = Store(runs)
    keys = sorted({run.key for run in (*study.search(store), *study.confirmation(store))})
    lines = [json.dumps(record, sort_keys=True) for key in keys if (record := store.result(key))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part, part.open("wb") as stream:
        stream.write(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))


if __name__ == "__main__":
    main()
