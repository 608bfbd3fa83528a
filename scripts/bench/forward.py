"""Forward of adapters over the frozen model at several numbers of tokens, side by side.

The floor is the frozen model on the same batch of rows of equal length; nothing is trained, nothing is kept for a
backward. On a GPU few tokens show what each operation costs to launch, many what it costs to run; compiled, launches
cost little.

    python scripts/bench.py forward --device cuda --dtype bfloat16
    python scripts/bench.py forward --device cuda --dtype bfloat16 --layers 2 --compile
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from bench import driver, models
from bench.models import SHAPES

TITLE = "Forward over the frozen model, by tokens"
OPTIONS = {
    **models.SHAPE,
    "shape": {"choices": SHAPES, "default": "opt-1.3b"},
    "tokens": (1024, 4096, 16384),
    "length": {"type": int, "default": 1024, "help": "tokens of a row (default: %(default)s)"},
    **driver.DTYPE,
    **driver.DEVICE,
    **models.NARROW,
    "compile": False,
    **driver.ONLY,
}
KINDS = ("PEFT LoRA r=8", "lora rank=8", "cp rank=8", "lorta rank=8", "tenslora qkv_depth ranks=8", "tera ranks=8")


def cases(options: argparse.Namespace) -> dict[str, driver.Case]:
    """Return the forward of each kind at each number of tokens."""
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    base = models.backbone(options.shape, options.layers).to(**kind).eval()
    chosen = driver.chosen(models.configs(max(options.tokens), names=KINDS), options.only)
    torch._dynamo.config.recompile_limit = 64  # all cases call one function of PEFT's
    made = {
        "floor": base,
        **{name: models.adapted(base, config, options.narrow).eval() for name, config in chosen.items()},
    }
    found = {}
    for tokens in options.tokens:
        rows, length = max(1, tokens // options.length), min(tokens, options.length)
        x = torch.randn(rows, length, SHAPES[options.shape][0], **kind)
        for name, model in made.items():
            # Each number of tokens is compiled for itself.
            call = torch.compile(models.sharing(model), dynamic=False) if options.compile else model
            run = torch.no_grad()(partial(call, inputs_embeds=x, use_cache=False))
            found[f"{name}, {tokens} tokens"] = driver.Case(run, {"tokens": tokens}, f"floor, {tokens} tokens")
    return found


def about(data: Mapping[str, Any]) -> str:
    """Return what was measured."""
    s = data["settings"]
    return (
        f"Forward of {s['shape']} with {s['layers']} layers, q_proj, k_proj, v_proj, rows of at most {s['length']} "
        f"tokens, {models.described(s)}, nothing kept for a backward. Medians of the ratios to "
        "the frozen model's time in the same turn."
    )


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each kind of adapter, a column for each number of tokens."""
    return driver.by_column(data["cases"], "tokens", "{:,} tokens", "{:+.1%}")
