"""What an adapter can be attached to: the matrix of a layer, or a Parameter that a module reads itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from tnpeft.adapters.layer.bank import FactorStore, TensorNetworkLayer
from tnpeft.networks import NetworkError, Site

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CALLED = (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)  # adapted as layers
_HELD = (nn.ParameterList, nn.ParameterDict, nn.RNNBase, torch.jit.ScriptModule)  # read otherwise than by name
_PROJECTIONS = 3  # query, key and value, which torch's attention holds in one Parameter
_SAYS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")


@dataclass(frozen=True)
class Weight:
    """A matrix ``[out, inp]``, or one for each of several ``experts``: of a layer, or a Parameter that is ``held``.

    A held one is read by its ``module`` itself under its ``name``, and adapted by its module's ``child``; it is
    stored as ``[inp, out]`` if it is ``transposed``, behind the axis of experts. ``grouped`` says that the module is
    one of transformers' fused experts, whose rows meet it in grouped products. ``slices`` is the number of
    projections side by side in its output features, of ``heads`` heads each; ``interleaved`` if these take turns row
    by row. Of experts in a list ``linears`` has that of each; ``module`` is the first.
    """

    module: nn.Module
    out_features: int
    in_features: int
    name: str = "weight"
    child: str = ""
    experts: int = 0
    slices: int = 1
    heads: int = 0
    kernel: tuple[int, ...] = ()
    linears: tuple[nn.Module, ...] = ()
    transposed: bool = False
    interleaved: bool = False
    grouped: bool = False

    @staticmethod
    def of(layer: nn.Module) -> Weight:
        """The weight of a layer; without features if it has no numbers yet."""
        kernel = tuple(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else ()
        return Weight(layer, *features(layer), kernel=kernel)

    @property
    def held(self) -> bool:
        """True if its module reads it itself."""
        return self.child != ""

    def parameter(self) -> Tensor:
        """A held Parameter as it stands there now, without the updates that its module may read it with."""
        value: Tensor | None = self.module._parameters.get(self.name)
        return getattr(self.module, self.name) if value is None else value  # type: ignore[no-any-return]

    def region(self, site: Site) -> tuple[slice, slice]:
        """The output and input features of a site: all of them, a projection's, or square slices of these."""
        parts = site.proj.split("/")[1:]
        if not self.grouped:
            side = parts[-1].partition(":")[0] if parts else ""
            rows = slice(site.start, site.start + site.out) if side == "out" else slice(None)
            return rows, slice(site.start, site.start + site.inp) if side == "inp" else slice(None)
        start, step, size = 0, 1, self.out_features // self.slices
        if parts and self.slices > 1 and parts[0].startswith("out:") and (len(parts) > 1 or site.out == size):
            number = int(parts.pop(0).removeprefix("out:"))
            start, step = (number, self.slices) if self.interleaved else (number * size, 1)
        square = dict(part.split(":") for part in parts)
        row, col = int(square.get("out", 0)) * site.out, int(square.get("inp", 0)) * site.inp
        return slice(start + step * row, start + step * (row + site.out), step), slice(col, col + site.inp)

    def with_axes(self, path: str, axes: Mapping[str, str]) -> Weight:
        """A held weight of this path with its axes as they are declared by the ends of paths, or as its module says.

        Those of a matrix are ``out inp`` unless they are declared.

        Raises:
            NetworkError: nothing says which of several matrices' axes is their input, or another adapter says
                something else.
        """
        choices = [f"expert {pair}" if self.experts else pair for pair in ("out inp", "inp out")]
        shape = [self.out_features, self.in_features]
        own = [getattr(self.module, f"{side}_features", None) for side in ("out", "in")]
        found = next((its for end, its in axes.items() if f".{path}".endswith(f".{end}")), "")
        if not found and self.experts and (own[0] == own[1] or own not in (shape, shape[::-1])):
            raise NetworkError(
                f"{path} holds {self.experts} matrices of {self.out_features} x {self.in_features}, and nothing says "
                "which axis is their input",
                remedy=f'declare it: axes={{"{self.name}": "{choices[0]}"}}, or "{choices[1]}"',
            )
        found = found or choices[bool(self.experts) and own != shape]
        if found not in choices[: 1 if self.slices > 1 else 2]:
            raise NetworkError(f"the axes of {path} are {found!r}", remedy=f"use one of {', '.join(choices)}")
        layer, turned = self.module._modules.get(self.child), found == choices[1]
        if isinstance(layer, TensorNetworkLayer) and layer.transposed != turned:
            raise NetworkError(
                f"another adapter declares other axes of {path} than {found}", remedy="declare the same axes"
            )
        if not turned:
            return self
        return replace(self, out_features=self.in_features, in_features=self.out_features, transposed=True)


def features(layer: Any) -> tuple[int, int]:
    """Rows and columns of a layer's matrix: of a linear its output and input features; none before the first call.

    Of an embedding they are features and tokens; of a convolution output channels, and input channels of a group
    times taps of the kernel.
    """
    if is_lazy(getattr(layer, "weight", None)):
        return 0, 0
    if isinstance(layer, Conv1D):
        inp, out = layer.weight.shape
        return out, inp
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    if isinstance(layer, CONVOLUTIONS):
        return layer.weight.shape[0], prod(layer.weight.shape[1:])
    return int(layer.out_features), int(layer.in_features)


def grouped_weights(module: Any) -> tuple[Weight, ...]:
    """The weights of experts that transformers fuses, whose class says how it stores them; else none.

    Gate and up stand side by side or row by row in turn, all are transposed or not.
    """
    if not all(hasattr(module, says) for says in _SAYS):
        return ()
    found = []
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return ()
        experts, *shape = weight.shape
        out, inp = reversed(shape) if module.is_transposed else shape
        fused = name == "gate_up_proj"
        turned, turns = bool(module.is_transposed), fused and not module.is_concatenated
        found.append(
            Weight(
                module, out, inp, name, name, experts, 1 + fused, transposed=turned, interleaved=turns, grouped=True
            )
        )
    return tuple(found)


def held_weights(module: nn.Module) -> tuple[Weight, ...]:
    """The Parameters that a module reads itself, adapted or not; none of a layer that is called.

    They are those of transformers' fused experts, and any others of two or three axes, of which the first of three
    counts experts; which of the others are rows, :meth:`Weight.with_axes` says.
    """
    grouped = grouped_weights(module)
    if isinstance(module, (*_CALLED, *_HELD, TensorNetworkLayer, FactorStore)):
        return grouped
    found, known = [*grouped], {weight.name for weight in grouped}
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
        found.append(Weight(module, *value.shape[-2:], name, child, experts, slices, heads))
    return tuple(found)
