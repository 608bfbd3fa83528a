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
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import torch

from bench.models import SHAPES, described
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
PRIVATE = ("out", "only", "against", "data", "tokenizer", "cache")  # paths, and what the rows tell


def parse(name: str, arguments: Sequence[str]) -> tuple[Any, Options]:
    """Return the module of a benchmark and its options."""
    module: Any = importlib.import_module(f"bench.{name}")
    options = {"samples": 9, "threads": 1, "clock": {**CLOCK, "default": "wall"}, "name": name, "out": TABLES}
    if hasattr(module, "cases"):
        options["against"] = {"type": Path, "help": "another checkout, whose cases are timed in turn with these"}
    parser = _parser(name, module.__doc__)
    for option, value in {**options, **module.OPTIONS}.items():
        parser.add_argument(f"--{option}", **(value if isinstance(value, dict) else _argument(value)))
    found = parser.parse_args(arguments)
    if "shape" in found:
        found.layers = found.layers or SHAPES[found.shape][2]
    return module, found


def _parser(name: str, text: str | None) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"bench.py {name}", description=text, formatter_class=raw)


def _argument(default: Any) -> dict[str, Any]:
    """Return the argument of an option that is given by its default."""
    if isinstance(default, bool):
        return {"action": "store_true"}
    many = isinstance(default, tuple)
    kind = {"type": type(default[0]), "nargs": "+"} if many else {"type": type(default)}
    return {**kind, "default": default, "help": "default: %(default)s"}


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


Cases = Iterator[tuple[str, Case]]
Sampler = Callable[[], float]


def once(run: Callable[[], Any], clock: str) -> tuple[Any, float]:
    """Return what a run returns, and the seconds that it took."""
    start = CLOCKS[clock]()
    return run(), CLOCKS[clock]() - start


def samplers(runs: Mapping[str, Callable[[], Any]], options: Options) -> dict[str, Sampler]:
    """Return for each run a function that runs it and returns the seconds that it took."""
    wait = torch.cuda.synchronize if getattr(options, "device", "cpu") == "cuda" else lambda: None

    def sample(run: Callable[[], Any]) -> float:
        wait()
        return once(lambda: (run(), wait()), options.clock)[1]

    return {name: partial(sample, run) for name, run in runs.items()}


def in_turn(each: Mapping[Any, Sampler], options: Options) -> dict[Any, list[float]]:
    """Return seconds of each, one sample of each in turn, so that a busy machine slows all of them alike."""
    warm = 3 if getattr(options, "compile", False) else 1
    gc.collect()
    gc.disable()
    try:
        turns = [{name: sampler() for name, sampler in each.items()} for _ in range(warm + options.samples)]
    finally:
        gc.enable()
    return {name: [turn[name] for turn in turns[warm:]] for name in each}


def interleaved(runs: Mapping[Any, Callable[[], Any]], options: Options) -> dict[Any, list[float]]:
    """Return seconds of each run, in turn."""
    return in_turn(samplers(runs, options), options)


def ratio(times: Sequence[float], floor: Sequence[float]) -> float:
    """Return the median of the ratios of neighbouring samples: both met the same load."""
    return median(a / b for a, b in zip(times, floor, strict=True))


def added(times: Sequence[float], floor: Sequence[float]) -> float:
    """Return the median of the differences of neighbouring samples."""
    return median(a - b for a, b in zip(times, floor, strict=True))


def measured(module: Any, options: Options) -> dict[str, Any]:
    """Return what a benchmark measures itself; rows, which are told one by one, are its cases."""
    found = _prepared(module.measure, options)
    if isinstance(found, dict):
        return found
    rows = []
    for row in found:
        progress(row)
        rows.append(row)
    return {"cases": rows}


def _prepared(call: Callable[[Options], Any], options: Options) -> Any:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return call(options)


def made(module: Any, options: Options) -> tuple[dict[str, Case], dict[str, Sampler]]:
    """Return a benchmark's cases, and what gives the seconds of a sample of each."""
    cases: dict[str, Case] = dict(_prepared(module.cases, options))
    return cases, samplers({name: case.run for name, case in cases.items()}, options)


