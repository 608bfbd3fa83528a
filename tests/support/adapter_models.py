"""Tiny models with random weights, one per architecture, and networks to try on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import tnpeft

LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
SHARED = "B[proj out a] G[layer a b] A[proj b inp] -> layer proj out inp"  # every factor lies in the bank
MIXED = "U[out a] G[layer proj a b] V[b inp] -> layer proj out inp"
CP = (
    "w[layer proj r] A[layer proj o1 r] B[layer proj o2 r] C[layer proj i1 r] D[layer proj i2 r] "
    "-> layer proj (o1 o2) (i1 i2)"
)
VERA = "b[layer proj out] ~B[out r] d[layer proj r] ~A[r inp] -> layer proj out inp"
NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {"network": LORA, "ranks": {"r": 3}},
    "shared": {"network": SHARED, "ranks": {"a": 3, "b": 2}},
    "mixed": {"network": MIXED, "ranks": {"a": 3, "b": 2}, "scale": 0.5},
    "cp": {"network": CP, "ranks": {"r": 5}, "unit_norm": ["A", "B", "C", "D"]},
    "vera": {"network": VERA, "ranks": {"r": 4}},
}
_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


def library(name: str) -> Any:
    """A library; a test is skipped where it is missing, and fails where ``TNPEFT_CI=1`` promises that it is there."""
    if find_spec(name) is None:
        (pytest.fail if os.environ.get("TNPEFT_CI") == "1" else pytest.skip)(f"pip install --no-deps {name}")
    return import_module(name)


def opt(layers: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = OPTConfig(
        **{**_SMALL, "num_hidden_layers": layers},
        vocab_size=64, ffn_dim=64, max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0, **options,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**_SMALL, num_key_value_heads=2, vocab_size=64, intermediate_size=48)
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(**_SMALL, vocab_size=64, intermediate_size=64, max_position_embeddings=32)
    return BertForSequenceClassification(config).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(**_SMALL, intermediate_size=64, image_size=16, patch_size=8)
    return ViTForImageClassification(config).eval()


class Blocks(nn.Module):
    """Two layers of linears by name, and what each makes of an input."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, int]) -> None:
        super().__init__()
        self.run = run
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x)
        return x


MODELS = {"opt": opt, "llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit}
TARGETS = {
    "opt": ["q_proj", "v_proj", "fc1"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "value", "intermediate.dense"],
    "vit": ["q_proj", "v_proj", "fc2"],
}


def inputs(name: str = "opt") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(2, 60, (2, 7), generator=generator)}


def logits(model: nn.Module, name: str = "opt", **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(name), **more).logits


def config(key: str = "lora", **changes: Any) -> tnpeft.TensorNetworkConfig:
    return tnpeft.TensorNetworkConfig(**{**NETWORKS[key], "target_modules": ["q_proj", "v_proj"], **changes})


def adapted(key: str = "lora", model: nn.Module | None = None, **changes: Any) -> peft.PeftModel:
    return peft.get_peft_model(opt() if model is None else model, config(key, **changes))


def row_by_row(model: Any, names: Sequence[str], call: Callable[[int], Tensor]) -> Tensor:
    """What is called for each row by itself, with its adapter or with none."""
    found = []
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else nullcontext(), torch.no_grad():
            found.append(call(row))
    return torch.cat(found)


def shake(model: nn.Module, seed: int = 0, adapter: str = "default") -> None:
    """Give every trainable factor random values, so that an update is there to be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".tnpeft_factors.{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
