"""What one adapted linear keeps for backward.

Bytes of the distinct storages that autograd saves in the forward of one square linear with an adapter, float32;
Parameters and buffers left out. Below zero beside the input: the input itself is not kept.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import product
from math import prod
from typing import Any

import peft
import torch
from torch import nn

from bench import driver, meters, models

OPTIONS = models.options("only")
PUBLISHED = {"saved": ""}
EXACT = True
SIZES = ((2048, 64), (2048, 1024), (768, 1024))  # width of the linear, tokens
BYTES = 4


def inner_width(run: Any) -> int:
    """Return the elements, for each token, of the narrowest result between input and output."""
    plan = run.plan
    through = [s for s in plan.steps if plan.activation in s.indices and s.kind == "contract" and s.result != "y"]
    return min((prod(plan.sizes[i] for i in s.indices if i != plan.activation) for s in through), default=run.cols)


def measure(options: driver.Options) -> driver.Rows:
    """Yield the bytes that a linear keeps with every adapter; for ours the inner width and the factors' bytes."""
    for (width, tokens), name in product(SIZES, driver.chosen(models.METHODS, options.only)):
        torch.manual_seed(0)
        site: Any = nn.Sequential(OrderedDict(q_proj=nn.Linear(width, width)))
        site.config = {"num_attention_heads": 16}
        model = peft.get_peft_model(site, models.config(name, tokens, ["q_proj"]))
        x = torch.randn(tokens, width).requires_grad_()
        row = {"case": name, "linear": width, "tokens": tokens, "saved": meters.saved_bytes(model, partial(model, x))}
        for module in model.modules():
            for item in getattr(module, "updates", {}).get("default", ()):
                row["width"] = inner_width(item.program)
                row["factors"] = BYTES * sum(param.size for param in item.site_layout.parameters.values())
        yield row


def tables(data: Any) -> driver.Rows:
    """Yield a row for each method and size."""
    for row in data["cases"]:
        yield {
            "case": row["case"],
            "linear": row["linear"],
            "tokens": row["tokens"],
            "bytes kept": row["saved"],
            "beside the input": row["saved"] - BYTES * row["linear"] * row["tokens"],
            "inner width": row.get("width"),
            "bytes of its factors": row.get("factors"),
        }
