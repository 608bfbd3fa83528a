"""Step times against another checkout and PEFT, interleaved in one run: bare linears of a backbone, samples in turn.

Each checkout runs in a process of its own, which takes one sample of a case whenever it is told to, so that a busy
machine slows all of them alike. Prints the overhead of each case over the frozen linears and its ratio to the other
checkout's and to PEFT's.

    python scripts/bench_against.py ../base --samples 60
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent.parent
CASES = ("lora rank=8", "cp rank=8", "vera rank=256", "lokr rank=8", "loha rank=8", "randlora rank=32")
PEERS = ("PEFT LoRA r=8", "PEFT VeRA r=256", "PEFT LoKr r=8", "PEFT LoHa r=8", "PEFT RandLoRA r=32")


def prepared(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return a training step of each case, of the checkout whose scripts are on the path."""
    import copy

    import bench_step
    import torch
    from _bench_models import SHAPES, Bare, backbone

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = Bare(backbone(options.shape, options.layers, "cpu", torch.float32))
    x = torch.randn(options.batch, options.length, SHAPES[options.shape][0])
    weights = torch.randn_like(x) / x.numel()
    makers = bench_step.cases(options.batch * options.length)
    found = {}
    for name in ("floor", *CASES, *PEERS):
        model = makers[name](copy.deepcopy(base, {id(p): p for p in base.parameters()})).train()
        found[name] = partial(lambda model: bench_step.step(model, x, weights).backward(), model)
    return found


def serve(options: argparse.Namespace) -> None:
    """Answer each name on the standard input with the seconds that one step of it took."""
    import gc

    import _bench

    now = _bench.CLOCKS[options.clock]
    runs = prepared(options)
    for run in runs.values():
        run()
    gc.disable()
    print("ready", flush=True)
    for line in sys.stdin:
        start = now()
        runs[line.strip()]()
        print(now() - start, flush=True)


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the samples of every case of both checkouts, taken in turn."""
    servers: dict[str, subprocess.Popen[str]] = {}
    for name, root in (("this", HERE), ("other", options.other.resolve())):
        path = os.pathsep.join([str(root), str(root / "scripts")])
        command = [sys.executable, str(Path(__file__).resolve()), str(root), "--serve", *options.passed]
        servers[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
    times: dict[str, dict[str, list[float]]] = {name: {} for name in servers}
    for server in servers.values():
        assert server.stdout is not None
        while (line := server.stdout.readline()).strip() != "ready":
            if not line:
                sys.exit("a checkout could not be measured")
    for _ in range(options.samples):
        for case in ("floor", *CASES, *PEERS):
            for name, server in servers.items():
                assert server.stdin is not None
                assert server.stdout is not None
                print(case, file=server.stdin, flush=True)
                times[name].setdefault(case, []).append(float(server.stdout.readline()))
    for server in servers.values():
        server.terminate()
    return times


def report(times: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Return overheads over the floor, and step times over the other checkout's."""
    floor = median([*times["this"]["floor"], *times["other"]["floor"]])
    lines = [f"floor {1e3 * floor:.1f} ms", "case                 this    other   step over other's"]
    for case in (*CASES, *PEERS):
        mine, theirs = (median(times[name][case]) for name in ("this", "other"))
        step = median(a / b for a, b in zip(times["this"][case], times["other"][case], strict=True))
        lines.append(f"{case:<20} {mine / floor - 1:+7.1%} {theirs / floor - 1:+7.1%}  {step:.3f}")
    peft = median([*times["this"][PEERS[0]], *times["other"][PEERS[0]]]) / floor - 1
    ratios = [(median(times[name][CASES[0]]) / floor - 1) / peft for name in ("this", "other")]
    return "\n".join([*lines, "LoRA's overhead over PEFT's: this {:.2f}, other {:.2f}".format(*ratios)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout's root")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--shape", default="opt-125m")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--clock", default="cpu", choices=("wall", "cpu"))
    parser.add_argument("--json", type=Path, help="write the samples")
    options = parser.parse_args()
    names = ("shape", "layers", "batch", "length", "clock")
    options.passed = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
    if options.serve:
        sys.path.pop(0)  # this script's own folder: the checkout's scripts come from the environment
        serve(options)
        return
    times = measure(options)
    if options.json:
        options.json.write_text(json.dumps(times))
    print(report(times))


if __name__ == "__main__":
    main()