@contextmanager
def worker(root: Path, name: str, arguments: Sequence[str]) -> Iterator[tuple[dict[str, Case], dict[str, Sampler]]]:
    """Give the cases of this checkout's benchmark on another one's package, which a process has, and samplers."""
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, name, arguments), daemon=True)
    sys.path.insert(0, str(root))  # the process begins with this path
    process.start()
    sys.path.pop(0)
    theirs.close()
    try:
        package, cases = pipe.recv()
        if not Path(package).is_relative_to(root):
            sys.exit(f"{root} has no package tnpeft")
        yield cases, {key: lambda key=key: (pipe.send(key), pipe.recv())[1] for key in cases}
    except EOFError:
        sys.exit("a worker has failed")
    finally:
        process.terminate()


def serve(pipe: Any, name: str, arguments: Sequence[str]) -> None:
    """Answer a parent: with the cases, then with the seconds of each case that it names."""
    import tnpeft

    cases, each = made(*parse(name, arguments))
    pipe.send((str(Path(tnpeft.__file__).resolve()), {key: replace(case, run=print) for key, case in cases.items()}))
    gc.disable()
    while True:
        pipe.send(each[pipe.recv()]())


def timed(module: Any, options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the cases of a benchmark with their times, all in turn, those of another checkout among them."""
    if not options.against:
        cases, each = made(module, options)
        return {"cases": _rows(cases, in_turn(each, options))}
    with ExitStack() as stack:
        roots, name = (ROOT, options.against.resolve()), module.__name__.rpartition(".")[2]
        both = [stack.enter_context(worker(root, name, arguments)) for root in roots]
        times = in_turn({(key, k): both[k][1][key] for key in both[0][0] for k in (0, 1)}, options)
    ours, theirs = (_rows(both[k][0], {key: times[key, k] for key in both[0][0]}) for k in (0, 1))
    for key, row in theirs.items():
        row["time"] = ratio(ours[key]["samples"], row["samples"])
    return {"cases": ours, "against": theirs, "commits": [*map(_commit, roots)]}


def _rows(cases: Mapping[str, Case], times: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return the facts and the times of cases."""
    return {
        key: {
            **case.facts,
            case.unit: 1e3 * median(times[key]) / case.per,
            "overhead": ratio(times[key], times[case.floor]) - 1,
            "samples": times[key],
        }
        for key, case in cases.items()
    }


def _commit(root: Path) -> str:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


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
    settings = data["settings"]
    text = jinja2.Template(" ".join(about.split())).render(**data, **settings, how=described(settings))
    tables = module.tables(data)
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
    found = timed(module, options, arguments) if hasattr(module, "cases") else measured(module, options)
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
    known = published()
    parser = _parser("all", __doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(known)} (default: all)")
    parser.add_argument("--data", help="folder with sst2/train.jsonl.gz and sst2/dev.jsonl.gz, or the hub")
    parser.add_argument("--tokenizer", help="folder or name of OPT's tokenizer")
    parser.add_argument("--again", action="store_true", help="run what has run already as well")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the results")
    parser.add_argument("--done", type=Path, default=ROOT / "runs" / "benchmarks", help="folder of the notes")
    options = parser.parse_args(arguments)
    _known(options.names, known)
    for name in options.names or known:
        which, its = known[name]
        note, what = options.done / f"{name}.txt", f"{code()} {which} {its}\n"
        ran = note.is_file() and note.read_text() == what and (options.out / f"{name}.json").is_file()
        if "--device cuda" in its and not torch.cuda.is_available():
            progress(f"== {name} needs a GPU: left as it is")
        elif ran and not options.again:
            progress(f"== {name} has run")
        else:
            progress(f"== {name}")
            given = {"name": name, "out": options.out}
            given |= {"data": options.data, "tokenizer": options.tokenizer} if which == "sst2" else {}
            command = [sys.executable, str(ROOT / "scripts" / "bench.py"), which, *shlex.split(its)]
            command += [f"--{key}={value}" for key, value in given.items() if value]
            environment = {**os.environ, **({} if name in GIVEN_BACK else KEPT)}
            seconds = once(partial(subprocess.run, command, check=True, env=environment), "wall")[1]
            write_text(note, what)
            progress(f"== {name} took {seconds:.0f} s")


def _known(names: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are {', '.join(known)}")


def main() -> None:
    """Run what the command line names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\nBenchmarks: {', '.join(NAMES)}.")
    elif name == "all":
        run_published(rest)
    else:
        _known([name], (*NAMES, "goals"))
        run(name, rest)
