"""Forward over the frozen model, by tokens.

Forward of {{ shape }} with {{ layers }} layers, q_proj, k_proj, v_proj, rows of at most {{ length }} tokens,
{{ how }}, nothing kept for a backward. Medians of the ratios to the frozen model's time in the same turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from bench import driver, models

# On a GPU few tokens show what each operation costs to launch, many what it costs to run; compiled, launches cost
# little.
OPTIONS = models.options(
    "layers dtype device narrow compile only",
    shape={"choices": models.SHAPES, "default": "opt-1.3b"},
    tokens=(1024, 4096, 16384),
    length={"type": int, "default": 1024, "help": "tokens of a row (default: %(default)s)"},
)
PUBLISHED = {
    "forward_gpu": "--samples 15 --device cuda --dtype bfloat16",
    "forward_gpu_narrow": "--samples 15 --device cuda --dtype bfloat16 --narrow",
}
KINDS = ("PEFT LoRA r=8", "lora rank=8", "cp rank=8", "lorta rank=8", "tenslora qkv_depth ranks=8", "tera ranks=8")


def cases(options: driver.Options) -> driver.Cases:
    """Yield the forward of each kind at each number of tokens."""
    base = models.placed(options).eval()
    made = {"floor": base}
    for name in driver.chosen(KINDS, options.only):
        made[name] = models.adapted(base, models.config(name, max(options.tokens)), options.narrow).eval()
    torch._dynamo.config.recompile_limit = 64  # all cases call one function of PEFT's
    for tokens in options.tokens:
        calls = made
        if options.compile:  # each number of tokens for itself
            calls = {name: torch.compile(models.sharing(model), dynamic=False) for name, model in made.items()}
        x = models.embeddings(base, max(1, tokens // options.length), min(tokens, options.length))
        yield from forwards(calls, x, tokens)


def forwards(calls: Mapping[str, Any], x: torch.Tensor, tokens: int) -> driver.Cases:
    """Yield the forward of every model on the same embeddings, over that of the floor, named by their tokens."""
    for name, call in calls.items():
        run = torch.no_grad()(partial(call, inputs_embeds=x, use_cache=False))
        yield f"{name}, {tokens} tokens", driver.Case(run, {"tokens": tokens}, f"floor, {tokens} tokens")


def tables(data: Any, head: str = "{:,} tokens", shown: str = "{:+.1%}") -> driver.Rows:
    """Return a row for each kind of adapter, a column for each number of tokens."""
    rows: dict[str, dict[str, Any]] = {}
    for name, case in data["cases"].items():
        cell = f"{case['milliseconds']:.3g} ms" if name.startswith("floor") else shown.format(case["overhead"])
        kind = name.rpartition(", ")[0]
        rows.setdefault(kind, {"case": kind})[head.format(case["tokens"])] = cell
    return rows.values()
