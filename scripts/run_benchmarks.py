"""Run the benchmarks whose tables are published, in order, with the settings that are published; about 25 minutes.

Nothing else should run beside it. Names choose some of them.

    python scripts/run_benchmarks.py
    python scripts/run_benchmarks.py step_bare decode
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = {
    "saved": ["bench_saved.py"],
    "step_bare": [*"bench_step.py --bare --layers 2 --samples 9 --clock cpu --name step_bare".split()],
    "rebuilt": [*"bench_rebuilt.py --samples 9 --clock cpu".split()],
    "decode": [*"bench_decode.py --samples 9 --clock cpu".split()],
    "attach": ["bench_attach.py"],
    "growth": [*"bench_growth.py --samples 5 --clock cpu".split()],
    "replicas": [*"bench_replicas.py --samples 5 --clock cpu".split()],
    "step": [*"bench_step.py --layers 2 --samples 5 --clock cpu".split()],
}
# Memory that is given back to the system after every large array is paid for anew with the next one.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(RUNS)} (default: all)")
    names = parser.parse_args().names or [*RUNS]
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        sys.exit(f"there is no benchmark {unknown[0]!r}; there are {', '.join(RUNS)}")
    for name in names:
        script, *options = RUNS[name]
        print(f"== {name}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, str(HERE / script), *options], check=True, env={**os.environ, **KEPT})


if __name__ == "__main__":
    main()
