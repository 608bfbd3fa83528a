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
SHAPES = ("tiny:4", "opt-125m:2")  # and numbers of layers
OPTIONS = models.options(
    "dtype device",
    shapes=SHAPES,
    families=("none", "lora rank=8", "cp rank=16", "tenslora ranks=8"),
    batches=("1x8", "4x8", "4x32", "16x32", "16x64"),  # rows x tokens of each replica; SST-2's are 16 x 32
    replicas=(2, 4, 8),
)
PUBLISHED = {
    "replicas": "--samples 3 --clock cpu",
    "replicas_kept": "--samples 3 --clock cpu --batches 16x32 16x64",
    "replicas_gpu": "--samples 9 --device cuda --dtype bfloat16 --shapes opt-125m:12 "
    "--families none 'lora rank=8' 'cp rank=16' --batches 16x32 16x64",
}


def trainer(base: nn.Module, title: str, rows: int, length: int, replicas: int) -> Callable[[], None]:
    """Return one training step of so many replicas (1: an ordinary adapter); without one, forward and backward."""
    x = models.embeddings(base, replicas * rows, length)
    if title == "none":
        return models.backward(models.stepper(x)(base.train()))
    model = models.adapted(base, models.config(title, rows * length, TARGETS, replicas=replicas)).train()
    forward = models.stepper(x, grad=False)(model)
    update = updater(model, torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-3), fused=True), replicas)
    return lambda: (forward().backward(), update())[1]


def updater(model: nn.Module, optimizer: torch.optim.Optimizer, replicas: int) -> Callable[[], None]:
    """Return clipping and the optimizer's step, for replicas with a learning rate each."""
    clip = partial(nn.utils.clip_grad_norm_, [p for p in model.parameters() if p.requires_grad], 1.0)
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
    for shape in options.shapes:
        base = models.placed(options, shape)
        its = {"shape": shape.partition(":")[0], "layers": base.config.num_hidden_layers}
        for family, batch in product(options.families, options.batches):
            rows, length = map(int, batch.split("x"))
            runs = {k: trainer(base, family, rows, length, k) for k in (1, *options.replicas)}
            times = driver.interleaved(runs, options)
            gain = {k: k * driver.ratio(times[1], times[k]) for k in options.replicas}
            case = {**its, "family": family, "rows": rows, "length": length}
            yield {**case, "milliseconds": 1e3 * median(times[1]), "gain": gain}


def row(its: Mapping[str, Any], **between: Any) -> dict[str, Any]:
    """Return a case as a row of a table: backbone, adapter, what tells it from others, and its gains."""
    head = {"backbone": f"{its['shape']}, {its['layers']} layers", "adapter": its["family"]}
    return {**head, **between, **{f"K={k}": f"{gain:.2f}" for k, gain in its["gain"].items()}}


def tables(data: Any) -> driver.Rows:
    """Yield a row for each case."""
    for its in data["cases"]:
        size = {"tokens of a replica": f"{its['rows']} x {its['length']}", "ms alone": its["milliseconds"]}
        yield row(its, **size)
