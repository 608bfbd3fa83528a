"""What preconditioned steps (``tnpeft.optim``) cost: the optimizer's part of a training step, with and without.

python scripts/bench.py optimizer --clock cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

import tnpeft
from bench import driver, models
from bench.models import SHAPES

TITLE = "What preconditioned steps cost"
ABOUT = """Adapters on q_proj and v_proj of {shape} with {layers} layers, {batch} x {length} tokens: forward and
backward, AdamW's step, and what preconditioning adds to it."""
OPTIONS = {**models.SHAPE, "layers": 2, "batch": 8, "length": 128, **driver.ONLY}
TARGETS = ("q_proj", "v_proj")
FAMILIES = ("lora", "moslora", "tucker", "tensor_train", "cp", "lotr", "tenslora")
MODES: Mapping[str, Mapping[str, bool] | None] = {
    "AdamW": None,
    "preconditioned": {"invariant": False},
    "invariant": {"invariant": True},
}


def cases(options: argparse.Namespace) -> dict[str, driver.Case]:
    """Return each family's forward and backward, and its optimizer's steps on one gradient in every mode."""
    base, found = models.backbone(options.shape, options.layers), {}
    forward_of = models.stepper((options.batch, options.length), SHAPES[options.shape][0])
    for name in driver.chosen(dict.fromkeys(FAMILIES), options.only):
        config = models.network(tnpeft.families.get(name)(), options.batch * options.length, TARGETS)
        for mode, how in MODES.items():
            model = models.adapted(base, config).train()
            optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, relative_step=1e-3))
            if how is not None:
                tnpeft.optim.precondition(optimizer, model, **how)
            models.backward(forward_of(model))()
            found[f"{name}, {mode}"] = driver.Case(optimizer.step, floor=f"{name}, AdamW")
        found[name] = driver.Case(models.backward(forward_of(models.adapted(base, config).train())), floor=name)
    return found


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each family."""
    ms = {name: case["milliseconds"] for name, case in data["cases"].items()}
    return [
        {"family": name, "forward and backward ms": ms[name], "AdamW ms": ms[f"{name}, AdamW"]}
        | {f"+ {mode} ms": ms[f"{name}, {mode}"] - ms[f"{name}, AdamW"] for mode in MODES if mode != "AdamW"}
        for name in FAMILIES
        if name in ms
    ]
