"""What the benchmarks run on: frozen OPT backbones with random weights, linears alone, adapters by their titles."""

from __future__ import annotations

import copy
import re
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import tnpeft
from tnpeft.networks import Factorization
from tnpeft.studies.methods import peft_config

SHAPES: Mapping[str, tuple[int, int, int]] = {  # width, heads, layers
    "tiny": (256, 4, 4),
    "opt-125m": (768, 12, 12),
    "opt-350m": (1024, 16, 24),
    "opt-1.3b": (2048, 32, 24),
}
TARGETS = ("q_proj", "k_proj", "v_proj")
CONSTRUCTIONS = ("att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth")
PEFT = tuple(
    f"PEFT {title}" for title in ("LoRA r=8", "LoRA r=64", "VeRA r=256", "LoKr r=8", "LoHa r=8", "RandLoRA r=32")
)
FAMILIES = [
    *(f"{name} rank={rank}" for name in ("lora", "cp", "lorta") for rank in (8, 64)),
    *(f"tenslora {name} ranks=8" for name in CONSTRUCTIONS),
    *("tenslora qkv_depth ranks=(64, 64, 3, 2)", "tera ranks=8", "tera ranks=64"),
    *(f"{name} rank=8" for name in ("lotr", "fact_tt", "fact_tk")),
    *(f"{name} ranks=8" for name in ("metatt_4d", "metatt_5d")),
    *("loretta", "tt_lora", "tucker", "tensor_train", "tensor_ring", "hierarchical_tucker", "block_term"),
    *("refta rank=8", "lora_xs rank=8", "vera rank=256", "lokr rank=8", "krona", "loha rank=8", "randlora rank=32"),
    *("gralora rank=8", "miss rank=8", "monarch", "hira rank=8", "ia3"),
]
METHODS = (*PEFT, *FAMILIES)
OPTIONS: Mapping[str, Any] = {  # which several benchmarks have
    "shape": {"choices": SHAPES, "default": "opt-125m"},
    "layers": {"type": int, "help": "layers of the model, if not the shape's own"},
    "dtype": {"choices": ("float32", "bfloat16", "float16"), "default": "float32"},
    "device": {"choices": ("cpu", "cuda"), "default": "cpu"},
    "narrow": {"action": "store_true", "help": "factors in the dtype of the model, not in float32"},
    "compile": False,
    "only": {"nargs": "+", "help": "cases to run, with the floor"},
}


def options(names: str, **own: Any) -> dict[str, Any]:
    """Return a benchmark's options: some of those that several have, by their names, and its own."""
    return {name: OPTIONS[name] for name in names.split()} | own


# ---- models


def opt(width: int, heads: int, layers: int, *, causal: bool = False, **fields: Any) -> Any:
    """Return a frozen OPT decoder, or language model, with random weights and a small vocabulary."""
    from transformers import OPTConfig, OPTForCausalLM, OPTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, "num_attention_heads": heads}
    sizes |= {"num_hidden_layers": layers, "vocab_size": 512, "dropout": 0.0}
    return (OPTForCausalLM if causal else OPTModel)(OPTConfig(**{**sizes, **fields})).requires_grad_(False)


def placed(its: Any, shape: str = "", **fields: Any) -> Any:
    """Return a frozen OPT on the device and in the dtype that options name: of their shape, or ``"tiny:4"``."""
    name, _, layers = (shape or f"{its.shape}:{its.layers}").partition(":")
    width, heads, depth = SHAPES[name]
    where = getattr(its, "device", "cpu"), getattr(torch, getattr(its, "dtype", "float32"))
    return opt(width, heads, int(layers or depth), **fields).to(*where)


