"""Many adapters in one batch.

Forward of {{ shape }} with {{ layers }} layers, q_proj, k_proj, v_proj, on {{ adapters }} rows, each with another
adapter (`adapter_names`). Medians of the ratios to the frozen model's time in the same turn.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bench import driver, forward, models

OPTIONS = models.options("shape dtype device only", layers=2, adapters=16, tokens=(1, 16, 128))
PUBLISHED = {
    "mixed": "--samples 15 --clock cpu",
    "mixed_gpu": "--samples 15 --shape opt-1.3b --layers 12 --device cuda --dtype bfloat16",
}
KINDS = ("PEFT LoRA r=8", "lora rank=8", "cp rank=8", "tenslora qkv_depth ranks=8")
tables = partial(forward.tables, head="{} tokens a row", shown="{:+.0%}")


def cases(options: driver.Options) -> driver.Cases:
    """Yield the forward of each kind at each length."""
    base = models.placed(options).eval()
    names = [f"a{k}" for k in range(options.adapters)]
    calls: dict[str, Any] = {"floor": base}
    for kind in driver.chosen(KINDS, options.only):
        config = models.config(kind, 16)
        model = models.adapted(base, config)
        for name in names:
            model.add_adapter(name, config)
        calls[kind] = partial(model.eval(), adapter_names=names)
    for tokens in options.tokens:
        yield from forward.forwards(calls, models.embeddings(base, len(names), tokens), tokens)
