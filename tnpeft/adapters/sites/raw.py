"""Which Parameters a module reads itself, instead of being a layer that is called for its weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tnpeft.adapters.experts.fused import fused_weights
from tnpeft.adapters.layer.bank import FactorStore, TensorNetworkLayer
from tnpeft.networks import NetworkError

_CALLED = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # adapted as layers
_HELD = (nn.ParameterList, nn.ParameterDict, nn.RNNBase, torch.jit.ScriptModule)  # read otherwise than by name
_PROJECTIONS = 3  # query, key and value, which torch's attention holds in one Parameter


@dataclass(frozen=True)
class RawWeight:
    """A Parameter ``[out, inp]`` of a module that is not called for it, and what stands side by side in its rows.

    ``[inp, out]`` if it is ``transposed``; with ``experts`` one such matrix for each of them, whose axes come after.
    """

    module: nn.Module
    name: str
    child: str
    out_features: int
    in_features: int
    slices: int = 1
    heads: int = 0
    experts: int = 0
    transposed: bool = False

    def with_axes(self, path: str, axes: str | None) -> RawWeight:
        """The same with its axes as they are declared; of a matrix they are ``out inp`` unless that is done."""
        choices = [f"expert {pair}" if self.experts else pair for pair in ("out inp", "inp out")]
        own = [getattr(self.module, f"{side}_features", None) for side in ("out", "in")]
        shape = [self.out_features, self.in_features]
        if axes is None and self.experts and own[0] != own[1] and own in (shape, shape[::-1]):
            axes = choices[own != shape]
        if axes is None and self.experts:
            raise NetworkError(
                f"{path} holds {self.experts} matrices of {self.out_features} x {self.in_features}, and nothing says "
                "which axis is their input",
                remedy=f'declare it: axes={{"{self.name}": "{choices[0]}"}}, or "{choices[1]}"',
            )
        axes = axes or choices[0]
        if axes not in choices[: 1 if self.slices > 1 else 2]:
            raise NetworkError(f"the axes of {path} are {axes!r}", remedy=f"use one of {', '.join(choices)}")
        layer, turned = self.module._modules.get(self.child), axes == choices[1]
        if isinstance(layer, TensorNetworkLayer) and layer.transposed != turned:
            raise NetworkError(
                f"another adapter declares other axes of {path} than {axes}", remedy="declare the same axes"
            )
        if not turned:
            return self
        return replace(self, out_features=self.in_features, in_features=self.out_features, transposed=True)


def raw_weights(module: nn.Module) -> tuple[RawWeight, ...]:
    """The Parameters of two or three axes that a module reads itself, adapted or not; none of a layer that is called.

    Of three axes the first counts experts. Which of the others are rows, :meth:`RawWeight.with_axes` says.
    """
    if isinstance(module, (*_CALLED, *_HELD, TensorNetworkLayer, FactorStore)) or not module._parameters:
        return ()
    found = []
    known = {weight.name for weight in fused_weights(module)}  # which experts read in grouped products
    for name, value in module._parameters.items():
        if value is None or not value.is_floating_point() or name in known:
            continue
        if value.dim() not in ((3,) if name == "weight" else (2, 3)):
            continue
        child = name.removesuffix("_weight") if name.endswith("_weight") else f"{name}_weight"
        taken = hasattr(module, child) and not isinstance(module._modules.get(child), TensorNetworkLayer)
        attention = isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight"
        slices, heads = (_PROJECTIONS, int(module.num_heads)) if attention else (1, 0)  # type: ignore[arg-type]
        experts = value.shape[0] if value.dim() > 2 else 0
        child = f"{child}_" if taken else child
        found.append(RawWeight(module, name, child, *value.shape[-2:], slices, heads, experts))
    return tuple(found)


def raw_names(module: nn.Module) -> tuple[str, ...]:
    """The names by which the raw Parameters of a module are targets: their own, and those of what adapts them."""
    return tuple(name for raw in raw_weights(module) for name in (raw.name, raw.child))
