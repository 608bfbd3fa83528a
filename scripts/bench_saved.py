"""What one adapted linear keeps for its backward pass, in bytes, beside PEFT's own layers: exact, nothing is timed.

Kept are the distinct storages that autograd saves in a forward, Parameters and buffers left out. The input is kept by
nearly every adapter and told apart. Writes ``saved.json`` and ``saved.md``.

    python scripts/bench_saved.py
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import _bench
import peft
import torch
from bench_step import FAMILIES, title
from torch import Tensor, nn

import tnpeft

SIZES = ((2048, 64), (2048, 1024), (768, 1024))  # width of the linear, tokens
BYTES = 4


class Site(nn.Module):
    """A model of one linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = {"num_attention_heads": 16}
        self.q_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output."""
        result: Tensor = self.q_proj(x)
        return result


def peers() -> dict[str, Any]:
    """PEFT's own methods at the ranks of the families beside them."""
    common = {"target_modules": ["q_proj"]}
    return {
        "PEFT LoRA r=8": peft.LoraConfig(r=8, **common),
        "PEFT LoRA r=64": peft.LoraConfig(r=64, **common),
        "PEFT VeRA r=256": peft.VeraConfig(r=256, **common),
        "PEFT LoKr r=8": peft.LoKrConfig(r=8, **common),
        "PEFT LoHa r=8": peft.LoHaConfig(r=8, **common),
        "PEFT RandLoRA r=32": peft.RandLoraConfig(r=32, **common),
    }


def inner_width(run: Any) -> int:
    """Elements, for each token, of the narrowest result between input and output."""
    plan = run.plan
    through = [s for s in plan.steps if plan.activation in s.indices and s.kind == "contract" and s.result != "y"]
    return min((prod(plan.sizes[i] for i in s.indices if i != plan.activation) for s in through), default=run.cols)


def kept(config: Any, width: int, tokens: int) -> dict[str, Any]:
    """The bytes that one linear with one adapter keeps, and for ours its inner width and what its factors take."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Site(width), config)
    x = torch.randn(tokens, width).requires_grad_()
    row: dict[str, Any] = {"saved": _bench.saved_bytes(model, partial(model, x))}
    for module in model.modules():
        for item in getattr(module, "updates", {}).get("default", ()):
            row["width"] = inner_width(item.run)
            row["factors"] = BYTES * sum(piece.size for piece in item.site_layout.parameters.values())
    return row


def measure() -> dict[str, Any]:
    """Every method at every size."""
    rows = []
    for width, tokens in SIZES:
        cases: dict[str, Any] = dict(peers())
        for name, options in FAMILIES:
            f = tnpeft.families.get(name)(**options)
            cases[title(name, options)] = tnpeft.TensorNetworkConfig(
                network=f, target_modules=["q_proj"], tokens=tokens
            )
        for name, config in cases.items():
            rows.append({"case": name, "linear": width, "tokens": tokens, **kept(config, width, tokens)})
    return {"machine": _bench.machine(), "cases": rows}


def report(data: Mapping[str, Any]) -> str:
    """The counts as a page."""
    rows = [
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
    return (
        "# What one adapted linear keeps for backward\n\n"
        "Bytes of the distinct storages that autograd saves in the forward of one square linear with an adapter, "
        "float32; Parameters and buffers left out. Below zero beside the input: the input itself is not kept.\n\n"
        + _bench.markdown(rows)
    )


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_bench.TABLES)
    options = parser.parse_args()
    data = measure()
    _bench.write(options.out, "saved", data, report(data))
    print(report(data))


if __name__ == "__main__":
    main()
