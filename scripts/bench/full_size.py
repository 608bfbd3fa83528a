"""OPT-1.3B's architecture at full size, random weights: attach the CP paper's setting, train, save, reload, merge.

Numbers of components and targets are those of arXiv 2606.00428 (c = 1 and 21 on q_proj and v_proj). In bfloat16 a
merged weight is rounded once and small updates are lost in it, so the merged model is compared in float32 as well.
Takes 6 GB of memory.

    python scripts/bench.py full_size
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import tnpeft
from bench import driver, models

TITLE = "OPT-1.3B's architecture at full size, random weights"
ABOUT = """CP on q_proj and v_proj, 2 x 16 tokens, {threads} threads; two AdamW steps, the adapter saved, loaded onto
the bare model and merged."""
OPTIONS = {"threads": 2}
EXACT = True
TARGETS = ["q_proj", "v_proj"]
CASES = (("bfloat16", 1), ("bfloat16", 21), ("float32", 21))


def check(dtype: str, components: int, tokens: Tensor) -> dict[str, Any]:
    """Return one case, from a new model to its merged weights."""
    started = time.perf_counter()
    torch.manual_seed(0)
    its = {"vocab_size": 50272, "dropout": 0.1, "dtype": dtype}
    base = models.backbone("opt-1.3b", causal=True, **its).to(getattr(torch, dtype)).eval()
    created = time.perf_counter()
    plain = logits(base, tokens)
    attaching = time.perf_counter()
    f = tnpeft.families.cp(rank=components, out=(32, 64), inp=(32, 64))
    config = tnpeft.TensorNetworkConfig(network=f, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    attached = time.perf_counter()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-1))
    losses = []
    for _ in range(2):  # the second loss is that of the first step's update
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    stepped = time.perf_counter()
    adapted = logits(model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        again = peft.PeftModel.from_pretrained(model.unload(), folder).eval()
    reloaded = logits(again, tokens)
    merged = logits(again.merge_and_unload(), tokens)
    change = (adapted - plain).abs().max().item()
    return {
        "dtype": dtype,
        "components": components,
        "trainable": trainable,
        "create s": created - started,
        "attach s": attached - attaching,
        "step s": (stepped - attached) / 2,
        "losses": [float(loss.detach()) for loss in losses],
        "file bytes": size,
        "reloaded equals trained": torch.equal(reloaded, adapted),
        "update's largest change of a logit": change,
        "merged, largest error": (merged - adapted).abs().max().item(),
        "merged, error / change": (merged - adapted).abs().max().item() / change,
    }


def logits(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits of the model as it is used, in float32."""
    with torch.inference_mode():
        result: Tensor = model.eval()(input_ids=tokens).logits.float()
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return every case."""
    tokens, rows = torch.arange(4, 36).reshape(2, 16) * 7, []
    for case in CASES:
        rows.append(check(*case, tokens))
        driver.progress(rows[-1])
    return {"cases": rows}


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each case."""
    return [
        {
            **row,
            "losses": ", ".join(f"{loss:.4f}" for loss in row["losses"]),
            "reloaded equals trained": "to the bit" if row["reloaded equals trained"] else "**no**",
        }
        for row in data["cases"]
    ]
