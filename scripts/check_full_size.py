"""OPT-1.3B's architecture at full size, random weights: attach the CP paper's setting, train, save, reload, merge.

Numbers of components and targets are those of arXiv 2606.00428 (c = 1 and 21 on q_proj and v_proj). In bfloat16 a
merged weight is rounded once and small updates are lost in it, so the merged model is compared in float32 as well.
Writes ``full_size.json`` and ``full_size.md``; takes 6 GB of memory.

    python scripts/check_full_size.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from bench import driver
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

import tnpeft
from tnpeft.studies.files import write_json, write_text

TARGETS = ["q_proj", "v_proj"]
SHAPE = {
    "hidden_size": 2048,
    "ffn_dim": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "word_embed_proj_dim": 2048,
}
CASES = (("bfloat16", 1), ("bfloat16", 21), ("float32", 21))


def check(dtype: str, components: int, tokens: Tensor) -> dict[str, Any]:
    """One case from a new model to its merged weights."""
    started = time.perf_counter()
    torch.manual_seed(0)
    base = OPTForCausalLM(OPTConfig(**SHAPE, dtype=dtype)).to(getattr(torch, dtype)).eval()
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
    """Of the model as it is used, in float32."""
    with torch.inference_mode():
        result: Tensor = model.eval()(input_ids=tokens).logits.float()
    return result


def rows(tokens: Tensor) -> Iterator[dict[str, Any]]:
    """Every case in turn, said as it comes."""
    for dtype, components in CASES:
        row = check(dtype, components, tokens)
        print(row, file=sys.stderr, flush=True)
        yield row


def main() -> None:
    """Check and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=driver.TABLES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = list(rows(torch.arange(4, 36).reshape(2, 16) * 7))
    data = {"cases": found, "machine": driver.machine(options.threads)}
    text = "# OPT-1.3B's architecture at full size, random weights\n\n" + " ".join(
        f"""CP on {" and ".join(TARGETS)}, 2 x 16 tokens, {options.threads} threads of {data["machine"]["processor"]};
        two AdamW steps, the adapter saved, loaded onto the bare model and merged.""".split()
    )
    shown = [
        {
            **row,
            "losses": ", ".join(f"{loss:.4f}" for loss in row["losses"]),
            "reloaded equals trained": "to the bit" if row["reloaded equals trained"] else "**no**",
        }
        for row in found
    ]
    write_json(options.out / "full_size.json", data)
    write_text(options.out / "full_size.md", f"{text}\n\n{driver.markdown(shown)}")
    print(driver.markdown(shown))


if __name__ == "__main__":
    main()
