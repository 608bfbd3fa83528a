"""One training step of many adapters over one frozen OPT backbone, side by side: time, flops, bytes, kernels.

With ``--bare`` the backbone is nothing but the q, k and v linears of each layer, each layer's sum the input of
the next: there overheads stand out of the noise of a busy machine.

The floor is the frozen backbone with gradients flowing to the embeddings' output. All cases run in turn, a step each,
and a case's overhead is the median of its time over the floor's in the same turn, less one.

    python scripts/bench.py step --layers 2 --samples 9 --clock cpu
    python scripts/bench.py step --only "PEFT LoRA r=8" "lora rank=8" --compile --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import tnpeft
from bench import driver, meters, models
from bench.models import CONSTRUCTIONS, SHAPES, TARGETS

TITLE = "One training step over a frozen backbone"
OPTIONS = {
    **models.SHAPE,
    "bare": {"action": "store_true", "help": "the adapted linears and nothing else"},
    "batch": 8,
    "length": 128,
    **driver.DTYPE,
    **driver.DEVICE,
    **models.NARROW,
    "compile": False,
    **driver.ONLY,
}


def makers(tokens: int, narrow: bool = False) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return what turns a backbone into a case, by the case's name."""
    found: dict[str, Callable[[nn.Module], nn.Module]] = {"floor": models.sharing}
    found |= {
        name: partial(models.adapted, config=config, narrow=narrow) for name, config in models.configs(tokens).items()
    }
    for construction in CONSTRUCTIONS:
        f = tnpeft.families.tenslora(construction, ranks=8)
        found[f"rebuilt tensor: {construction}"] = partial(models.rebuilt, f=f, whole=True)
    found["rebuilt site: qkv_depth"] = partial(models.rebuilt, f=tnpeft.families.tenslora(ranks=8), whole=False)
    return found


def cases(options: argparse.Namespace) -> dict[str, driver.Case]:
    """Return all cases, metered."""
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    base = models.backbone(options.shape, options.layers).to(**kind)
    base = models.Bare(base) if options.bare else base
    forward_of = models.stepper((options.batch, options.length), SHAPES[options.shape][0], **kind)
    found = {}
    for name, make in driver.chosen(makers(options.batch * options.length, options.narrow), options.only).items():
        model = make(base).train()
        forward = forward_of(model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts = {"parameters": trainable, **vars(meters.meters(model, forward, options.device))}
        forward = forward_of(torch.compile(model)) if options.compile else forward
        found[name] = driver.Case(models.backward(forward), facts)
        driver.progress(f"{name}: {facts}")
    return found


def about(data: Mapping[str, Any]) -> str:
    """Return what was measured."""
    s = data["settings"]
    return (
        f"{'The bare linears of ' * s['bare']}{s['shape']} with {s['layers']} layers, {', '.join(TARGETS)}, "
        f"{s['batch']} x {s['length']} tokens, {models.described(s)}. Time: median of the ratios "
        "to the floor's step in the same turn. Flops (torch's counter), bytes kept for backward (distinct storages, "
        "no parameters), peak and operations are exact and not timed; the floor's row holds its own numbers."
    )


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each case."""
    floor, sites = data["cases"]["floor"], len(TARGETS) * data["settings"]["layers"]
    own = {
        "case": "floor",
        "parameters": floor["parameters"],
        "time over floor": f"{floor['milliseconds']:.0f} ms",
        "flops over floor": f"{floor['flops']:,}",
        "saved bytes per site": floor["saved"],
        "peak over floor, MB": floor["peak"] / 1e6,
        "operations": floor["kernels"],
    }
    rows = [
        {
            "case": name,
            "parameters": row["parameters"],
            "time over floor": f"{row['overhead']:+.1%}",
            "flops over floor": f"{row['flops'] / floor['flops'] - 1:+.2%}",
            "saved bytes per site": (row["saved"] - floor["saved"]) // sites,
            "peak over floor, MB": (row["peak"] - floor["peak"]) / 1e6,
            "operations": row["kernels"],
        }
        for name, row in data["cases"].items()
        if name != "floor"
    ]
    return [own, *rows]
