"""How the cost of a step's adapters grows with the sites, with the tokens and with the width of the linears.

On the bare linears of a decoder, over the same without adapters. Flops, bytes kept for backward and operations are
exact; the time is the median difference of neighbouring samples. What an adapter adds should grow with sites times
tokens times width, never with rows times columns of the linears.

    python scripts/bench.py growth --clock cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from math import log
from statistics import median
from typing import Any

import tnpeft
from bench import driver, meters, models
from bench.models import TARGETS
from tnpeft.networks import Factorization

TITLE = "How the cost of adapters grows"
ABOUT = """What adapters add to a step of the bare q, k and v linears. While one of sites, tokens and width grows,
the others stay at 12 sites, 256 tokens, width 256. A power of 1 is linear. A term in rows times columns would be a
power of 2 in the width. Flops, bytes kept for backward and operations are exact."""
OPTIONS = {
    "sites": (12, 24, 48, 96, 192, 384),
    "tokens": (128, 256, 512, 1024, 2048, 4096),
    "widths": (128, 256, 512, 1024),
    "samples": 7,
}
FAMILIES: Mapping[str, Factorization] = {
    "lora rank=8": tnpeft.families.lora(rank=8),
    "cp rank=8": tnpeft.families.cp(rank=8),
    "tenslora qkv_depth ranks=8": tnpeft.families.tenslora("qkv_depth", ranks=(8, 8, 3, 4)),
}
SMALL = {"sites": 12, "tokens": 256, "width": 256}  # what stays as it is while one of the three grows
COUNTED = ("flops", "saved", "kernels")


def point(options: argparse.Namespace, sites: int, tokens: int, width: int) -> list[dict[str, Any]]:
    """Return what every family adds at one size."""
    base = models.Bare(
        models.opt(width, 4, sites // len(TARGETS), ffn_dim=8, vocab_size=8, max_position_embeddings=8)
    )
    forward_of = models.stepper((1, tokens), width)
    cases = {"floor": base} | {name: models.adapted(base, models.network(f, tokens)) for name, f in FAMILIES.items()}
    found = {name: vars(meters.meters(model, forward_of(model))) for name, model in cases.items()}
    runs = {name: models.backward(forward_of(model)) for name, model in cases.items()}
    times = driver.interleaved(runs, options.samples, options.clock)
    rows = []
    for name in FAMILIES:
        added = {key: found[name][key] - found["floor"][key] for key in COUNTED}
        seconds = median(a - b for a, b in zip(times[name], times["floor"], strict=True))
        row = {"family": name, "sites": sites, "tokens": tokens, "width": width, **added}
        rows.append({**row, "milliseconds": 1e3 * seconds})
    driver.progress(rows)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return every family's costs while one of sites, tokens and width grows."""
    grown = {"sites": options.sites, "tokens": options.tokens, "width": options.widths}
    return {
        "growth": {
            what: [row for value in values for row in point(options, **{**SMALL, what: value})]
            for what, values in grown.items()
        }
    }


def power(rows: Sequence[Mapping[str, Any]], what: str, cost: str) -> float:
    """Return the power of ``what`` with which a cost grows from first to last; a time may be lost in noise."""
    first, last = (max(row[cost], 1e-3) for row in (rows[0], rows[-1]))
    return log(last / first) / log(rows[-1][what] / rows[0][what])


def tables(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the powers, and every size."""
    powers, rows = [], []
    for what, points in data["growth"].items():
        for family in FAMILIES:
            own = [row for row in points if row["family"] == family]
            powers.append(
                {"family": family, "grows": what, "from and to": f"{own[0][what]:,} to {own[-1][what]:,}"}
                | {f"{cost}, power": f"{power(own, what, cost):.2f}" for cost in (*COUNTED, "milliseconds")}
            )
            rows += own
    return {"": powers, "Every size": rows}
