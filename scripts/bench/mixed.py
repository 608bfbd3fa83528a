"""Sixteen adapters in one batch, a row each: forward of short and long rows, through ours and through PEFT's.

The floor is the frozen model on the same batch; nothing is trained. The cases tell rows apart by ``adapter_names``.

    python scripts/bench.py mixed --clock cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from bench import driver, models
from bench.models import SHAPES

TITLE = "Many adapters in one batch"
ABOUT = """Forward of {shape} with {layers} layers, q_proj, k_proj, v_proj, on {adapters} rows, each with another
adapter (`adapter_names`). Medians of the ratios to the frozen model's time in the same turn."""
OPTIONS = {
    **models.SHAPE,
    "layers": 2,
    "adapters": 16,
    "tokens": (1, 16, 128),
    **driver.DTYPE,
    **driver.DEVICE,
    **driver.ONLY,
}
KINDS = ("PEFT LoRA r=8", "lora rank=8", "cp rank=8", "tenslora qkv_depth ranks=8")


def cases(options: argparse.Namespace) -> dict[str, driver.Case]:
    """Return the forward of each kind at each length."""
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    base = models.backbone(options.shape, options.layers).to(**kind).eval()
    names = [f"a{k}" for k in range(options.adapters)]
    calls: dict[str, Any] = {"floor": partial(base, use_cache=False)}
    for kind_name, config in driver.chosen(models.configs(16, names=KINDS), options.only).items():
        model = models.adapted(base, config)
        for name in names:
            model.add_adapter(name, config)
        calls[kind_name] = partial(model.eval(), use_cache=False, adapter_names=names)
    found = {}
    for tokens in options.tokens:
        x = torch.randn(len(names), tokens, SHAPES[options.shape][0], **kind)
        for name, call in calls.items():
            run = torch.no_grad()(partial(call, inputs_embeds=x))
            found[f"{name}, {tokens} tokens"] = driver.Case(run, {"tokens": tokens}, f"floor, {tokens} tokens")
    return found


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each kind of adapter, a column for each length."""
    return driver.by_column(data["cases"], "tokens", "{} tokens a row", "{:+.0%}")
