"""One training step over a frozen backbone.

{{ "The bare linears of " if bare }}{{ shape }} with {{ layers }} layers, q_proj, k_proj, v_proj, {{ batch }} x
{{ length }} tokens, {{ how }}. Time: median of the ratios to the floor's step in the same turn. Flops (torch's
counter), bytes kept for backward (distinct storages, no parameters), peak and operations are exact and not timed; the
floor's row holds its own numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import driver, meters, models
from bench.models import CONSTRUCTIONS, TARGETS

# The floor is the frozen backbone with gradients flowing to the embeddings' output.
OPTIONS = models.options(
    "shape layers dtype device narrow compile only",
    bare={"action": "store_true", "help": "the adapted linears and nothing else"},
    batch=8,
    length=128,
)
PUBLISHED = {
    "step_bare": "--bare --layers 2 --samples 9 --clock cpu",
    "step": "--layers 2 --samples 5 --clock cpu",
    "step_lora": "--layers 2 --samples 41 --clock cpu --only 'PEFT LoRA r=8' 'lora rank=8'",
    "step_gpu_narrow": "--samples 15 --shape opt-1.3b --length 512 --device cuda --dtype bfloat16 --narrow --only "
    "'PEFT LoRA r=8' 'lora rank=8' 'cp rank=8' 'lorta rank=8' 'tenslora qkv_depth ranks=8' 'tera ranks=8' "
    "'PEFT VeRA r=256' 'vera rank=256' 'PEFT LoKr r=8' 'lokr rank=8'",
}
CASES = ("floor", *models.METHODS, *(f"rebuilt tensor: {name}" for name in CONSTRUCTIONS), "rebuilt site: qkv_depth")


def cases(options: driver.Options) -> driver.Cases:
    """Yield all cases, metered."""
    base = models.placed(options)
    base, tokens = models.Bare(base) if options.bare else base, options.batch * options.length
    forward_of = models.stepper(models.embeddings(base, options.batch, options.length))
    for name in driver.chosen(CASES, options.only):
        way, _, construction = name.partition(": ")
        if construction:
            model = models.rebuilt(base, f"tenslora {construction} ranks=8", whole=way == "rebuilt tensor")
        elif name == "floor":
            model = models.sharing(base)
        else:
            model = models.adapted(base, models.config(name, tokens), options.narrow)
        forward = forward_of(model.train())
        facts = {"parameters": models.trained(model), **vars(meters.meters(model, forward, options.device))}
        forward = forward_of(torch.compile(model)) if options.compile else forward
        yield name, driver.Case(models.backward(forward), facts)


def tables(data: Any) -> driver.Rows:
    """Yield a row for each case."""
    floor, sites = data["cases"]["floor"], len(TARGETS) * data["settings"]["layers"]
    for name, row in data["cases"].items():
        own = name == "floor"
        yield {
            "case": name,
            "parameters": row["parameters"],
            "time over floor": f"{row['milliseconds']:.0f} ms" if own else f"{row['overhead']:+.1%}",
            "flops over floor": f"{row['flops']:,}" if own else f"{row['flops'] / floor['flops'] - 1:+.2%}",
            "saved bytes per site": row["saved"] if own else (row["saved"] - floor["saved"]) // sites,
            "peak over floor, MB": (row["peak"] - (0 if own else floor["peak"])) / 1e6,
            "operations": row["kernels"],
        }
