"""Token-by-token generation: the frozen model, adapters on it, and adapters merged into it, side by side.

Every case decodes the same number of tokens greedily with a key-value cache, one sequence in turn.

    python scripts/bench.py decode --layers 4 --clock cpu
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor

from bench import driver, models

TITLE = "Token-by-token generation"
ABOUT = """{shape} with {layers} layers, q_proj, k_proj, v_proj, one sequence, {prompt} tokens of prompt, {tokens}
decoded one by one. Medians of the ratios to the frozen model's time in the same turn."""
OPTIONS = {**models.SHAPE, "prompt": 16, "tokens": 16, **driver.DEVICE, **driver.ONLY}
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
def decode(model: Callable[..., Any], prompt: Tensor, tokens: int) -> Tensor:
    """Return greedy tokens after the prompt, made one at a time."""
    found = model(input_ids=prompt, use_cache=True)
    out = []
    for _ in range(tokens):
        token = found.logits[:, -1:].argmax(-1)
        out.append(token)
        found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
    return torch.cat(out, dim=1)


def cases(options: argparse.Namespace) -> dict[str, driver.Case]:
    """Return all cases; merged ones must give the tokens of unmerged ones."""
    base = models.backbone(options.shape, options.layers, causal=True, eos_token_id=None).to(options.device).eval()
    prompt = torch.arange(3, 3 + options.prompt, device=options.device)[None]

    def case(model: Any) -> driver.Case:
        run = partial(decode, model, prompt, options.tokens)
        return driver.Case(run, unit="milliseconds per token", per=options.tokens)

    found, few = {"floor": case(base)}, min(4, options.tokens)
    for name, config in driver.chosen(models.configs(1, names=KINDS), options.only).items():
        found[name] = case(models.adapted(base, config).eval())
        merged = peft.get_peft_model(copy.deepcopy(base), config).eval().merge_and_unload()
        assert torch.equal(decode(merged, prompt, few), found[name].run()[:, :few])
        found[f"{name}, merged"] = case(merged)
    return found


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each adapter, with its merged model."""
    over = {name: f"{row['overhead']:+.1%}" for name, row in data["cases"].items()}
    return [
        {
            "case": name,
            "ms per token": row["milliseconds per token"],
            "over the frozen model": over[name] if name != "floor" else "",
            "merged, over the frozen model": over.get(f"{name}, merged", ""),
        }
        for name, row in data["cases"].items()
        if not name.endswith(", merged")
    ]
