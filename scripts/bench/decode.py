"""Token-by-token generation.

{{ shape }} with {{ layers }} layers, q_proj, k_proj, v_proj, one sequence, {{ prompt }} tokens of prompt,
{{ tokens }} decoded one by one. Medians of the ratios to the frozen model's time in the same turn.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor

from bench import driver, models

OPTIONS = models.options("shape layers device only", prompt=16, tokens=16)
PUBLISHED = {"decode": "--samples 21 --clock cpu"}
KINDS = (
    "PEFT LoRA r=8",
    "lora rank=8",
    "cp rank=8",
    "lorta rank=8",
    "tenslora qkv_depth ranks=8",
    "tensor_train",
    "vera rank=256",
    "lokr rank=8",
)


@torch.no_grad()
def decode(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """Return greedy tokens after the prompt, made one at a time."""
    found = model(input_ids=prompt, use_cache=True)
    out = []
    for _ in range(tokens):
        out.append(found.logits[:, -1:].argmax(-1))
        found = model(input_ids=out[-1], past_key_values=found.past_key_values, use_cache=True)
    return torch.cat(out, dim=1)


def cases(options: driver.Options) -> driver.Cases:
    """Yield all cases; merged ones must give the tokens of unmerged ones."""
    base = models.placed(options, causal=True, eos_token_id=None).eval()
    prompt = torch.arange(3, 3 + options.prompt, device=options.device)[None]
    built = {"floor": base}
    for name in driver.chosen(KINDS, options.only):
        config = models.config(name, 1)
        model = models.adapted(base, config).eval()
        merged = peft.get_peft_model(copy.deepcopy(base), config).eval().merge_and_unload()
        assert torch.equal(*(decode(its, prompt, min(4, options.tokens)) for its in (merged, model)))
        built |= {name: model, f"{name}, merged": merged}
    for name, model in built.items():
        run = partial(decode, model, prompt, options.tokens)
        yield name, driver.Case(run, unit="milliseconds per token", per=options.tokens)


def tables(data: Any) -> driver.Rows:
    """Yield a row for each adapter, with its merged model."""
    over = {name: f"{row['overhead']:+.1%}" for name, row in data["cases"].items()}
    for name, row in data["cases"].items():
        if not name.endswith(", merged"):
            yield {
                "case": name,
                "ms per token": row["milliseconds per token"],
                "over the frozen model": over[name] if name != "floor" else "",
                "merged, over the frozen model": over.get(f"{name}, merged", ""),
            }
