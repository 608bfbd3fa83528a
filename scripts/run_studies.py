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
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tnpeft.studies import Engine, Store, Study, report, sweep
from tnpeft.studies.files import whole

ROOT = Path(__file__).resolve().parent.parent
STUDIES = (
    *("study0_smollm2", "study1_structure_or_step", "study1_controls", "study1_own_steps"),
    *("study2_finer_steps", "study3_constructions", "study2_mpnet"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = f"names of presets (default: {' '.join(STUDIES)})"
    parser.add_argument("studies", nargs="*", default=STUDIES, help=named)
    parser.add_argument("--data", required=True, help="folder with the tasks' files, or hub")
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    parser.add_argument("--workers", type=int, default=0, help="runs side by side (default: one for each core)")
    parser.add_argument("--pack", type=int, default=1, help="runs trained in one pass (default: 1)")
    args = parser.parse_args()
    for name in args.studies:
        study, runs = Study.read(ROOT / "presets" / f"{name}.toml", data=args.data), ROOT / "runs" / name
        if not args.report:
            sweep(study, runs, Engine(workers=args.workers, pack=args.pack), say=lambda line: print(line, flush=True))
        publish(study, runs, ROOT / "paper")


def publish(study: Study, runs: Path, paper: Path) -> None:
    """Report a study in paper/, with the records of its runs, predictions and all, as one compressed file."""
    report(study, runs, paper / "tables", figures=paper / "figures")
    store, path = Store(runs), paper / "records" / f"{study.name}.jsonl.gz"
    keys = sorted({run.key for run in (*study.search(store), *study.confirmation(store))})
    lines = [json.dumps(record, sort_keys=True) for key in keys if (record := store.result(key))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))  # no time of writing


if __name__ == "__main__":
    main()
