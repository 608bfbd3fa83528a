"""Run one benchmark, or those whose tables are published with the settings that are published.

    python scripts/bench.py step --bare --layers 2 --clock cpu    # one; -h for its options
    python scripts/bench.py step --bare --against ../other        # the same cases of another checkout, in turn
    python scripts/bench.py all                                   # as published, about an hour
    python scripts/bench.py decode step_bare                      # some of these
    python scripts/bench.py goals                                 # the page of goals, from the results

A benchmark NAME is the module bench/NAME.py: its docstring is the help; it has a TITLE, OPTIONS, ABOUT (text with
settings in braces) or ``about(data)``, and ``tables(data)``, rows or rows by heading; EXACT if nothing is timed; and
either ``measure(options)`` or, where all that is timed are cases over a floor, ``cases(options)``. Results are
NAME.json and NAME.md.

``all`` leaves alone what has run already with the same code and settings, so that an interrupted run goes on where it
was; ``--again`` runs it once more. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.models import SHAPES
from tnpeft.studies.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "paper" / "tables"
PUBLISHED = {
    "saved": "saved",
    "step_bare": "step --bare --layers 2 --samples 9 --clock cpu",
    "rebuilt": "rebuilt --samples 9 --clock cpu",
    "rebuilt_short": "rebuilt --samples 9 --clock cpu --tokens 128",
    "decode": "decode --samples 21 --clock cpu",
    "mixed": "mixed --samples 15 --clock cpu",
    "optimizer": "optimizer --samples 9 --clock cpu",
    "attach": "attach --clock cpu",
    "growth": "growth --samples 5 --clock cpu",
    "experts": "experts --clock cpu",
    "replicas": "replicas --samples 3 --clock cpu",
    "replicas_kept": "replicas --samples 3 --clock cpu --batches 16x32 16x64",
    "packs": "packs --cache runs/cache",
    "step": "step --layers 2 --samples 5 --clock cpu",
    "step_lora": "step --layers 2 --samples 41 --clock cpu --only 'PEFT LoRA r=8' 'lora rank=8'",
    "sst2": "sst2 --steps 7 --samples 3 --clock cpu",
    "full_size": "full_size",
    "forward_gpu": "forward --samples 15 --device cuda --dtype bfloat16",
    "forward_gpu_narrow": "forward --samples 15 --device cuda --dtype bfloat16 --narrow",
    "step_gpu_narrow": "step --samples 15 --shape opt-1.3b --length 512 --device cuda --dtype bfloat16 --narrow "
    "--only 'PEFT LoRA r=8' 'lora rank=8' 'cp rank=8' 'lorta rank=8' 'tenslora qkv_depth ranks=8' 'tera ranks=8' "
    "'PEFT VeRA r=256' 'vera rank=256' 'PEFT LoKr r=8' 'lokr rank=8'",
    "replicas_gpu": "replicas --samples 9 --device cuda --dtype bfloat16 --shapes opt-125m:12 "
    "--families none 'lora r=8' 'cp r=16' --batches 16x32 16x64",
    "mixed_gpu": "mixed --samples 15 --shape opt-1.3b --layers 12 --device cuda --dtype bfloat16",
}
NAMES = tuple(dict.fromkeys(command.split()[0] for command in PUBLISHED.values()))
SENTENCES = ("sst2",)  # which take data and a tokenizer, from the Hugging Face hub unless they are given
GIVEN_BACK = ("replicas",)  # which shows what that costs
# Memory that is given back to the system after every large array is paid for once more with the next one.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

# ---- options

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = {"choices": CLOCKS, "help": "cpu: time that other work cannot add to"}
DEVICE = {"device": {"choices": ("cpu", "cuda"), "default": "cpu"}}
DTYPE = {"dtype": {"choices": ("float32", "bfloat16", "float16"), "default": "float32"}}
ONLY = {"only": {"nargs": "+", "help": "cases to run, with the floor"}}
PRIVATE = ("out", "only", "against", "data", "tokenizer", "cache")  # paths, and what the rows tell


def parse(name: str, arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """Return the module of a benchmark and its options."""
    module: Any = importlib.import_module(f"bench.{name}")
    options = {"samples": 9, "threads": 1, "clock": {**CLOCK, "default": "wall"}, "name": name, "out": TABLES}
    if hasattr(module, "cases"):
        options["against"] = {"type": Path, "help": "another checkout, whose cases are timed in turn with these"}
    parser = argparse.ArgumentParser(
        f"bench.py {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, value in {**options, **module.OPTIONS}.items():
        parser.add_argument(f"--{option}", **(value if isinstance(value, dict) else _argument(value)))
    found = parser.parse_args(arguments)
    if "shape" in found:
        found.layers = found.layers or SHAPES[found.shape][2]
    return module, found


def _argument(default: Any) -> dict[str, Any]:
    """Return the argument of an option that is given by its default."""
    if isinstance(default, bool):
        return {"action": "store_true"}
    many = {"nargs": "+", "type": type(default[0])} if isinstance(default, tuple) else {"type": type(default)}
    return {**many, "default": default, "help": "default: %(default)s"}


def chosen(known: Mapping[str, Any], only: Sequence[str] | None) -> dict[str, Any]:
    """Return the cases that are asked for, with the floors."""
    unknown = sorted({*(only or ())} - {*known})
    if unknown:
        sys.exit(f"unknown case {unknown[0]!r}; the cases are {', '.join(known)}")
    return {name: case for name, case in known.items() if not only or name in only or name.startswith("floor")}


def progress(what: Any) -> None:
    """Tell on the error stream what was found."""
    print(what, file=sys.stderr, flush=True)


# ---- times


@dataclass(frozen=True)
class Case:
    """A run that is timed over a floor, facts about it, and the time's name and divisor."""

    run: Callable[[], Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    floor: str = "floor"
    unit: str = "milliseconds"
    per: int = 1


def stopwatch(run: Callable[[], Any], clock: str, device: str = "cpu") -> Callable[[], float]:
    """Return a function that runs and returns the seconds that it took."""
    now, wait = CLOCKS[clock], torch.cuda.synchronize if device == "cuda" else lambda: None

    def sample() -> float:
        wait()
        start = now()
        run()
        wait()
        return now() - start

    return sample


def once(run: Callable[[], Any], clock: str) -> tuple[Any, float]:
    """Return what a run returns, and the seconds that it took."""
    start = CLOCKS[clock]()
    return run(), CLOCKS[clock]() - start


def in_turn(samplers: Mapping[str, Callable[[], float]], samples: int, warm: int = 1) -> dict[str, list[float]]:
    """Return seconds of each, one sample of each in turn, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    gc.collect()
    gc.disable()
    try:
        for sample in range(-warm, samples):
            for name, sampler in samplers.items():
                seconds = sampler()
                times[name] += [seconds] if sample >= 0 else []
    finally:
        gc.enable()
    return times


def interleaved(runs: Mapping[str, Callable[[], Any]], samples: int, clock: str, device: str = "cpu") -> Any:
    """Return seconds of each run, in turn."""
    return in_turn({name: stopwatch(run, clock, device) for name, run in runs.items()}, samples)


def ratio(times: Sequence[float], floor: Sequence[float]) -> float:
    """Return the median of the ratios of neighbouring samples: both met the same load."""
    return median(a / b for a, b in zip(times, floor, strict=True))


class Worker:
    """A process that has the cases of one checkout; this checkout's benchmark runs the package of that one."""

    def __init__(self, root: Path, name: str, arguments: Sequence[str]) -> None:
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "worker", name, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes)
        self.cases = self._answer()
        if not Path(self.cases.pop("package")).is_relative_to(root.resolve()):
            sys.exit(f"{root} has no package tnpeft")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.communicate()

    def seconds(self, name: str) -> float:
        """Return the seconds of one sample of a case."""
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit("a worker has failed")


