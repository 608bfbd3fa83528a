"""K adapters trained in one pass against K runs in turn: training steps per second, by tokens of each replica.

A step is forward, backward, clipping and AdamW; the runs in turn take theirs one after the other. All cases of one
size are interleaved, and the gain is the median of (K steps of one run) over (one step of K replicas) in the same
turn. The frozen backbone alone, on K batches at once, says what there is to gain.

    python scripts/bench.py replicas --clock cpu
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python scripts/bench.py replicas --name replicas_kept
    python scripts/bench.py replicas --device cuda --dtype bfloat16 --shapes opt-1.3b
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

import tnpeft
from bench import driver, models
from tnpeft.networks import Factorization

TITLE = "K adapters in one pass"
ABOUT = """Steps of K adapters trained in one pass over one frozen backbone, over those of K runs in turn in the same
time: above 1 the pass is faster. A step is forward, backward, clipping and AdamW of an adapter on q_proj and v_proj.
Without an adapter it is forward and backward of the frozen backbone, on K batches at once or one by one, which is
most of what there is to gain."""
TARGETS = ("q_proj", "v_proj")
FAMILIES: Mapping[str, Factorization | None] = {
    "none": None,
    "lora r=8": tnpeft.families.lora(rank=8),
    "cp r=16": tnpeft.families.cp(rank=16),
    "tenslora r=8": tnpeft.families.tenslora(ranks=8),
}
SHAPES = {"nargs": "+", "type": models.with_layers, "default": [("tiny", 4), ("opt-125m", 2)], "help": "name:layers"}
OPTIONS = {
    "shapes": SHAPES,
    "families": {"nargs": "+", "choices": FAMILIES, "default": [*FAMILIES]},
    "batches": ("1x8", "4x8", "4x32", "16x32", "16x64"),  # rows x tokens of each replica; SST-2's are 16 x 32
    "replicas": (2, 4, 8),
    **driver.DTYPE,
    **driver.DEVICE,
}


def trainer(base: nn.Module, f: Factorization | None, replicas: int, rows: int, length: int) -> Callable[[], None]:
    """Return one training step of so many replicas (1: an ordinary adapter); without one, forward and backward."""
    weight = next(base.parameters())
    kind = {"device": weight.device, "dtype": weight.dtype}
    x = torch.randn(replicas * rows, length, base.config.hidden_size, **kind)
    target = torch.randn_like(x) / (rows * length)
    if f is None:
        base.train()
        return lambda: (base(inputs_embeds=x.requires_grad_(), use_cache=False)[0] * target).sum().backward()
    model = models.adapted(base, models.network(f, rows * length, TARGETS, replicas=replicas)).train()
    optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-3), fused=True)
    update = updater(model, optimizer, replicas)

    def step() -> None:
        out = model(inputs_embeds=x, use_cache=False)[0]
        (out * target).sum().backward()
        update()

    return step


def updater(model: nn.Module, optimizer: torch.optim.Optimizer, replicas: int) -> Callable[[], None]:
    """Return clipping and the optimizer's step, for replicas with a learning rate each."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    clip = partial(nn.utils.clip_grad_norm_, trained, 1.0)
    if replicas > 1:
        clip = partial(tnpeft.replicas.clip, model, 1.0)
        tnpeft.replicas.learning_rates(optimizer, model, [1 / (k + 1) for k in range(replicas)])

    def update() -> None:
        clip()
        optimizer.step()
        optimizer.zero_grad()

    return update


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return every shape, family and batch; all numbers of replicas of one of them in turn."""
    dtype, rows = getattr(torch, options.dtype), []
    for shape, layers in options.shapes:
        base = models.backbone(shape, layers).to(options.device, dtype)
        for family in options.families:
            for size, length in (map(int, text.split("x")) for text in options.batches):
                make = partial(trainer, base, FAMILIES[family], rows=size, length=length)
                runs = {str(k): make(replicas=k) for k in (1, *options.replicas)}
                times = driver.interleaved(runs, options.samples, options.clock, options.device)
                row = {"shape": shape, "layers": layers, "family": family, "rows": size, "length": length}
                row["milliseconds"] = 1e3 * median(times["1"])
                row["gain"] = {k: k * driver.ratio(times["1"], times[str(k)]) for k in options.replicas}
                rows.append(row)
                driver.progress(row)
    return {"cases": rows}


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each case."""
    return [
        {
            "backbone": f"{row['shape']}, {row['layers']} layers",
            "adapter": row["family"],
            "tokens of a replica": f"{row['rows']} x {row['length']}",
            "ms alone": row["milliseconds"],
            **{f"K={k}": f"{gain:.2f}" for k, gain in row["gain"].items()},
        }
        for row in data["cases"]
    ]
