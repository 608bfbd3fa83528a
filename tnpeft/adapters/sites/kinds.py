"""The kinds of layers whose weights are adapted: what each is wrapped in, and what it refuses."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from tnpeft.adapters.experts.listed import ListedWeight
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.sites.convolution import CONVOLUTIONS, TensorNetworkConvolution, check_convolution
from tnpeft.adapters.sites.embedding import TensorNetworkEmbedding, check_embedding
from tnpeft.adapters.sites.parameter import check_parameter
from tnpeft.adapters.sites.raw import RawWeight
from tnpeft.adapters.targets import features
from tnpeft.networks import NetworkError

_NEAR = 0.02  # of the length of an output: rounding in half precision


def kind(module: nn.Module, quantised: dict[str, Any]) -> type[DenseLinear] | None:
    """The class that adapts a layer, None if there is none."""
    backend = resolve_quantization_backend(module, **quantised)
    if isinstance(module, nn.Linear | Conv1D) or getattr(backend, "layer_type", "") == "linear":
        return TensorNetworkLinear
    if backend is not None:
        return None
    if isinstance(module, nn.Embedding):
        return TensorNetworkEmbedding
    return TensorNetworkConvolution if isinstance(module, CONVOLUTIONS) else None


def check_kind(name: str, module: Any, config: Any, quantised: dict[str, Any]) -> None:
    """Raise if the layer, a base layer of a kind, is one that an adapter of the configuration cannot adapt."""
    weight = getattr(module, "weight", None)
    if is_lazy(weight) or 0 in features(module):
        raise NetworkError(
            f"{name} has no weight yet, or an empty one", remedy="call the model once, or leave it out"
        )
    if isinstance(module, RawWeight):
        check_parameter(name, config)
    elif isinstance(module, nn.Embedding):
        check_embedding(name, module, config.dora)
    elif isinstance(module, CONVOLUTIONS):
        check_convolution(name, module)
    for linear in module.linears if isinstance(module, ListedWeight) else (module,):
        if isinstance(linear, nn.Linear | Conv1D) and resolve_quantization_backend(linear, **quantised) is None:
            _check_linear(name, linear)


@torch.no_grad()
def _check_linear(name: str, module: Any) -> None:
    """Raise if a linear whose class has a forward of its own computes something else than a linear, on one row."""
    forward, (out, inp), weight = type(module).forward, features(module), module.weight
    read = weight.is_floating_point() and not weight.is_meta and weight.numel() == out * inp  # whole, and here
    if forward in (nn.Linear.forward, Conv1D.forward) or not read:
        return
    x = torch.linspace(-1, 1, inp).to(weight)[None]
    wanted = x @ (weight if isinstance(module, Conv1D) else weight.T) + (0 if module.bias is None else module.bias)
    try:
        same = bool((forward(module, x) - wanted).norm() <= _NEAR * wanted.norm())
    except (TypeError, ValueError, RuntimeError, AttributeError):
        same = False
    if not same:
        raise NetworkError(
            f"{name} is a {type(module).__name__}, which does more than a linear",
            remedy="leave it out of target_modules, or name it in exclude_modules",
        )
