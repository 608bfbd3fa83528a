"""Token-by-token generation: the frozen model, adapters beside it, and adapters merged into it, side by side.

Every case decodes the same number of tokens greedily with a key-value cache, one sequence in turn. Writes
``decode.json`` and ``decode.md``.

    python scripts/bench_decode.py --layers 4 --clock cpu
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import peft
import torch
from _bench_models import SHAPES, TARGETS, opt_config
from torch import Tensor, nn

import tnpeft


def backbone(shape: str, layers: int | None, device: str) -> nn.Module:
    """An OPT causal language model of the shape, with random weights."""
    from transformers import OPTForCausalLM

    torch.manual_seed(0)
    return OPTForCausalLM(opt_config(shape, layers, eos_token_id=None)).to(device).eval().requires_grad_(False)


def configs() -> dict[str, Any]:
    """The adapters, PEFT's LoRA first."""
    f = tnpeft.families
    ours = {
        "lora rank=8": f.lora(rank=8),
        "cp rank=8": f.cp(rank=8),
        "lorta rank=8": f.lorta(rank=8),
        "tenslora qkv_depth ranks=8": f.tenslora(ranks=8),
        "tensor_train": f.tensor_train(),
        "vera rank=256": f.vera(rank=256),
        "lokr rank=8": f.lokr(rank=8),
    }
    targets = list(TARGETS)
    return {
        "PEFT LoRA r=8": peft.LoraConfig(r=8, target_modules=targets),
        **{name: tnpeft.TensorNetworkConfig(network=one, target_modules=targets) for name, one in ours.items()},
    }


@torch.no_grad()
def decode(model: Callable[..., Any], prompt: Tensor, tokens: int) -> Tensor:
    """Greedy tokens after the prompt, one at a time."""
    found = model(input_ids=prompt, use_cache=True)
    out = []
    for _ in range(tokens):
        token = found.logits[:, -1:].argmax(-1)
        out.append(token)
        found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
    return torch.cat(out, dim=1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases in turn; merged ones must give the tokens of unmerged ones."""
    base = backbone(options.shape, options.layers, options.device)
    prompt = torch.arange(3, 3 + options.prompt, device=options.device)[None]
    runs = {"floor": partial(decode, base, prompt, options.tokens)}
    few = min(4, options.tokens)
    known = configs()
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        sys.exit(f"there is no case {unknown[0]!r}; there are {', '.join(known)}")
    for name, config in known.items():
        if options.only and name not in options.only:
            continue
        shared = {id(p): p for p in base.parameters()}
        model = peft.get_peft_model(copy.deepcopy(base, shared), config).eval()
        runs[name] = partial(decode, model, prompt, options.tokens)
        merged = peft.get_peft_model(copy.deepcopy(base), config).eval().merge_and_unload()
        assert torch.equal(decode(merged, prompt, few), runs[name]()[:, :few])
        runs[f"{name}, merged"] = partial(decode, merged, prompt, options.tokens)
    times = _bench.interleaved(runs, options.samples, options.clock, options.device)
    rows = {
        name: {
            "milliseconds per token": 1e3 * median(found) / options.tokens,
            "overhead": _bench.ratio(found, times["floor"]) - 1,
            "samples": found,
        }
        for name, found in times.items()
    }
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "only")}
    settings["layers"] = base.config.num_hidden_layers
    return {"settings": settings, "machine": _bench.machine(), "cases": rows}


def report(data: Mapping[str, Any]) -> str:
    """The measurement as a page."""
    s, m = data["settings"], data["machine"]
    rows = []
    for name, row in data["cases"].items():
        if name.endswith(", merged"):
            continue
        merged = data["cases"].get(f"{name}, merged")
        rows.append(
            {
                "case": name,
                "ms per token": row["milliseconds per token"],
                "over the frozen model": "" if name == "floor" else f"{row['overhead']:+.1%}",
                "merged, over the frozen model": f"{merged['overhead']:+.1%}" if merged else "",
            }
        )
    return (
        "# Token-by-token generation\n\n"
        f"{s['shape']} with {s['layers']} layers, {', '.join(TARGETS)}, float32, {s['device']}, one sequence, "
        f"{s['prompt']} tokens of prompt, {s['tokens']} decoded one by one, {m['threads']} threads, {s['samples']} "
        f"interleaved samples by the {s['clock']} clock, load {m['load']} on {m['cores']} cores "
        f"({m['gpu'] or m['processor']}; torch {m['torch']}, peft {m['peft']}). Medians of the ratios to the frozen "
        "model's time in the same turn.\n\n" + _bench.markdown(rows)
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--layers", type=int, help="layers of the model, if not the shape's own")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--clock", choices=_bench.CLOCKS, default="wall")
    parser.add_argument("--only", nargs="+", help="adapters to run beside the frozen model")
    parser.add_argument("--out", type=Path, default=_bench.TABLES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = measure(options)
    _bench.write(options.out, "decode", data, report(data))
    print(report(data))


if __name__ == "__main__":
    main()
