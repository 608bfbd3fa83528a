"""Run one benchmark, or those whose tables are published with the settings that are published.

    python scripts/bench.py step --bare --layers 2 --clock cpu    # one; -h for its options
    python scripts/bench.py step --bare --against ../other        # the same cases of another checkout, in turn
    python scripts/bench.py all                                   # as published, about an hour
    python scripts/bench.py all decode step_bare                  # some of these
    python scripts/bench.py goals                                 # the page of goals, from the results

A benchmark NAME is the module bench/NAME.py: its docstring is the page's title and text, a template of Jinja over
settings and results; it has OPTIONS, and ``tables(data)``, rows or rows by heading; EXACT if nothing is timed;
PUBLISHED, the options of each table that is published; and either ``measure(options)``, which yields its cases, or,
where all that is timed are runs over a floor, ``cases(options)``. Results are NAME.json and NAME.md.

``all`` leaves alone what has run already with the same code and settings, so that an interrupted run goes on where it
was; ``--again`` runs it once more. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
import torch

from bench.models import SHAPES
from tnpeft.studies.files import digest, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "paper" / "tables"
HELPERS = {"driver", "goals", "meters", "models"}
NAMES = tuple(sorted({path.stem for path in Path(__file__).parent.glob("[a-z]*.py")} - HELPERS))
# Memory that is given back to the system after every large array is paid for once more with the next one.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
GIVEN_BACK = ("replicas",)  # which shows what that costs

# ---- options

Options = argparse.Namespace
Rows = Iterable[dict[str, Any]]
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = {"choices": CLOCKS, "help": "cpu: time that other work cannot add to"}
PRIVATE = ("out", "only", "against", "data", "tokenizer", "cache", "work")  # paths, and what the rows tell


def parse(name: str, arguments: Sequence[str]) -> tuple[Any, Options]:
    """Return the module of a benchmark and its options."""
    module: Any = importlib.import_module(f"bench.{name}")
    options = {"samples": 9, "threads": 1, "clock": {**CLOCK, "default": "wall"}, "name": name, "out": TABLES}
    if hasattr(module, "cases"):
        options["against"] = {"type": Path, "help": "another checkout, whose cases are timed in turn with these"}
    parser = _parser(name, module.__doc__)
    for option, value in {**options, **module.OPTIONS}.items():
        its = value
        if isinstance(value, bool):
            its = {"action": "store_true"}
        elif isinstance(value, tuple):
            its = {"type": type(value[0]), "nargs": "+", "default": value, "help": "default: %(default)s"}
        elif not isinstance(value, dict):
            its = {"type": type(value), "default": value, "help": "default: %(default)s"}
        parser.add_argument(f"--{option}", **its)
    found = parser.parse_args(arguments)
    if "shape" in found:
        found.layers = found.layers or SHAPES[found.shape][2]
    return module, found


def _parser(name: str, text: str | None) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"bench.py {name}", description=text, formatter_class=raw)


def known(what: str, names: Iterable[str], there: Iterable[str]) -> None:
    """End with a message about the first name that is not there, if there is one."""
    for name in sorted({*names} - {*there}):
        sys.exit(f"unknown {what} {name!r}; there are {', '.join(there)}")


def chosen(every: Iterable[str], only: Sequence[str] | None) -> list[str]:
    """Return the cases that are asked for, with the floors."""
    known("case", only or (), every)
    return [name for name in every if not only or name in only or name.startswith("floor")]


def told(what: Any) -> Any:
    """Return what was found, after telling it on the error stream."""
    print(what, file=sys.stderr, flush=True)
    return what


# ---- times


@dataclass(frozen=True)
class Case:
    """A run that is timed over a floor, facts about it, and the time's name and divisor."""

    run: Callable[[], Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    floor: str = "floor"
    unit: str = "milliseconds"
    per: int = 1

    def row(self, times: Sequence[float], floor: Sequence[float]) -> dict[str, Any]:
        """Return the facts and the times."""
        its = {self.unit: 1e3 * median(times) / self.per, "overhead": ratio(times, floor) - 1, "samples": times}
        return {**self.facts, **its}


Cases = Iterator[tuple[str, Case]]


def once(run: Callable[[], Any], clock: str) -> tuple[Any, float]:
    """Return what a run returns, and the seconds that it took."""
    start = CLOCKS[clock]()
    return run(), CLOCKS[clock]() - start


def interleaved(runs: Mapping[Any, Callable[[], Any]], options: Options) -> dict[Any, list[float]]:
    """Return seconds of each run, one sample of each in turn, so that a busy machine slows all of them alike.

    Where two checkouts are compared, each sample of one is followed by that of the other.
    """
    wait = torch.cuda.synchronize if getattr(options, "device", "cpu") == "cuda" else lambda: None
    warm, turn = 3 if getattr(options, "compile", False) else 1, getattr(options, "turn", None)

    def sample(run: Callable[[], Any]) -> float:
        if turn:
            turn.recv()
        wait()
        _, seconds = once(lambda: (run(), wait()), options.clock)
        if turn:
            with suppress(BrokenPipeError):  # the other has had its last turn
                turn.send(None)
        return seconds

    gc.collect()
    gc.disable()
    try:
        turns = [{name: sample(run) for name, run in runs.items()} for _ in range(warm + options.samples)]
    finally:
        gc.enable()
    return {name: [each[name] for each in turns[warm:]] for name in runs}


def ratio(times: Sequence[float], floor: Sequence[float]) -> float:
    """Return the median of the ratios of neighbouring samples: both met the same load."""
    return median(a / b for a, b in zip(times, floor, strict=True))


def added(times: Sequence[float], floor: Sequence[float]) -> float:
    """Return the median of the differences of neighbouring samples."""
    return median(a - b for a, b in zip(times, floor, strict=True))


def measured(module: Any, options: Options) -> dict[str, Any]:
    """Return what a benchmark finds; cases that are timed over a floor are timed here, all in turn."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if not hasattr(module, "cases"):
        found = module.measure(options)
        return found if isinstance(found, dict) else {"cases": [*map(told, found)]}
    cases = {}
    for name, case in module.cases(options):
        told(f"{name}: {case.facts}")
        cases[name] = case
    times = interleaved({name: case.run for name, case in cases.items()}, options)
    return {"cases": {name: case.row(times[name], times[case.floor]) for name, case in cases.items()}}


def work(path: Path, turn: Any, name: str, arguments: Sequence[str]) -> None:
    """Write what a benchmark finds with this process's package, each sample when it is its turn."""
    module, options = parse(name, arguments)
    options.turn = turn
    write_json(path, measured(module, options))


def compared(name: str, options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what a benchmark finds here and in another checkout, each in a process, in turn."""
    spawn, roots = get_context("spawn"), (ROOT, options.against.resolve())
    ends, found, commits = spawn.Pipe(), [], []
    ends[1].send(None)  # the first turn is ours
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.json" for k in range(2)]
        workers = [
            spawn.Process(target=work, args=(*each, name, arguments), daemon=True)
            for each in zip(paths, ends, strict=True)
        ]
        for root, worker, end in zip(roots, workers, ends, strict=True):
            if not (root / "tnpeft").is_dir():
                sys.exit(f"{root} has no package tnpeft")
            sys.path.insert(0, str(root))  # the process begins with this path
            worker.start()
            sys.path.pop(0)
            end.close()
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
            commits.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        for worker, path in zip(workers, paths, strict=True):
            worker.join()
            if worker.exitcode:
                sys.exit("a worker has failed")
            found.append(json.loads(path.read_text(encoding="utf-8"))["cases"])
    for name, row in found[1].items():
        row["time"] = ratio(found[0][name]["samples"], row["samples"])
    return {"cases": found[0], "against": found[1], "commits": commits}


# ---- pages


def machine(threads: int) -> dict[str, Any]:
    """Return what it ran on and with."""
    from tnpeft.studies.runs import versions  # which another checkout may lack

    facts = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", facts.read_text(encoding="utf-8")) if facts.exists() else None
    return {
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 1),
        **versions(),
    }


def markdown(rows: Rows) -> str:
    """Return rows as a Markdown table: text to the left, numbers to the right."""
    from tnpeft._text import Table

    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    align = "".join(">" if all(_number(row.get(name, 0)) for row in rows) else "<" for name in columns)
    cells = [[f"{v:.3g}" if isinstance(v, float) else v for v in map(row.get, columns)] for row in rows]
    return f"{Table(tuple(columns), tuple(map(tuple, cells)), align).markdown()}\n"


def _number(value: Any) -> bool:
    return not isinstance(value, str) or not value or value[0] in "+-0123456789"


HOW = """{{ dtype or "float32" }}, {{ device or "cpu" }}, {{ machine.threads }} threads, {{ samples }} interleaved
samples by the {{ clock }} clock, load {{ machine.load }} on {{ machine.cores }} cores
({{ machine.gpu or machine.processor }}; torch {{ machine.torch }}, peft {{ machine.peft }})
{%- if malloc %}; freed memory is kept, not given back to the system{% endif %}."""


def page(module: Any, data: Mapping[str, Any]) -> str:
    """Return the title, what was measured, the settings and the machine, and the tables."""
    title, _, about = module.__doc__.partition(".\n\n")
    about += "" if getattr(module, "EXACT", False) else HOW
    settings, tables = data.get("settings", {}), module.tables(data)
    dtype = settings.get("dtype", "float32")
    factors = f", factors in {dtype if settings.get('narrow') else 'float32'}" if dtype != "float32" else ""
    how = f"{'compiled' if settings.get('compile') else 'eager'}{factors}"
    text = jinja2.Template(" ".join(about.split())).render(**data, **settings, how=how)
    parts = {**(tables if isinstance(tables, dict) else {"": tables}), **_against(data)}
    shown = (
        (f"\n## {heading}\n" if heading else "") + f"\n{rows if isinstance(rows, str) else markdown(rows)}"
        for heading, rows in parts.items()
    )
    return f"# {title}\n\n{text}\n{''.join(shown)}"


def _against(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of two checkouts, if there are two."""
    if "against" not in data:
        return {}
    rows = []
    for (name, row), theirs in zip(data["cases"].items(), data["against"].values(), strict=True):
        over = {"over floor": f"{row['overhead']:+.1%}", "theirs": f"{theirs['overhead']:+.1%}"}
        facts = {f"{fact}, theirs": theirs[fact] for fact, value in row.items() if isinstance(value, int)}
        rows.append({"case": name, **over, "time over theirs": f"{theirs['time']:.3f}", **facts})
    return {" against ".join(data["commits"]): rows}


# ---- runs


def run(name: str, arguments: Sequence[str]) -> None:
    """Measure, write, and print the page."""
    module, options = parse(name, arguments)
    found = compared(name, options, arguments) if getattr(options, "against", None) else measured(module, options)
    settings = {option: value for option, value in vars(options).items() if option not in PRIVATE}
    settings["malloc"] = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    settings |= found.pop("settings", {})
    data = json.loads(json.dumps({"settings": settings, "machine": machine(options.threads), **found}))
    path = options.out / options.name
    write_json(path.with_suffix(".json"), data)
    write_text(path.with_suffix(".md"), page(module, data))
    print(page(module, data))


def published() -> dict[str, tuple[str, str]]:
    """Return the benchmark and the options of every published table."""
    every = {name: importlib.import_module(f"bench.{name}").PUBLISHED for name in NAMES}
    return {table: (name, options) for name, tables in every.items() for table, options in tables.items()}


def code() -> str:
    """Return a hash of all that determines what a benchmark measures but its options."""
    paths = sorted([*ROOT.glob("scripts/bench/*.py"), *ROOT.glob("tnpeft/**/*.py")])
    return digest({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths})


def run_published(arguments: Sequence[str]) -> None:
    """Run what is asked for and has not run, each in its own process."""
    there = published()
    parser = _parser("all", __doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(there)} (default: all)")
    parser.add_argument("--data", help="folder with sst2/train.jsonl.gz and sst2/dev.jsonl.gz, or the hub")
    parser.add_argument("--tokenizer", help="folder or name of OPT's tokenizer")
    parser.add_argument("--again", action="store_true", help="run what has run already as well")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the results")
    parser.add_argument("--done", type=Path, default=ROOT / "runs" / "benchmarks", help="folder of the notes")
    options = parser.parse_args(arguments)
    known("benchmark", options.names, there)
    for name in options.names or there:
        which, its = there[name]
        note, what = options.done / f"{name}.txt", f"{code()} {which} {its}\n"
        ran = note.is_file() and note.read_text() == what and (options.out / f"{name}.json").is_file()
        if "--device cuda" in its and not torch.cuda.is_available():
            told(f"== {name} needs a GPU: left as it is")
        elif ran and not options.again:
            told(f"== {name} has run")
        else:
            told(f"== {name}")
            given = {"name": name, "out": options.out}
            has = importlib.import_module(f"bench.{which}").OPTIONS
            given |= {key: vars(options)[key] for key in ("data", "tokenizer") if key in has}
            command = [sys.executable, str(ROOT / "scripts" / "bench.py"), which, *shlex.split(its)]
            command += [f"--{key}={value}" for key, value in given.items() if value]
            environment = {**os.environ, **({} if name in GIVEN_BACK else KEPT)}
            seconds = once(partial(subprocess.run, command, check=True, env=environment), "wall")[1]
            write_text(note, what)
            told(f"== {name} took {seconds:.0f} s")


def main() -> None:
    """Run what the command line names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\nBenchmarks: {', '.join(NAMES)}.")
    elif name == "all":
        run_published(rest)
    else:
        known("benchmark", [name], (*NAMES, "goals"))
        run(name, rest)
