"""How the cost of a step's adapters grows with the sites, with the tokens and with the width of the linears.

On the bare linears of a decoder, over the same without adapters. Flops, bytes kept for backward and operations are
exact; the time is the median difference of neighbouring samples. What an adapter adds should grow with sites times
tokens times width, never with rows times columns of the linears. Writes ``growth.json``, ``growth.md`` and
``growth.svg``.

    python scripts/bench_growth.py --clock cpu
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import peft
import torch
from _bench_models import TARGETS, Bare
from bench_step import step

import tnpeft
from tnpeft.networks import Factorization

FAMILIES: Mapping[str, Factorization] = {
    "lora rank=8": tnpeft.families.lora(rank=8),
    "cp rank=8": tnpeft.families.cp(rank=8),
    "tenslora qkv_depth ranks=8": tnpeft.families.tenslora("qkv_depth", ranks=(8, 8, 3, 4)),
}
SITES, TOKENS, WIDTHS = (12, 24, 48, 96, 192, 384), (128, 256, 512, 1024, 2048, 4096), (128, 256, 512, 1024)
SMALL = {"sites": 12, "tokens": 256, "width": 256}  # what stays as it is while one of the three grows
COUNTED = ("flops", "saved", "kernels")


def backbone(sites: int, width: int) -> Bare:
    """The bare q, k and v linears of so many sites."""
    from transformers import OPTConfig, OPTModel

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=8,
        num_attention_heads=4,
        num_hidden_layers=sites // len(TARGETS),
        vocab_size=8,
        max_position_embeddings=8,
    )
    return Bare(OPTModel(config)).requires_grad_(False)


def point(options: argparse.Namespace, sites: int, tokens: int, width: int) -> list[dict[str, Any]]:
    """What every family adds at one size."""
    base = backbone(sites, width)
    x = torch.randn(1, tokens, width)
    weights = torch.randn_like(x) / x.numel()
    models: dict[str, Any] = {"floor": base}
    for name, f in FAMILIES.items():
        config = tnpeft.TensorNetworkConfig(network=f, target_modules=list(TARGETS), tokens=tokens)
        models[name] = peft.get_peft_model(copy.deepcopy(base, {id(p): p for p in base.parameters()}), config)
    found = {name: vars(_bench.meters(model, partial(step, model, x, weights))) for name, model in models.items()}
    runs = {name: partial(_pass, model, x, weights) for name, model in models.items()}
    times = _bench.interleaved(runs, options.samples, options.clock)
    rows = []
    for name in FAMILIES:
        added = {key: found[name][key] - found["floor"][key] for key in COUNTED}
        seconds = median(a - b for a, b in zip(times[name], times["floor"], strict=True))
        rows.append(
            {"family": name, "sites": sites, "tokens": tokens, "width": width, **added, "milliseconds": 1e3 * seconds}
        )
    print(rows, file=sys.stderr, flush=True)
    return rows


def _pass(model: Any, x: torch.Tensor, weights: torch.Tensor) -> None:
    step(model, x, weights).backward()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every family while one of sites, tokens and width grows."""
    grown = {"sites": options.sites, "tokens": options.tokens, "width": options.widths}
    growth = {
        what: [row for value in values for row in point(options, **{**SMALL, what: value})]
        for what, values in grown.items()
    }
    settings = {name: getattr(options, name) for name in ("samples", "clock", "threads")}
    return {"settings": settings, "machine": _bench.machine(options.threads), "growth": growth}


def power(rows: Sequence[Mapping[str, Any]], what: str, cost: str) -> float:
    """The power of ``what`` with which a cost grows from its first value to its last; a time may be lost in noise."""
    first, last = (max(row[cost], 1e-3) for row in (rows[0], rows[-1]))
    return log(last / first) / log(rows[-1][what] / rows[0][what])


def report(data: Mapping[str, Any]) -> str:
    """The measurement as a page."""
    s, m = data["settings"], data["machine"]
    powers, rows = [], []
    for what, points in data["growth"].items():
        for family in FAMILIES:
            own = [row for row in points if row["family"] == family]
            range_ = f"{own[0][what]:,} to {own[-1][what]:,}"
            powers.append(
                {"family": family, "grows": what, "from and to": range_}
                | {f"{cost}, power": f"{power(own, what, cost):.2f}" for cost in (*COUNTED, "milliseconds")}
            )
            rows += own
    return (
        "# How the cost of adapters grows\n\n"
        "What adapters add to a step of the bare q, k and v linears. While one of sites, tokens and width grows, the "
        f"others stay at {SMALL['sites']} sites, {SMALL['tokens']} tokens, width {SMALL['width']}. A power of 1 is "
        "linear. A term in rows times columns would be a power of 2 in the width. Flops, bytes kept for backward and "
        "operations are exact. float32, "
        f"{m['threads']} threads, {s['samples']} interleaved samples by the {s['clock']} clock, load {m['load']} on "
        f"{m['cores']} cores ({m['processor']}; torch {m['torch']}).\n\n"
        + _bench.markdown(powers)
        + "\n## Every size\n\n"
        + _bench.markdown(rows)
    )


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Time, flops and kept bytes against sites, tokens and width."""
    from matplotlib.figure import Figure

    costs = {"milliseconds": "ms over the floor", "flops": "flops over the floor", "saved": "bytes kept"}
    figure = Figure(figsize=(10, 8))
    panels = figure.subplots(len(costs), len(data["growth"]), squeeze=False)
    for column, (what, points) in enumerate(data["growth"].items()):
        for line, (cost, title) in enumerate(costs.items()):
            axes = panels[line][column]
            for family in FAMILIES:
                own = [row for row in points if row["family"] == family]
                axes.loglog([row[what] for row in own], [max(row[cost], 1e-3) for row in own], "o-", label=family)
            first, last = own[0], own[-1]
            ends = [first[what], last[what]]
            axes.loglog(ends, [max(first[cost], 1e-3) * end / ends[0] for end in ends], "k:", label="linear")
            axes.set_xlabel(what)
            axes.set_ylabel(title)
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    _bench.save_figure(figure, path)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=SITES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=_bench.CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, default=_bench.TABLES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = measure(options)
    _bench.write(options.out, "growth", data, report(data))
    plot(data, options.out / "growth.svg")
    print(report(data))


if __name__ == "__main__":
    main()