def serve(name: str, arguments: Sequence[str]) -> None:
    """Answer a parent: with the cases, then with the seconds of each case that it names."""
    import tnpeft

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    module, options = parse(name, arguments)
    cases = _cases(module, options)
    clock = options.clock, getattr(options, "device", "cpu")
    samplers = {key: stopwatch(case.run, *clock) for key, case in cases.items()}
    shown: dict[str, Any] = {key: {**vars(case), "run": None} for key, case in cases.items()}
    print(json.dumps({**shown, "package": str(Path(tnpeft.__file__).resolve())}), file=answers, flush=True)
    gc.disable()
    for line in sys.stdin:
        print(samplers[line.rstrip("\n")](), file=answers, flush=True)


def _cases(module: Any, options: argparse.Namespace) -> dict[str, Case]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return dict(module.cases(options))


def timed(module: Any, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the cases of a benchmark with their times, all in turn, those of another checkout among them."""
    with ExitStack() as stack:
        if options.against:
            name = module.__name__.rpartition(".")[2]
            workers = [stack.enter_context(Worker(at, name, arguments)) for at in (ROOT, options.against.resolve())]
            cases = {key: Case(**case) for key, case in workers[0].cases.items()}
            theirs: dict[str, Any] = {key: case["facts"] for key, case in workers[1].cases.items()}
            samplers = {
                f"{key}{which}": partial(worker.seconds, key)
                for key in cases
                for which, worker in zip(("", "@"), workers, strict=True)
            }
        else:
            cases, theirs = _cases(module, options), {}
            clock = options.clock, getattr(options, "device", "cpu")
            samplers = {key: stopwatch(case.run, *clock) for key, case in cases.items()}
        times = in_turn(samplers, options.samples, 3 if getattr(options, "compile", False) else 1)

    def row(key: str, case: Case, which: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        its, floor = times[key + which], times[case.floor + which]
        return {**facts, case.unit: 1e3 * median(its) / case.per, "overhead": ratio(its, floor) - 1, "samples": its}

    found: dict[str, Any] = {"cases": {key: row(key, case, "", case.facts) for key, case in cases.items()}}
    if theirs:
        found["against"] = {
            key: {**row(key, case, "@", theirs[key]), "time": ratio(times[key], times[f"{key}@"])}
            for key, case in cases.items()
        }
        found["commits"] = [_commit(ROOT), _commit(options.against)]
    return found


def _commit(root: Path) -> str:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# ---- pages


def by_column(cases: Mapping[str, Any], fact: str, head: str, shown: str) -> list[dict[str, Any]]:
    """Return a row for each kind of case and a column for each value of a fact; cases are named "kind, value ..."."""
    rows: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        cell = f"{case['milliseconds']:.3g} ms" if name.startswith("floor") else shown.format(case["overhead"])
        kind = name.rpartition(", ")[0]
        rows.setdefault(kind, {"case": kind})[head.format(case[fact])] = cell
    return [*rows.values()]


def machine(threads: int | None = None) -> dict[str, Any]:
    """Return what it ran on and with."""
    import peft
    import transformers

    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(names, platform.processor()),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table: text to the left, numbers to the right."""
    from tnpeft._text import Table  # which another checkout may lack

    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    align = "".join(">" if all(_number(row.get(name, 0)) for row in rows) else "<" for name in columns)
    cells = [[f"{v:.3g}" if isinstance(v, float) else v for v in map(row.get, columns)] for row in rows]
    return f"{Table(tuple(columns), tuple(map(tuple, cells)), align).markdown()}\n"


def _number(value: Any) -> bool:
    return not isinstance(value, str) or not value or value[0] in "+-0123456789"


def page(module: Any, data: Mapping[str, Any]) -> str:
    """Return the title, what was measured, the settings and the machine, and the tables."""
    s, m = data["settings"], data["machine"]
    about = module.about(data) if hasattr(module, "about") else " ".join(module.ABOUT.split()).format(**s)
    text = f"# {module.TITLE}\n\n{about}"
    if not getattr(module, "EXACT", False):
        text += (
            f" {s.get('dtype', 'float32')}, {s.get('device', 'cpu')}, {m['threads']} threads, {s['samples']} "
            f"interleaved samples by the {s['clock']} clock, load {m['load']} on {m['cores']} cores "
            f"({m['gpu'] or m['processor']}; torch {m['torch']}, peft {m['peft']})"
            f"{'; freed memory is kept, not given back to the system' * bool(s['malloc'])}."
        )
    text += "\n"
    tables = module.tables(data)
    for heading, rows in {**(tables if isinstance(tables, dict) else {"": tables}), **_against(data)}.items():
        text += f"\n## {heading}\n" if heading else ""
        text += f"\n{rows if isinstance(rows, str) else markdown(rows)}"
    return text


def _against(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of two checkouts, if there are two."""
    theirs = data.get("against", {})
    rows = [
        {"case": name, "over floor": f"{row['overhead']:+.1%}", "theirs": f"{theirs[name]['overhead']:+.1%}"}
        | {"time over theirs": f"{theirs[name]['time']:.3f}"}
        | {f"{fact}, theirs": theirs[name][fact] for fact, value in row.items() if isinstance(value, int)}
        for name, row in data["cases"].items()
    ] if theirs else []  # fmt: skip
    return {f"{data['commits'][0]} against {data['commits'][1]}": rows} if theirs else {}


def run(name: str, arguments: Sequence[str]) -> None:
    """Measure, write, and print the page."""
    module, options = parse(name, arguments)
    if hasattr(module, "cases"):
        found = timed(module, options, arguments)
    else:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        found = module.measure(options)
    settings = {option: value for option, value in vars(options).items() if option not in PRIVATE}
    settings["malloc"] = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    settings |= found.pop("settings", {})
    data = json.loads(json.dumps({"settings": settings, "machine": machine(options.threads), **found}))
    path = options.out / options.name
    write_json(path.with_suffix(".json"), data)
    write_text(path.with_suffix(".md"), page(module, data))
    print(page(module, data))


# ---- all of them


def code() -> str:
    """Return a hash of all that determines what a benchmark measures but its options."""
    total = hashlib.sha256()
    for path in sorted([*ROOT.glob("scripts/bench/*.py"), *ROOT.glob("tnpeft/**/*.py")]):
        total.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]


def run_published(arguments: Sequence[str]) -> None:
    """Run what is asked for and has not run, each in its own process."""
    parser = argparse.ArgumentParser(
        "bench.py all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(PUBLISHED)} (default: all)")
    parser.add_argument("--data", help="folder with sst2/train.jsonl.gz and sst2/dev.jsonl.gz")
    parser.add_argument("--tokenizer", help="folder or name of OPT's tokenizer")
    parser.add_argument("--again", action="store_true", help="run what has run already as well")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the results")
    parser.add_argument("--done", type=Path, default=ROOT / "runs" / "benchmarks", help="folder of the notes")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in PUBLISHED]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; those published are {', '.join(PUBLISHED)}")
    for name in options.names or PUBLISHED:
        if "--device cuda" in PUBLISHED[name] and not torch.cuda.is_available():
            progress(f"== {name} needs a GPU: left as it is")
            continue
        note, what = options.done / f"{name}.txt", f"{code()} {PUBLISHED[name]}\n"
        ran = note.is_file() and note.read_text() == what and (options.out / f"{name}.json").is_file()
        progress(f"== {name}{' has run' if ran and not options.again else ''}")
        if ran and not options.again:
            continue
        start = time.perf_counter()
        command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *shlex.split(PUBLISHED[name])]
        command += ["--name", name, "--out", str(options.out)]
        for given in ("data", "tokenizer") if name in SENTENCES else ():
            command += [f"--{given}", getattr(options, given)] if getattr(options, given) else []
        subprocess.run(command, check=True, env={**os.environ, **({} if name in GIVEN_BACK else KEPT)})
        write_text(note, what)
        progress(f"== {name} took {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Run what the command line names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name == "all":
        run_published(rest)
    elif name == "worker":
        serve(rest[0], rest[1:])
    elif name in (*NAMES, "goals") and not (rest and rest[0] in PUBLISHED):
        run(name, rest)
    elif name in PUBLISHED:
        run_published(sys.argv[1:])
    else:
        print(f"{__doc__}\nBenchmarks: {', '.join(NAMES)}.")
        sys.exit(None if name in ("-h", "--help") else f"unknown benchmark {name!r}; there are {', '.join(NAMES)}")
