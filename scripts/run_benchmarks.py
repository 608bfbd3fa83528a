"""Run the benchmarks whose tables are published, in order, with the settings that are published; about an hour.

Nothing else should run beside it. Names choose some of them. What has run already with the same code and settings is
left as it is, so that an interrupted run goes on where it was; ``--again`` runs it anew.

    python scripts/run_benchmarks.py
    python scripts/run_benchmarks.py step_bare decode
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import _bench

from tnpeft.studies.files import write_text

HERE = Path(__file__).resolve().parent
RUNS = {
    "saved": "bench_saved.py",
    "step_bare": "bench_step.py --bare --layers 2 --samples 9 --clock cpu --name step_bare",
    "rebuilt": "bench_rebuilt.py --samples 9 --clock cpu",
    "rebuilt_short": "bench_rebuilt.py --samples 9 --clock cpu --tokens 128 --name rebuilt_short",
    "decode": "bench_decode.py --samples 9 --clock cpu",
    "attach": "bench_attach.py --clock cpu",
    "growth": "bench_growth.py --samples 5 --clock cpu",
    "replicas": "bench_replicas.py --samples 3 --clock cpu",
    "replicas_kept": "bench_replicas.py --samples 3 --clock cpu --batches 16x32 16x64 --name replicas_kept",
    "packs": "bench_packs.py --cache runs/cache",
    "step": "bench_step.py --layers 2 --samples 5 --clock cpu",
    "step_lora": "bench_step.py --layers 2 --samples 41 --clock cpu --name step_lora "
    "--only 'PEFT LoRA r=8' 'lora rank=8'",
    "sst2": "bench_sst2.py --steps 7 --samples 3 --clock cpu",
}
SENTENCES = ("sst2",)  # which take data and a tokenizer, from the Hugging Face hub unless they are given
GIVEN_BACK = ("replicas",)  # which shows what that costs
# Memory that is given back to the system after every large array is paid for anew with the next one.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def code() -> str:
    """A hash of all that determines what a benchmark measures but its options."""
    total = hashlib.sha256()
    for path in sorted([*HERE.glob("*bench*.py"), *HERE.parent.glob("tnpeft/**/*.py")]):
        total.update(path.relative_to(HERE.parent).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]


def main() -> None:
    """Run what is asked for and has not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--data", help="folder with sst2/train.jsonl.gz and sst2/dev.jsonl.gz")
    parser.add_argument("--tokenizer", help="folder or name of OPT's tokenizer")
    parser.add_argument("--again", action="store_true", help="run what has run already as well")
    parser.add_argument("--out", type=Path, default=_bench.TABLES, help="folder of the results")
    parser.add_argument("--done", type=Path, default=HERE.parent / "runs" / "benchmarks", help="folder of the notes")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in RUNS]
    if unknown:
        sys.exit(f"there is no benchmark {unknown[0]!r}; there are {', '.join(RUNS)}")
    for name in options.names or RUNS:
        script, *rest = shlex.split(RUNS[name])
        note, what = options.done / f"{name}.txt", f"{code()} {RUNS[name]}\n"
        if not options.again and note.is_file() and note.read_text() == what and _result(options.out, name).is_file():
            print(f"== {name} has run", file=sys.stderr, flush=True)
            continue
        print(f"== {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        command = [sys.executable, str(HERE / script), *rest, "--out", str(options.out)]
        for given in ("data", "tokenizer") if name in SENTENCES else ():
            command += [f"--{given}", getattr(options, given)] if getattr(options, given) else []
        subprocess.run(command, check=True, env={**os.environ, **({} if name in GIVEN_BACK else KEPT)})
        write_text(note, what)
        print(f"== {name} took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _result(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


if __name__ == "__main__":
    main()
