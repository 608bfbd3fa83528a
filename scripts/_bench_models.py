"""What the step benchmark runs on: frozen OPT backbones, and linears that rebuild their update densely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import tnpeft
from tnpeft.networks import Factorization

SHAPES: Mapping[str, tuple[int, int, int]] = {  # width, heads, layers
    "tiny": (256, 4, 4),
    "opt-125m": (768, 12, 12),
    "opt-350m": (1024, 16, 24),
    "opt-1.3b": (2048, 32, 24),
}
TARGETS = ("q_proj", "k_proj", "v_proj")


class Rebuilt(nn.Module):
    """An honest reference: a linear whose update is formed densely at each call, its site's matrix or its tensor.

    ``whole`` rebuilds all that the site's factors share: every stack index that some factor lacks stays open.
    """

    def __init__(
        self, base: nn.Module, f: Factorization, arrays: nn.ParameterDict, at: Mapping[str, int], whole: bool
    ):
        super().__init__()
        net = f.network
        shared = [i for i in net.stack if any(i not in factor.indices for factor in net.factors)] if whole else []
        self.base, self.arrays, self.scale = base, arrays, float(f.scale)
        self.at = {index: k for index, k in at.items() if index in net.stack and index not in shared}
        self.place = tuple(at[index] for index in net.stack if index in shared)
        self.order = {factor.name: factor.indices for factor in net.factors}
        self.net = net.select(*self.at)

    def forward(self, x: Tensor) -> Tensor:
        """The base linear's output plus the update."""
        own = {
            name: array[tuple(self.at.get(index, slice(None)) for index in self.order[name])]
            for name, array in self.arrays.items()
        }
        result: Tensor = self.base(x) + linear(x, tnpeft.dense(self.net, own)[self.place]) * self.scale
        return result


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
        """The last layer's sum."""
        x = inputs_embeds
        for layer in self.decoder.layers:
            linears = layer["self_attn"]
            x = linears["q_proj"](x) + linears["k_proj"](x) + linears["v_proj"](x)
        return (x,)


def opt_config(shape: str, layers: int | None, **fields: Any) -> Any:
    """An OPT configuration of the shape, with a small vocabulary."""
    from transformers import OPTConfig

    width, heads, depth = SHAPES[shape]
    return OPTConfig(
        hidden_size=width,
        ffn_dim=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=layers or depth,
        word_embed_proj_dim=width,
        vocab_size=512,
        **fields,
    )


def backbone(shape: str, layers: int | None, device: str, dtype: torch.dtype) -> nn.Module:
    """A frozen OPT decoder of the shape, with random weights."""
    from transformers import OPTModel

    torch.manual_seed(0)
    return OPTModel(opt_config(shape, layers, dropout=0.0)).to(device, dtype).requires_grad_(False)
