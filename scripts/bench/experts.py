"""What adapters of fused experts add to a training step of a mixture: ours and PEFT's LoRA of target_parameters.

One block of Mixtral, its router and experts, with few and with many experts of which each token visits as many. The
cases run in turn; over the frozen block are the median ratio of neighbouring samples and the bytes kept for backward.

    python scripts/bench.py experts --clock cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tnpeft
from bench import driver, meters, models

TITLE = "What adapters of experts add to a training step"
ABOUT = """A Mixtral block, {active} of its experts active for each token, hidden size {hidden}, expert width {width},
{tokens} tokens, frozen weights, the {implementation} implementation of transformers. "over frozen" is the time of
forward and backward over the frozen block's, less one; "bytes kept" are the storages that autograd saves, "beside the
frozen" less the frozen block's; "to PEFT" divides by what PEFT's LoRA adds. "growth" is the time with most experts
over that with fewest, and "beyond the frozen" that over the frozen block's own growth. Below zero: our backward pass
computes what gates the rows, and gathers them, once more in place of keeping the results."""
OPTIONS = {
    "experts": (8, 64),
    "active": 2,
    "hidden": 512,
    "width": 1024,
    "tokens": 1024,
    "rank": 8,
    "samples": 15,
    "implementation": "grouped_mm",
    **driver.DEVICE,
    **driver.DTYPE,
}
PEFT = "PEFT LoRA"
WHOLE = ["experts_gate_up_proj", "experts_down_proj"]  # gate and up as one matrix, as PEFT has them


def block(options: argparse.Namespace, experts: int) -> nn.Module:
    """Return a frozen Mixtral of one layer with random weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 1, "vocab_size": 8}
    mixture = {"num_local_experts": experts, "num_experts_per_tok": options.active}
    config = MixtralConfig(hidden_size=options.hidden, intermediate_size=options.width, **heads, **mixture)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation(options.implementation)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.02)
    return model.requires_grad_(False).to(options.device, getattr(torch, options.dtype))


def adapters(rank: int) -> dict[str, Any]:
    """Return the configurations by name; PEFT's LoRA first."""
    import peft

    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=parameters)
    ours = partial(models.network, tokens=1024)
    return {
        f"{PEFT} r={rank}": lora,
        f"expert_lora rank={rank}": ours(tnpeft.families.expert_lora(rank=rank), targets=WHOLE),
        f"shared_outer_lora rank={rank}": ours(tnpeft.families.shared_outer_lora(rank=rank), targets=["experts"]),
        "expert_cp rank=64": ours(tnpeft.families.expert_cp(64), targets=["experts"]),
        "expert_tucker ranks=32": ours(tnpeft.families.expert_tucker(32), targets=["experts"]),
    }


def mlp(model: nn.Module) -> nn.Module:
    """Return the block of router and experts."""
    return next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))


def step(module: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of one step."""
    loss: Tensor = (module(x.detach().requires_grad_()) * weights).sum()
    return loss


def cases(options: argparse.Namespace) -> dict[str, driver.Case]:
    """Return every case with few and with many experts, over the frozen block with as many."""
    x = torch.randn(1, options.tokens, options.hidden).to(options.device, getattr(torch, options.dtype))
    weights, found = torch.randn_like(x) / x.numel(), {}
    for experts in options.experts:
        base = block(options, experts)
        built = {"frozen": base} | {name: models.adapted(base, its) for name, its in adapters(options.rank).items()}
        for name, model in built.items():
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                nn.init.normal_(parameter, 0, 0.02)
            module = mlp(model).train()
            forward = partial(step, module, x, weights)
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            saved = meters.saved_bytes(module, forward)
            facts = {"case": name, "experts": experts, "trained": trained, "saved": saved}
            found[f"{name}, {experts}"] = driver.Case(models.backward(forward), facts, f"frozen, {experts}")
    return found


def tables(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return costs beside the frozen block and PEFT's, and growth with the number of experts."""
    by = {(row["case"], row["experts"]): row for row in data["cases"].values()}
    first, last = data["settings"]["experts"][0], data["settings"]["experts"][-1]
    rows = []
    for (name, experts), row in by.items():
        frozen = by["frozen", experts]
        peer = next(its for (case, n), its in by.items() if case.startswith(PEFT) and n == experts)
        mine = {"case": name, "experts": experts, "trained": row["trained"], "ms": row["milliseconds"]}
        if row is not frozen:
            kept, theirs = row["saved"] - frozen["saved"], peer["saved"] - frozen["saved"]
            mine |= {"over frozen": f"{row['overhead']:+.1%}", "to PEFT": row["overhead"] / peer["overhead"]}
            mine |= {"beside the frozen": kept, "to PEFT's": kept / theirs}
        rows.append({**mine, "bytes kept": row["saved"], "to PEFT's, in all": row["saved"] / peer["saved"]})
    growth = []
    for name in dict.fromkeys(name for name, _ in by):
        grown = driver.ratio(by[name, last]["samples"], by[name, first]["samples"])
        own = driver.ratio(by["frozen", last]["samples"], by["frozen", first]["samples"])
        growth.append({"case": name, "growth": grown, "beyond the frozen": grown / own})
    return {"": rows, f"From {first} to {last} experts": growth}
