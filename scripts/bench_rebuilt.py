"""TensLoRA's seven constructions: the updates of 36 sites through their factors, and with their tensors rebuilt.

Released code forms the whole tensor that a site's factors belong to, all layers and projections in it, at every call,
and takes one slice of it. Both ways run here over the bare q, k and v linears of a decoder, forward and backward; an
adapter's time is what it adds to the linears' own, which run in turn with it. A rebuilt step is run in full, once
for its time. Writes ``rebuilt.json`` and ``rebuilt.md``; some constructions take 8 GB of memory.

    python scripts/bench_rebuilt.py --clock cpu
    python scripts/bench_rebuilt.py --clock cpu --tokens 128 --name rebuilt_short
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import torch
from _bench_models import SHAPES, TARGETS, Bare, backbone
from bench_step import CONSTRUCTIONS, attach, rebuild, step
from torch import nn

import tnpeft


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both ways of every construction, counted and timed."""
    base = Bare(backbone(options.shape, options.layers, "cpu", torch.float32))
    x = torch.randn(1, options.tokens, SHAPES[options.shape][0])
    weights = torch.randn_like(x) / x.numel()
    now = _bench.CLOCKS[options.clock]

    def passes(make: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, Callable[[], Any]]:
        model = make(copy.deepcopy(base, {id(p): p for p in base.parameters()})).train()
        return model, partial(step, model, x, weights)

    inputs = (
        len(base.decoder.layers) * x.numel() * x.element_size()
    )  # which every adapter keeps, and no frozen linear
    floor = _bench.counted(*passes(lambda model: model))
    floor = replace(floor, saved=floor.saved + inputs)
    runs = {"floor": passes(lambda model: model)[1]}
    rows: dict[str, Any] = {}
    for name in CONSTRUCTIONS:
        f = tnpeft.families.tenslora(name, ranks=options.rank)
        ways = {
            "factors": passes(partial(attach, f=f, tokens=options.tokens)),
            "rebuilt": passes(partial(rebuild, f=f, whole=True)),
        }
        row = rows[name] = {way: _over(_bench.counted(*made), floor) for way, made in ways.items()}
        runs[name] = ways["factors"][1]
        start = now()
        ways["rebuilt"][1]().backward()
        row["rebuilt"]["seconds"] = now() - start
        print(f"{name}: {row}", file=sys.stderr, flush=True)
    times = _bench.interleaved(
        {name: partial(lambda run: run().backward(), run) for name, run in runs.items()},
        options.samples,
        options.clock,
    )
    for name, row in rows.items():
        row["factors"]["seconds"] = median(a - b for a, b in zip(times[name], times["floor"], strict=True))
        row["rebuilt"]["seconds"] -= median(times["floor"])
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "name")}
    return {
        "settings": {**settings, "sites": len(TARGETS) * len(base.decoder.layers)},
        "machine": _bench.machine(options.threads),
        "floor": {**vars(floor), "seconds": median(times["floor"])},
        "constructions": rows,
    }


def _over(counts: _bench.Counts, floor: _bench.Counts) -> dict[str, float]:
    return {name: value - getattr(floor, name) for name, value in vars(counts).items()}


def report(data: Mapping[str, Any]) -> str:
    """The measurement as a page."""
    s, m = data["settings"], data["machine"]
    rows = [
        {
            "construction": name,
            "factors, ms": 1e3 * row["factors"]["seconds"],
            "rebuilt, ms": 1e3 * row["rebuilt"]["seconds"],
            "times faster": f"{row['rebuilt']['seconds'] / row['factors']['seconds']:.0f}",
            "factors, MB kept": row["factors"]["saved"] / 1e6,
            "rebuilt, MB kept": row["rebuilt"]["saved"] / 1e6,
            "times less": f"{row['rebuilt']['saved'] / row['factors']['saved']:.0f}",
            "times fewer flops": f"{row['rebuilt']['flops'] / row['factors']['flops']:.0f}",
        }
        for name, row in data["constructions"].items()
    ]
    return (
        "# TensLoRA through its factors, and rebuilt at every call\n\n"
        f"What the adapters of {s['sites']} sites ({s['shape']}'s {', '.join(TARGETS)}) add to forward and backward "
        f"of the bare linears ({1e3 * data['floor']['seconds']:.0f} ms), ranks {s['rank']}, {s['tokens']} tokens, "
        f"float32, {m['threads']} threads, {s['clock']} clock, load {m['load']} on {m['cores']} cores "
        f"({m['processor']}; torch {m['torch']}). Through the factors: median over {s['samples']} turns of the "
        "difference to the linears; rebuilt: one step in full, with every tensor that a site's factors belong to "
        "formed at each of the sites. What is kept for backward leaves out the factors, what the linears keep, and "
        "their inputs, which both ways keep.\n\n" + _bench.markdown(rows)
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--layers", type=int, help="layers of the decoder, if not the shape's own")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--clock", choices=_bench.CLOCKS, default="wall")
    parser.add_argument("--name", default="rebuilt", help="of the files")
    parser.add_argument("--out", type=Path, default=_bench.TABLES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = measure(options)
    _bench.write(options.out, options.name, data, report(data))
    print(report(data))


if __name__ == "__main__":
    main()