def sharing(base: nn.Module) -> nn.Module:
    """Return a copy of a frozen model that shares its parameters."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


class Bare(nn.Module):
    """Nothing of an OPT decoder but the q, k and v linears of its layers, under their names."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.config, self.decoder = whole.config, nn.Module()
        self.decoder.layers = nn.ModuleList()
        for layer in whole.decoder.layers:
            attention = nn.ModuleDict({name: getattr(layer.self_attn, name) for name in TARGETS})
            self.decoder.layers.append(nn.ModuleDict({"self_attn": attention}))

    def forward(self, inputs_embeds: Tensor, use_cache: bool = False) -> tuple[Tensor]:
        """Return the last layer's sum."""
        x = inputs_embeds
        for layer in self.decoder.layers:
            linears = layer["self_attn"]
            x = linears["q_proj"](x) + linears["k_proj"](x) + linears["v_proj"](x)
        return (x,)


# ---- adapters


def family(title: str) -> Factorization:
    """Return a family with its options as the tables call it, ``"cp rank=8"``; the sides of TeRA are in one piece."""
    name, *words = re.split(" (?=[a-z])", title)
    given = [word.partition("=") for word in words]
    fields = {key: literal_eval(value) for key, equals, value in given if equals}
    fields |= {"out": (None,), "inp": (None,)} if name == "tera" else {}
    return tnpeft.families.get(name)(*(word for word, equals, _ in given if not equals), **fields)


def config(title: str, tokens: int | None = None, targets: Sequence[str] = TARGETS, **fields: Any) -> Any:
    """Return the configuration of one of PEFT's own methods, or of ours, by its title."""
    fields |= {"target_modules": list(targets)}
    if title in PEFT:
        _, kind, rank = title.split()
        return peft_config({"peft": kind.lower(), "args": {"r": int(rank.removeprefix("r="))}}, **fields)
    fields |= {"tokens": tokens} if tokens else {}
    return tnpeft.TensorNetworkConfig(network=family(title), **fields)


def adapted(base: nn.Module, config: Any, narrow: bool = False) -> Any:
    """Return a copy of a frozen model, whose parameters it shares, with adapters; ``narrow``: in its dtype.

    Else the factors of a model in half precision are in float32, as PEFT has them by default.
    """
    import peft

    return peft.get_peft_model(sharing(base), config, autocast_adapter_dtype=not narrow)


def trained(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def rebuilt(base: nn.Module, title: str, whole: bool) -> nn.Module:
    """Return an honest reference: a copy whose linears form their update densely at each call.

    A site forms its own matrix; or, ``whole``, all that its factors share: every stack index that some factor lacks.
    """
    f, model = family(title), sharing(base)
    net, stacked = f.network, tnpeft.factors(adapted(base, config(title)))
    model.arrays = nn.ParameterDict({name: nn.Parameter(value) for name, value in stacked.items()})
    shared = [i for i in net.stack if any(i not in factor.indices for factor in net.factors)] if whole else []

    def add(at: Mapping[str, int], module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        fixed = {index: k for index, k in at.items() if index in net.stack and index not in shared}
        own = {
            factor.name: model.arrays[factor.name][tuple(fixed.get(index, slice(None)) for index in factor.indices)]
            for factor in net.factors
        }
        place = tuple(at[index] for index in net.stack if index in shared)
        return output + linear(*inputs, tnpeft.dense(net.select(*fixed), own)[place]) * float(f.scale)

    for number, layer in enumerate(model.decoder.layers):
        for place, name in enumerate(TARGETS):
            getattr(layer.self_attn, name).register_forward_hook(partial(add, {"layer": number, "proj": place}))
    return model


# ---- steps


def embeddings(base: Any, rows: int, length: int) -> Tensor:
    """Return random embeddings for a model, on its device and in its dtype."""
    return torch.randn(rows, length, base.config.hidden_size).to(next(base.parameters()))


def stepper(
    x: Tensor, call: Callable[[Any, Tensor], Tensor] | None = None, grad: bool = True
) -> Callable[[Any], Callable[[], Tensor]]:
    """Return what makes of a model the forward of a step, on embeddings that all models share."""
    weights = torch.randn_like(x) / x.numel()
    call = call or (lambda model, its: model(inputs_embeds=its, use_cache=False)[0])
    return lambda model: lambda: (call(model, x.detach().requires_grad_(grad)) * weights).sum()


def backward(forward: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a function that runs forward and backward."""
    return lambda: forward().backward()
