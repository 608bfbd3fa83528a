"""The path that a call of an adapted layer takes, and the adapted linear as its helpers see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Route(NamedTuple):
    """The path that a call takes, and why not a faster one.

    The paths are ``base`` (no update), ``merged``, ``mixed`` (an adapter for each row), ``shared`` and ``fused`` (one
    operation with the base layer; several layers may share their first product), ``cached`` (inference with results
    kept from call to call) and ``plain``.
    """

    kind: str
    reason: str


FUSED = Route("fused", "")


class AdaptedLinear(Protocol):
    """A `TensorNetworkLinear`: the base linear, the updates of its adapters, and the state that PEFT keeps."""

    training: bool
    merged: bool
    merged_adapters: Sequence[str]
    active_here: Sequence[str]
    base_layer: nn.Module
    updates: Mapping[str, Any]
    dropouts: Mapping[str, Any]
    tnpeft_magnitude: Mapping[str, Tensor]
    input_groups: Any
    owner: Any
    values: Any
    operands: Any
    path: Callable[..., Any]
    _modules: MutableMapping[str, Any]
    _active_adapter: Any
    _disable_adapters: bool
    _compute_dtype: Any
    _arrays: Any
    _cache: Any
