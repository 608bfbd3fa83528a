"""The kinds of layers whose weights are adapted: what each is wrapped in, and what it refuses."""

from __future__ import annotations

from typing import Any

from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.sites.convolution import CONVOLUTIONS, TensorNetworkConvolution, check_convolution
from tnpeft.adapters.sites.embedding import TensorNetworkEmbedding, check_embedding
from tnpeft.adapters.sites.parameter import check_parameter
from tnpeft.adapters.sites.raw import RawWeight


def kind(module: nn.Module, quantised: dict[str, Any]) -> type[DenseLinear] | None:
    """The class that adapts a layer, None if there is none.

    >>> kind(nn.Conv2d(3, 4, 2), {}), kind(nn.LayerNorm(3), {})
    (<class 'tnpeft.adapters.sites.convolution.TensorNetworkConvolution'>, None)
    """
    backend = resolve_quantization_backend(module, **quantised)
    if isinstance(module, nn.Linear | Conv1D) or getattr(backend, "layer_type", "") == "linear":
        return TensorNetworkLinear
    if backend is not None:
        return None
    if isinstance(module, nn.Embedding):
        return TensorNetworkEmbedding
    return TensorNetworkConvolution if isinstance(module, CONVOLUTIONS) else None


def wrapped(module: nn.Module, bank: FactorBank, quantised: dict[str, Any]) -> DenseLinear:
    """The module as an adapted layer of its kind, without adapters."""
    found = kind(module, quantised)
    assert found is not None  # it was checked when it was targeted
    return found(module, bank, **quantised)


def check_kind(name: str, module: Any, config: Any) -> None:
    """Raise if the layer, a base layer of a kind, is one that an adapter of the configuration cannot adapt exactly.

    Raises:
        NetworkError: it is.
    """
    if isinstance(module, RawWeight):
        check_parameter(name, config)
    elif isinstance(module, nn.Embedding):
        check_embedding(name, module, config.dora)
    elif isinstance(module, CONVOLUTIONS):
        check_convolution(name, module)
