"""How the cost of adapters grows.

What adapters add to a step of the bare q, k and v linears. While one of sites, tokens and width grows, the others
stay at 12 sites, 256 tokens, width 256. A power of 1 is linear. A term in rows times columns would be a power of 2
in the width. Flops, bytes kept for backward and operations are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

from bench import driver, meters, models

OPTIONS = {
    "sites": (12, 24, 48, 96, 192, 384),
    "tokens": (128, 256, 512, 1024, 2048, 4096),
    "widths": (128, 256, 512, 1024),
    "samples": 7,
}
PUBLISHED = {"growth": "--samples 5 --clock cpu"}
FAMILIES = ("lora rank=8", "cp rank=8", "tenslora qkv_depth ranks=(8, 8, 3, 4)")
SMALL = {"sites": 12, "tokens": 256, "width": 256}  # what stays as it is while one of the three grows
COUNTED = ("flops", "saved", "kernels")


def point(options: driver.Options, sites: int, tokens: int, width: int) -> list[dict[str, Any]]:
    """Return what every family adds at one size."""
    base = models.Bare(models.opt(width, 4, sites // 3, ffn_dim=8, vocab_size=8, max_position_embeddings=8))
    forward_of = models.stepper(models.embeddings(base, 1, tokens))
    built = {"floor": base} | {name: models.adapted(base, models.config(name, tokens)) for name in FAMILIES}
    found = {name: vars(meters.meters(model, forward_of(model))) for name, model in built.items()}
    runs = {name: models.backward(forward_of(model)) for name, model in built.items()}
    times, at = driver.interleaved(runs, options), {"sites": sites, "tokens": tokens, "width": width}
    rows = []
    for name in FAMILIES:
        counts = {key: found[name][key] - found["floor"][key] for key in COUNTED}
        ms = 1e3 * driver.added(times[name], times["floor"])
        rows.append(driver.told({"family": name, "milliseconds": ms, **at, **counts}))
    return rows


def measure(options: driver.Options) -> dict[str, Any]:
    """Return every family's costs while one of sites, tokens and width grows."""
    growth = {}
    for what, values in {"sites": options.sites, "tokens": options.tokens, "width": options.widths}.items():
        growth[what] = [row for value in values for row in point(options, **{**SMALL, what: value})]
    return {"growth": growth}


def power(rows: Sequence[Mapping[str, Any]], what: str, cost: str) -> float:
    """Return the power of ``what`` with which a cost grows from first to last; a time may be lost in noise."""
    first, last = (max(row[cost], 1e-3) for row in (rows[0], rows[-1]))
    return log(last / first) / log(rows[-1][what] / rows[0][what])


def by_family(points: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows of every family."""
    return {
        name: [row for row in points if row["family"] == name] for name in dict.fromkeys(p["family"] for p in points)
    }


def tables(data: Any) -> dict[str, driver.Rows]:
    """Return the powers, and every size."""
    powers, every = [], []
    for what, points in data["growth"].items():
        for family, rows in by_family(points).items():
            its = {f"{cost}, power": f"{power(rows, what, cost):.2f}" for cost in (*COUNTED, "milliseconds")}
            head = {"family": family, "grows": what, "from and to": f"{rows[0][what]:,} to {rows[-1][what]:,}"}
            powers.append(head | its)
            every += rows
    return {"": powers, "Every size": every}
