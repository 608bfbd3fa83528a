"""What adapters of experts add to a training step.

A Mixtral block, {{ active }} of its experts active for each token, hidden size {{ hidden }}, expert width
{{ width }}, {{ tokens }} tokens, frozen weights, the {{ implementation }} implementation of transformers. "over
frozen" is the time of forward and backward over the frozen block's, less one; "bytes kept" are the storages
that autograd saves, "beside the frozen" less the frozen block's; "to PEFT" divides by what PEFT's LoRA
adds. "growth" is the time with most experts over that with fewest, and "beyond the frozen" that over the
frozen block's own growth. Below zero: our backward pass computes what gates the rows, and gathers them,
once more in place of keeping the results.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from bench import driver, meters, models

SIZES = {"experts": (8, 64), "active": 2, "hidden": 512, "width": 1024, "tokens": 1024, "rank": 8}
OPTIONS = models.options("device dtype", **SIZES, samples=15, implementation="grouped_mm")
PUBLISHED = {"experts": "--clock cpu"}
PEFT = "PEFT LoRA"


def block(options: driver.Options, experts: int) -> nn.Module:
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


def cases(options: driver.Options) -> driver.Cases:
    """Yield every case with few and with many experts, over the frozen block with as many."""
    x = torch.randn(1, options.tokens, options.hidden).to(options.device, getattr(torch, options.dtype))
    forward_of = models.stepper(x, lambda module, its: module(its))
    rank, whole = options.rank, ("experts_gate_up_proj", "experts_down_proj")  # gate and up as one matrix, as PEFT's
    ours = {f"expert_lora rank={rank}": whole, f"shared_outer_lora rank={rank}": ("experts",)}
    ours |= {"expert_cp rank=64": ("experts",), "expert_tucker ranks=32": ("experts",)}
    targets = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    configs: dict[str, Any] = {f"{PEFT} r={rank}": peft.LoraConfig(r=rank, lora_alpha=rank, **targets)}
    configs |= {title: models.config(title, 1024, names) for title, names in ours.items()}
    for experts in options.experts:
        base = block(options, experts)
        built = {"frozen": base} | {name: models.adapted(base, its) for name, its in configs.items()}
        for name, model in built.items():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                nn.init.normal_(parameter, 0, 0.02)
            module = next(its for where, its in model.named_modules() if where.endswith("layers.0.mlp")).train()
            forward = forward_of(module)
            facts = {"trained": models.trained(module), "saved": meters.saved_bytes(module, forward)}
            facts |= {"case": name, "experts": experts}
            yield f"{name}, {experts}", driver.Case(models.backward(forward), facts, f"frozen, {experts}")


def tables(data: Any) -> dict[str, driver.Rows]:
    """Return costs beside the frozen block and PEFT's, and growth with the number of experts."""
    by = {(row["case"], row["experts"]): row for row in data["cases"].values()}
    costs, names = [], dict.fromkeys(name for name, _ in by)
    for (name, experts), row in by.items():
        frozen = by["frozen", experts]
        (peer,) = (by[its, experts] for its in names if its.startswith(PEFT))
        mine = {"case": name, "experts": experts, "trained": row["trained"], "ms": row["milliseconds"]}
        mine |= {"bytes kept": row["saved"], "to PEFT's, in all": row["saved"] / peer["saved"]}
        if row is not frozen:
            kept, theirs = row["saved"] - frozen["saved"], peer["saved"] - frozen["saved"]
            mine |= {"over frozen": f"{row['overhead']:+.1%}", "to PEFT": row["overhead"] / peer["overhead"]}
            mine |= {"beside the frozen": kept, "to PEFT's": kept / theirs}
        costs.append(mine)
    first, last = data["settings"]["experts"][0], data["settings"]["experts"][-1]
    growth = {name: driver.ratio(by[name, last]["samples"], by[name, first]["samples"]) for name in names}
    own = growth["frozen"]
    grown = [{"case": name, "growth": its, "beyond the frozen": its / own} for name, its in growth.items()]
    return {"": costs, f"From {first} to {last} experts": grown}
