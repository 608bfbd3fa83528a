"""K adapters trained in one pass against K runs in turn: training steps per second, by tokens of each replica.

A step is forward, backward, clipping and AdamW; the runs in turn take theirs one after the other. All cases of one
size are interleaved, and the gain is the median of (K steps of one run) over (one step of K replicas) in the same
turn. The frozen backbone alone, on K batches at once, says what there is to gain. Writes ``replicas.json``,
``replicas.md`` and ``replicas.svg``.

    python scripts/bench_replicas.py --clock cpu
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python scripts/bench_replicas.py --name replicas_kept
    python scripts/bench_replicas.py --device cuda --dtype bfloat16 --shapes opt-1.3b
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import torch
from _bench_models import SHAPES, backbone
from torch import nn

import tnpeft
from tnpeft.networks import Factorization

TARGETS = ("q_proj", "v_proj")
FAMILIES: Mapping[str, Factorization | None] = {
    "none": None,
    "lora r=8": tnpeft.families.lora(rank=8),
    "cp r=16": tnpeft.families.cp(rank=16),
    "tenslora r=8": tnpeft.families.tenslora(ranks=8),
}
BATCHES = ((1, 8), (4, 8), (4, 32), (16, 32), (16, 64))  # rows and tokens of each replica; SST-2's are 16 x 32


def trainer(base: nn.Module, f: Factorization | None, replicas: int, rows: int, length: int) -> Callable[[], None]:
    """One training step of so many replicas; of an ordinary adapter for 1; without one, forward and backward."""
    import peft

    weight = next(base.parameters())
    x = torch.randn(replicas * rows, length, base.config.hidden_size, device=weight.device, dtype=weight.dtype)
    target = torch.randn_like(x) / (rows * length)
    if f is None:
        base.train()
        return lambda: (base(inputs_embeds=x.requires_grad_(), use_cache=False)[0] * target).sum().backward()
    config = tnpeft.TensorNetworkConfig(
        network=f, target_modules=list(TARGETS), tokens=rows * length, replicas=replicas
    )
    model: Any = peft.get_peft_model(copy.deepcopy(base, {id(p): p for p in base.parameters()}), config).train()
    optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-3), fused=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    if replicas > 1:
        tnpeft.replicas.learning_rates(optimizer, model, [1 / (k + 1) for k in range(replicas)])

    def step() -> None:
        out = model(inputs_embeds=x, use_cache=False)[0]
        (out * target).sum().backward()
        if replicas > 1:
            tnpeft.replicas.clip(model, 1.0)
        else:
            nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every shape, family and batch; all numbers of replicas of one of them in turn."""
    dtype, rows = getattr(torch, options.dtype), []
    for shape, layers in options.shapes:
        base = backbone(shape, layers, options.device, dtype)
        for family in options.families:
            for size, length in options.batches:
                make = partial(trainer, base, FAMILIES[family], rows=size, length=length)
                runs = {str(k): make(replicas=k) for k in (1, *options.replicas)}
                times = _bench.interleaved(runs, options.samples, options.clock, options.device)
                row = {"shape": shape, "layers": layers, "family": family, "rows": size, "length": length}
                row["milliseconds"] = 1e3 * median(times["1"])
                row["gain"] = {k: k * _bench.ratio(times["1"], times[str(k)]) for k in options.replicas}
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    settings = {
        name: getattr(options, name) for name in ("replicas", "samples", "clock", "device", "dtype", "threads")
    }
    settings["malloc"] = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    return {"settings": settings, "machine": _bench.machine(options.threads), "cases": rows}


def report(data: Mapping[str, Any]) -> str:
    """The measurement as a page."""
    s, m = data["settings"], data["machine"]
    rows = [
        {
            "backbone": f"{row['shape']}, {row['layers']} layers",
            "adapter": row["family"],
            "tokens of a replica": f"{row['rows']} x {row['length']}",
            "ms alone": row["milliseconds"],
            **{f"K={k}": f"{gain:.2f}" for k, gain in row["gain"].items()},
        }
        for row in data["cases"]
    ]
    return (
        "# K adapters in one pass\n\n"
        "Steps of K adapters trained in one pass over one frozen backbone, over those of K runs in turn in the same "
        "time: above 1 the pass is faster. A step is forward, backward, clipping and AdamW of an adapter on "
        f"{', '.join(TARGETS)}. Without an adapter it is forward and backward of the frozen backbone, on K batches "
        "at once or one by one, which is most of what there is to gain. "
        f"{s['dtype']}, {s['device']}, {m['threads']} threads, {s['samples']} interleaved samples by the "
        f"{s['clock']} clock, load {m['load']} on {m['cores']} cores ({m['gpu'] or m['processor']}; "
        f"torch {m['torch']}){'; freed memory is kept, not given back to the system' if s['malloc'] else ''}.\n\n"
        + _bench.markdown(rows)
    )


def plot(data: Mapping[str, Any], path: Path) -> None:
    """The gain of each number of replicas against the tokens of one, a panel for each backbone."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row["shape"], row["layers"]) for row in data["cases"]))
    families = list(dict.fromkeys(row["family"] for row in data["cases"]))
    figure = Figure(figsize=(4 * len(shapes), 3.2))
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, (shape, layers) in zip(panels, shapes, strict=True):
        for family, line in zip(families, ("-", "--", ":"), strict=False):
            own = [row for row in data["cases"] if (row["shape"], row["family"]) == (shape, family)]
            for colour, k in enumerate(data["settings"]["replicas"]):
                tokens = [row["rows"] * row["length"] for row in own]
                label = f"K={k}" if family == families[0] else None
                gains = [row["gain"][k] for row in own]
                axes.plot(tokens, gains, line, color=f"C{colour}", marker=".", label=label)
        axes.axhline(1, color="black", linewidth=0.5)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of each replica")
        axes.set_title(f"{shape}, {layers} layers", fontsize=9)
    panels[0].set_ylabel("steps over those of runs in turn")
    panels[0].legend(title=", ".join(families), fontsize=7, title_fontsize=6)
    _bench.save_figure(figure, path)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny:4", "opt-125m:2"], help="shape:layers")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    parser.add_argument("--batches", nargs="+", default=[f"{a}x{b}" for a, b in BATCHES], help="rows x tokens")
    parser.add_argument("--replicas", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument(
        "--clock", choices=_bench.CLOCKS, default="wall", help="cpu: time that other work cannot add to"
    )
    parser.add_argument("--name", default="replicas", help="name of the files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_bench.TABLES)
    options = parser.parse_args()
    options.shapes = [
        (name, int(layers or SHAPES[name][2])) for name, _, layers in (t.partition(":") for t in options.shapes)
    ]
    options.batches = [tuple(map(int, text.split("x"))) for text in options.batches]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data = measure(options)
    _bench.write(options.out, options.name, data, report(data))
    plot(data, options.out / f"{options.name}.svg")
    print(report(data))


if __name__ == "__main__":
    main()
