"""What preconditioned steps cost.

Adapters on q_proj and v_proj of {{ shape }} with {{ layers }} layers, {{ batch }} x {{ length }} tokens: forward and
backward, AdamW's step, and what preconditioning adds to it.
"""

from __future__ import annotations

from typing import Any

import torch

import tnpeft
from bench import driver, models

OPTIONS = models.options("shape only", layers=2, batch=8, length=128)
PUBLISHED = {"optimizer": "--samples 9 --clock cpu"}
FAMILIES = ("lora", "moslora", "tucker", "tensor_train", "cp", "lotr", "tenslora")
MODES = {"AdamW": None, "preconditioned": {"invariant": False}, "invariant": {"invariant": True}}


def cases(options: driver.Options) -> driver.Cases:
    """Yield each family's forward and backward, and its optimizer's steps on one gradient in every mode."""
    base = models.placed(options)
    forward_of = models.stepper(models.embeddings(base, options.batch, options.length))
    for name in driver.chosen(FAMILIES, options.only):
        config = models.config(name, options.batch * options.length, ("q_proj", "v_proj"))
        for mode, how in MODES.items():
            model = models.adapted(base, config).train()
            optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, relative_step=1e-3))
            if how is not None:
                tnpeft.optim.precondition(optimizer, model, **how)
            models.backward(forward_of(model))()
            yield f"{name}, {mode}", driver.Case(optimizer.step, floor=f"{name}, AdamW")
        yield name, driver.Case(models.backward(forward_of(models.adapted(base, config).train())), floor=name)


def tables(data: Any) -> driver.Rows:
    """Yield a row for each family."""
    ms = {name: case["milliseconds"] for name, case in data["cases"].items()}
    for name in filter(ms.__contains__, FAMILIES):
        own = ms[f"{name}, AdamW"]
        row = {"family": name, "forward and backward ms": ms[name], "AdamW ms": own}
        yield row | {f"+ {mode} ms": ms[f"{name}, {mode}"] - own for mode in MODES if mode != "AdamW"}
