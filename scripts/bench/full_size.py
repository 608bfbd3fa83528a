"""OPT-1.3B's architecture at full size, random weights.

CP on q_proj and v_proj, 2 x 16 tokens, {{ threads }} threads; two AdamW steps, the adapter saved, loaded onto the
bare model and merged.
"""

from __future__ import annotations

import itertools
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import tnpeft
from bench import driver, models

# Components and targets of arXiv 2606.00428. In bfloat16 a merged weight is rounded once and small updates are lost
# in it, so the merged model is compared in float32 as well. Takes 6 GB of memory.
OPTIONS = {"threads": 2}
PUBLISHED = {"full_size": ""}
EXACT = True
CASES = (("bfloat16", 1), ("bfloat16", 21), ("float32", 21))


def losses(model: Any, tokens: Tensor) -> list[float]:
    """Return the losses of two steps; the second is that of the first step's update."""
    optimizer, found = torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-1)), []
    for _ in range(2):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@torch.inference_mode()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits of the model as it is used, in float32."""
    return model.eval()(input_ids=tokens).logits.float()  # type: ignore[no-any-return]


def check(dtype: str, components: int) -> dict[str, Any]:
    """Return one case, from a new model to its merged weights."""
    tokens, its = torch.arange(4, 36).reshape(2, 16) * 7, Namespace(dtype=dtype)
    fields = {"vocab_size": 50272, "dropout": 0.1, "dtype": dtype}
    base, creating = driver.once(partial(models.placed, its, "opt-1.3b", causal=True, **fields), "wall")
    plain = logits(base, tokens)
    title = f"cp rank={components} out=(32, 64) inp=(32, 64)"
    config = models.config(title, 32, ("q_proj", "v_proj"), task_type="CAUSAL_LM")
    model, attaching = driver.once(partial(peft.get_peft_model, base, config), "wall")
    trainable = models.trained(model)
    found, training = driver.once(partial(losses, model, tokens), "wall")
    adapted = logits(model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        again = peft.PeftModel.from_pretrained(model.unload(), folder).eval()
    reloaded = logits(again, tokens)
    error = (logits(again.merge_and_unload(), tokens) - adapted).abs().max().item()
    change = (adapted - plain).abs().max().item()
    return {
        "dtype": dtype,
        "components": components,
        "trainable": trainable,
        "create s": creating,
        "attach s": attaching,
        "step s": training / 2,
        "losses": found,
        "file bytes": size,
        "reloaded equals trained": torch.equal(reloaded, adapted),
        "update's largest change of a logit": change,
        "merged, largest error": error,
        "merged, error / change": error / change,
    }


def measure(options: driver.Options) -> driver.Rows:
    """Return every case."""
    return itertools.starmap(check, CASES)


def tables(data: Any) -> driver.Rows:
    """Yield a row for each case."""
    for row in data["cases"]:
        its = {"losses": ", ".join(f"{loss:.4f}" for loss in row["losses"])}
        yield row | its | {"reloaded equals trained": "to the bit" if row["reloaded equals trained"] else "**no**"}
