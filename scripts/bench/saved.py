"""What one adapted linear keeps for its backward pass, in bytes, ours and PEFT's own layers: exact, nothing is timed.

Kept are the distinct storages that autograd saves in a forward, Parameters and buffers left out. The input is kept by
nearly every adapter and told apart.

    python scripts/bench.py saved
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import peft
import torch
from torch import Tensor, nn

from bench import driver, meters, models

TITLE = "What one adapted linear keeps for backward"
ABOUT = """Bytes of the distinct storages that autograd saves in the forward of one square linear with an adapter,
float32; Parameters and buffers left out. Below zero beside the input: the input itself is not kept."""
OPTIONS = driver.ONLY
EXACT = True
SIZES = ((2048, 64), (2048, 1024), (768, 1024))  # width of the linear, tokens
BYTES = 4


class Site(nn.Module):
    """A model of one linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = {"num_attention_heads": 16}
        self.q_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear's output."""
        result: Tensor = self.q_proj(x)
        return result


def inner_width(run: Any) -> int:
    """Return the elements, for each token, of the narrowest result between input and output."""
    plan = run.plan
    through = [s for s in plan.steps if plan.activation in s.indices and s.kind == "contract" and s.result != "y"]
    return min((prod(plan.sizes[i] for i in s.indices if i != plan.activation) for s in through), default=run.cols)


def kept(config: Any, width: int, tokens: int) -> dict[str, Any]:
    """Return the bytes that a linear with an adapter keeps; for ours the inner width and the factors' bytes."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Site(width), config)
    x = torch.randn(tokens, width).requires_grad_()
    row: dict[str, Any] = {"saved": meters.saved_bytes(model, partial(model, x))}
    for module in model.modules():
        for item in getattr(module, "updates", {}).get("default", ()):
            row["width"] = inner_width(item.program)
            row["factors"] = BYTES * sum(param.size for param in item.site_layout.parameters.values())
    return row


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return every method at every size."""
    rows = []
    for width, tokens in SIZES:
        for name, config in driver.chosen(models.configs(tokens, ["q_proj"]), options.only).items():
            rows.append({"case": name, "linear": width, "tokens": tokens, **kept(config, width, tokens)})
    return {"cases": rows}


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each method and size."""
    return [
        {
            "case": row["case"],
            "linear": row["linear"],
            "tokens": row["tokens"],
            "bytes kept": row["saved"],
            "beside the input": row["saved"] - BYTES * row["linear"] * row["tokens"],
            "inner width": row.get("width"),
            "bytes of its factors": row.get("factors"),
        }
        for row in data["cases"]
    ]
