"""The adapted linear as its helpers see it: what they read, and nothing that they import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class AdaptedLinear(Protocol):
    """A `TensorNetworkLinear`: the base linear, the updates of its adapters, and the state that PEFT keeps."""

    training: bool
    merged: bool
    merged_adapters: Sequence[str]
    active_adapters: Sequence[str]
    base_layer: nn.Module
    updates: Mapping[str, Any]
    dropouts: Mapping[str, Any]
    tnpeft_magnitude: Mapping[str, Tensor]
    siblings: Any
    owner: Any
    values: Any
    operands: Any
    fusable: Callable[..., Any]
    _modules: MutableMapping[str, Any]
    _active_adapter: Any
    _disable_adapters: bool
    _compute_dtype: Any
    _arrays: Any
    _cache: Any
