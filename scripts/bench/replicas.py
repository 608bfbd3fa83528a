"""K adapters in one pass.

Steps of K adapters trained in one pass over one frozen backbone, over those of K runs in turn in the same time: above
1 the pass is faster. A step is forward, backward, clipping and AdamW of an adapter on q_proj and v_proj. Without an
adapter it is forward and backward of the frozen backbone, on K batches at once or one by one, which is most of what
there is to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import nn

import tnpeft
from bench import driver, models

TARGETS = ("q_proj", "v_proj")
FAMILIES: Mapping[str, str] = {
    "none": "",
    "lora r=8": "lora rank=8",
    "cp r=16": "cp rank=16",
    "tenslora r=8": "tenslora ranks=8",
}


def with_layers(text: str) -> tuple[str, int]:
    """Return a shape and a number of layers, from ``shape:layers``."""
    name, _, layers = text.partition(":")
    return name, int(layers or models.SHAPES[name][2])


SHAPES = {"nargs": "+", "type": with_layers, "default": [("tiny", 4), ("opt-125m", 2)], "help": "name:layers"}
OPTIONS = models.options(
    "dtype device",
    shapes=SHAPES,
    families={"nargs": "+", "choices": FAMILIES, "default": [*FAMILIES]},
    batches=("1x8", "4x8", "4x32", "16x32", "16x64"),  # rows x tokens of each replica; SST-2's are 16 x 32
    replicas=(2, 4, 8),
)
PUBLISHED = {
    "replicas": "--samples 3 --clock cpu",
    "replicas_kept": "--samples 3 --clock cpu --batches 16x32 16x64",
    "replicas_gpu": "--samples 9 --device cuda --dtype bfloat16 --shapes opt-125m:12 "
    "--families none 'lora r=8' 'cp r=16' --batches 16x32 16x64",
}


def trainer(base: nn.Module, title: str, replicas: int, rows: int, length: int) -> Callable[[], None]:
    """Return one training step of so many replicas (1: an ordinary adapter); without one, forward and backward."""
    x = models.embeddings(base, replicas * rows, length)
    target = torch.randn_like(x) / (rows * length)
    model, update = base.train(), lambda: None
    if title:
        config = models.network(models.family(title), rows * length, TARGETS, replicas=replicas)
        model = models.adapted(base, config).train()
        optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-3), fused=True)
        update = updater(model, optimizer, replicas)
    else:
        x.requires_grad_()

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


def measure(options: driver.Options) -> driver.Rows:
    """Yield every shape, family and batch; all numbers of replicas of one of them in turn."""
    for shape, layers in options.shapes:
        base = models.backbone(shape, layers).to(options.device, getattr(torch, options.dtype))
        for family, batch in product(options.families, options.batches):
            rows, length = map(int, batch.split("x"))
            make = partial(trainer, base, FAMILIES[family], rows=rows, length=length)
            runs = {k: make(replicas=k) for k in (1, *options.replicas)}
            times = driver.interleaved(runs, options)
            case = {"shape": shape, "layers": layers, "family": family, "rows": rows, "length": length}
            gain = {k: k * driver.ratio(times[1], times[k]) for k in options.replicas}
            yield {**case, "milliseconds": 1e3 * median(times[1]), "gain": gain}


def row(its: Mapping[str, Any], between: Mapping[str, Any]) -> dict[str, Any]:
    """Return a case as a row of a table: backbone, adapter, what tells it from others, and its gains."""
    head = {"backbone": f"{its['shape']}, {its['layers']} layers", "adapter": its["family"]}
    return {**head, **between, **{f"K={k}": f"{gain:.2f}" for k, gain in its["gain"].items()}}


def tables(data: Any) -> driver.Rows:
    """Yield a row for each case."""
    for its in data["cases"]:
        size = f"{its['rows']} x {its['length']}"
        yield row(its, {"tokens of a replica": size, "ms alone": its["milliseconds"]})
