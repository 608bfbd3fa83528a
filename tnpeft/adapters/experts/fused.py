"""Experts in one array per projection: what is refused of them, and how those that transformers fuses are called."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor, nn

from tnpeft.adapters.sites.weight import Weight, grouped_weights
from tnpeft.networks import NetworkError


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """The arrays of several matrices that a module holds itself; none of a layer of torch, such as a convolution."""
    held = {} if type(module).__name__ in vars(nn) else {**module._parameters, **module._buffers}
    return {name: array for name, array in held.items() if array is not None and array.dim() == 3}


def check_matrices(name: str, module: nn.Module, chosen: Collection[Weight]) -> None:
    """Raise if a module holds several matrices in one array that cannot be adapted, whichever of them are chosen."""
    arrays = matrices(module)
    if any(array.dtype.itemsize < 2 or not array.is_floating_point() for array in arrays.values()):
        raise NetworkError(
            f"{name} is a {type(module).__name__}, whose experts are quantised, and no back end can give their "
            "weights",
            remedy="load the model without quantised experts, or leave them out with exclude_modules",
        )
    if not all(weight.grouped for weight in chosen):
        return  # they are formed, wherever they stand
    if arrays and not grouped_weights(module):
        first = min(arrays)
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
    weights = grouped_weights(module)
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
