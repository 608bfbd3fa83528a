"""A real, small study in minutes: which adapter, at how many parameters, is how good?

Pretrains a small OPT on handwritten digits, adapts it to inverted and transposed ones with many adapters and seeds,
and leaves a table (md, csv, tex) and a figure (png, pdf, svg). Stopped and started again it goes on where it was.

    python scripts/demo.py --out demo
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tnpeft.studies import Engine, Study, report, sweep
from tnpeft.studies.tables import markdown, results_table

PRESET = Path(__file__).resolve().parent.parent / "presets" / "digits_demo.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="runs side by side (default: one for each core)")
    args = parser.parse_args()
    start = time.perf_counter()
    study = Study.read(PRESET, cache=str(args.out / "cache"))
    sweep(study, args.out / "runs", Engine(workers=args.workers, pack=8), say=lambda line: print(line, flush=True))
    points = report(study, args.out / "runs", args.out)
    print(markdown(results_table(points)))
    print(f"\n{args.out / study.name}.md and {args.out / study.name}.png, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
