"""TensLoRA's seven constructions: the updates of 36 sites through their factors, and with their tensors rebuilt.

Released code forms the whole tensor that a site's factors belong to, all layers and projections in it, at every call,
and takes one slice of it. Both ways run here over the bare q, k and v linears of a decoder, forward and backward; an
adapter's time is what it adds to the linears' own, which run in turn with it. A rebuilt step is run in full, once
for its time. Some constructions take 8 GB of memory.

    python scripts/bench.py rebuilt --clock cpu
    python scripts/bench.py rebuilt --clock cpu --tokens 128 --name rebuilt_short
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from statistics import median
from typing import Any

import tnpeft
from bench import driver, meters, models
from bench.models import CONSTRUCTIONS, SHAPES, TARGETS

TITLE = "TensLoRA through its factors, and rebuilt at every call"
OPTIONS = {**models.SHAPE, "rank": 4, "tokens": 1024, "samples": 15}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return both ways of every construction, counted and timed."""
    base = models.Bare(models.backbone(options.shape, options.layers)).train()
    width = SHAPES[options.shape][0]
    forward_of = models.stepper((1, options.tokens), width)
    inputs = 4 * options.layers * options.tokens * width  # which every adapter keeps, and no frozen linear
    floor = meters.counted(base, forward_of(base))
    floor["saved"] += inputs
    runs, rows = {"floor": models.backward(forward_of(base))}, {}
    for name in CONSTRUCTIONS:
        f = tnpeft.families.tenslora(name, ranks=options.rank)
        ways = {
            "factors": models.adapted(base, models.network(f, options.tokens)).train(),
            "rebuilt": models.rebuilt(base, f, whole=True).train(),
        }
        row: dict[str, Any] = {}
        for way, model in ways.items():
            counts = meters.counted(model, forward_of(model))
            row[way] = {key: value - floor[key] for key, value in counts.items()}
        runs[name] = models.backward(forward_of(ways["factors"]))
        row["rebuilt"]["seconds"] = driver.stopwatch(models.backward(forward_of(ways["rebuilt"])), options.clock)()
        rows[name] = row
        driver.progress(f"{name}: {row}")
    times = driver.interleaved(runs, options.samples, options.clock)
    for name, row in rows.items():
        row["factors"]["seconds"] = median(a - b for a, b in zip(times[name], times["floor"], strict=True))
        row["rebuilt"]["seconds"] -= median(times["floor"])
    settings = {"sites": len(TARGETS) * options.layers}
    return {"settings": settings, "floor": {**floor, "seconds": median(times["floor"])}, "constructions": rows}


def about(data: Mapping[str, Any]) -> str:
    """Return what was measured."""
    s = data["settings"]
    return (
        f"What the adapters of {s['sites']} sites ({s['shape']}'s {', '.join(TARGETS)}) add to "
        f"forward and backward of the bare linears ({1e3 * data['floor']['seconds']:.0f} ms), ranks {s['rank']}, "
        f"{s['tokens']} tokens. Through the factors: median of the differences to the linears in the same turn; "
        "rebuilt: one step in full, with every tensor that a site's factors belong to formed at each of the sites. "
        "What is kept for backward leaves out the factors, what the linears keep, and their inputs, which both ways "
        "keep."
    )


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each construction."""
    rows = []
    for name, row in data["constructions"].items():
        times = {key: row["rebuilt"][key] / row["factors"][key] for key in ("seconds", "saved", "flops")}
        rows.append(
            {
                "construction": name,
                "factors, ms": 1e3 * row["factors"]["seconds"],
                "rebuilt, ms": 1e3 * row["rebuilt"]["seconds"],
                "times faster": f"{times['seconds']:.0f}",
                "factors, MB kept": row["factors"]["saved"] / 1e6,
                "rebuilt, MB kept": row["rebuilt"]["saved"] / 1e6,
                "times less": f"{times['saved']:.0f}",
                "times fewer flops": f"{times['flops']:.0f}",
            }
        )
    return rows
