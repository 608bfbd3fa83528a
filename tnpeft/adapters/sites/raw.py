"""Which Parameters a module reads itself, instead of being a layer that is called for its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnpeft.adapters.layer.bank import FactorStore, TensorNetworkLayer

_CALLED = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # adapted as layers
_HELD = (nn.ParameterList, nn.ParameterDict, nn.RNNBase, torch.jit.ScriptModule)  # read otherwise than by name
_PROJECTIONS = 3  # query, key and value, which torch's attention holds in one Parameter


@dataclass(frozen=True)
class RawWeight:
    """A Parameter ``[out, inp]`` of a module that is not called for it, and what stands side by side in its rows."""

    module: nn.Module
    name: str
    child: str
    out_features: int
    in_features: int
    slices: int = 1
    heads: int = 0
    experts: int = 0

    def matrix(self) -> Tensor:
        """The Parameter before any merge, in fp32 or wider."""
        layer = self.module._modules.get(self.child)
        weight = self.module._parameters[self.name]
        assert weight is not None  # it was found there
        return (
            layer.base_matrix()
            if isinstance(layer, TensorNetworkLayer)
            else weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        )


def raw_weights(module: nn.Module) -> tuple[RawWeight, ...]:
    """The Parameters of two axes that a module reads itself, adapted or not; none of a layer that is called.

    >>> [(raw.name, raw.child, raw.slices) for raw in raw_weights(nn.MultiheadAttention(4, 2))]
    [('in_proj_weight', 'in_proj', 3)]
    """
    if isinstance(module, (*_CALLED, *_HELD, TensorNetworkLayer, FactorStore)) or not module._parameters:
        return ()
    found = []
    for name, value in module._parameters.items():
        if value is None or value.dim() != 2 or not value.is_floating_point() or name == "weight":
            continue
        child = name.removesuffix("_weight") if name.endswith("_weight") else f"{name}_weight"
        taken = hasattr(module, child) and not isinstance(module._modules.get(child), TensorNetworkLayer)
        attention = isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight"
        slices, heads = (_PROJECTIONS, int(module.num_heads)) if attention else (1, 0)  # type: ignore[arg-type]
        found.append(RawWeight(module, name, f"{child}_" if taken else child, *value.shape, slices, heads))
    return tuple(found)


def raw_names(module: nn.Module) -> tuple[str, ...]:
    """The names by which the raw Parameters of a module are targets: their own, and those of what adapts them.

    >>> raw_names(nn.MultiheadAttention(4, 2))
    ('in_proj_weight', 'in_proj')
    """
    return tuple(name for raw in raw_weights(module) for name in (raw.name, raw.child))
