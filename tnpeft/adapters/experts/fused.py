"""Experts that transformers fuses into one Parameter per projection: which modules have them, and in which layout.

Classes of experts say themselves how they store their weights (transformers' ``use_experts_implementation``): gate
and up side by side or row by row in turn, transposed or not, with biases or without. Only such classes are adapted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from tnpeft.networks import NetworkError, Site

_SAYS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")


@dataclass(frozen=True)
class FusedWeight:
    """One Parameter of a module of experts, ``[expert, out, inp]`` or, ``transposed``, ``[expert, inp, out]``.

    ``slices`` is the number of projections side by side in its output features: gate and up; ``interleaved`` if these
    take turns row by row.
    """

    module: nn.Module
    name: str
    transposed: bool
    interleaved: bool
    slices: int
    experts: int
    out_features: int
    in_features: int

    def region(self, site: Site) -> tuple[slice, slice]:
        """The output and input features of a site: all of them, gate's or up's, or square slices of these."""
        parts = site.proj.split("/")[1:]
        start, step, size = 0, 1, self.out_features // self.slices
        if parts and self.slices > 1 and parts[0].startswith("out:") and (len(parts) > 1 or site.out == size):
            number = int(parts.pop(0).removeprefix("out:"))
            start, step = (number, self.slices) if self.interleaved else (number * size, 1)
        square = dict(part.split(":") for part in parts)
        row, col = int(square.get("out", 0)) * site.out, int(square.get("inp", 0)) * site.inp
        return slice(start + step * row, start + step * (row + site.out), step), slice(col, col + site.inp)

    def parameter(self) -> Tensor:
        """The Parameter as it stands there now."""
        value: Tensor = getattr(self.module, self.name)
        return value


def fused_weights(module: nn.Module) -> tuple[FusedWeight, ...]:
    """The fused weights of a module of experts; none of any other module."""
    if not all(hasattr(module, says) for says in _SAYS):
        return ()
    first = "gate_up_proj" if module.has_gate else "up_proj"
    found = []
    for name in (first, "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return ()
        transposed = bool(module.is_transposed)
        experts, out, inp = weight.shape if not transposed else (weight.shape[0], weight.shape[2], weight.shape[1])
        fused = name == "gate_up_proj"
        turns = fused and not module.is_concatenated
        found.append(FusedWeight(module, name, transposed, turns, 1 + fused, experts, out, inp))
    return tuple(found)


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """The arrays of several matrices that a module holds itself."""
    held = {**module._parameters, **module._buffers}
    return {name: array for name, array in held.items() if array is not None and array.dim() == 3}


def _of_no_layer(module: nn.Module) -> dict[str, Tensor]:
    """Those of a module that is not called as one of torch's own layers, such as a convolution."""
    return {} if type(module).__name__ in vars(nn) else matrices(module)


def check_floating(name: str, module: nn.Module) -> None:
    """Raise if a module holds several matrices in one array of few bits."""
    if any(array.dtype.itemsize < 2 or not array.is_floating_point() for array in _of_no_layer(module).values()):
        raise NetworkError(
            f"{name} is a {type(module).__name__}, whose experts are quantised, and no back end can give their "
            "weights",
            remedy="load the model without quantised experts, or leave them out with exclude_modules",
        )


def check_experts(name: str, module: nn.Module) -> None:
    """Raise if a module holds experts that cannot be adapted."""
    first = min(_of_no_layer(module), default="")
    if first and not fused_weights(module):
        raise NetworkError(
            f"{name} is a {type(module).__name__}, whose weights of several matrices have an unknown layout",
            remedy=f"name a Parameter and its axes, target_modules=[{first!r}] with axes={{{first!r}: "
            "'expert out inp'}, or leave it out with exclude_modules",
        )
    if getattr(module, "_is_expert_parallel", False):
        raise NetworkError(
            f"{name} holds only some of the experts, and the other processes hold others",
            remedy="load the model without expert parallelism",
        )


def is_eager(module: nn.Module) -> bool:
    """True if experts are called one after the other: with rows, sums and autocast in that implementation's order."""
    return getattr(module.config, "_experts_implementation", None) in (None, "eager")


def check_local(module: nn.Module) -> None:
    """Raise where a forward cannot read the weights: they are on no device, or belong to several processes."""
    weights = fused_weights(module)
    if getattr(module, "_is_expert_parallel", False) or any(w.parameter().device.type == "meta" for w in weights):
        raise NetworkError(
            "the weights of experts are offloaded or distributed over processes, and adapters read them here",
            remedy="keep the experts on one device",
        )


def parameter_place(path: str, paths: Iterable[str]) -> str:
    """PEFT's place of a Parameter's factors: wrappers of one module's Parameters stand one in the other."""
    owner, _, own = path.rpartition(".")
    names = [its.rpartition(".")[2] for its in paths if its.rpartition(".")[0] == owner]
    names.sort(key="down_proj".__eq__)
    return owner + ".base_layer" * (len(names) - 1 - names.index(own))
