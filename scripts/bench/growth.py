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
FAMILIES = {
    "lora rank=8": "lora rank=8",
    "cp rank=8": "cp rank=8",
    "tenslora qkv_depth ranks=8": "tenslora qkv_depth ranks=(8, 8, 3, 4)",
}
SMALL = {"sites": 12, "tokens": 256, "width": 256}  # what stays as it is while one of the three grows
COUNTED = ("flops", "saved", "kernels")


def point(options: driver.Options, sites: int, tokens: int, width: int) -> list[dict[str, Any]]:
    """Return what every family adds at one size."""
    whole = models.opt(width, 4, sites // 3, ffn_dim=8, vocab_size=8, max_position_embeddings=8)
    cases = {"floor": models.Bare(whole)}
    for name, title in FAMILIES.items():
        cases[name] = models.adapted(cases["floor"], models.network(models.family(title), tokens))
    forward_of = models.stepper(cases["floor"], 1, tokens)
    found = {name: vars(meters.meters(model, forward_of(model))) for name, model in cases.items()}
    runs = {name: models.backward(forward_of(model)) for name, model in cases.items()}
    times = driver.interleaved(runs, options)
    at = {"sites": sites, "tokens": tokens, "width": width}
    rows = [
        {"family": name, "milliseconds": 1e3 * driver.added(times[name], times["floor"]), **at}
        | {key: found[name][key] - found["floor"][key] for key in COUNTED}
        for name in FAMILIES
    ]
    driver.progress(rows)
    return rows


def measure(options: driver.Options) -> dict[str, Any]:
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


def tables(data: Any) -> dict[str, driver.Rows]:
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
