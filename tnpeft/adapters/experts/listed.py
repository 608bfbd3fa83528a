"""Experts that are modules of their own, in a list: the linears of one name in all of them are one weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from tnpeft.adapters.sites.weight import Weight, features
from tnpeft.networks import NetworkError

_INSIDE = re.compile(r"(?P<list>.*)\.(?P<number>\d+)\.(?P<rest>\D.*)")


def is_list(name: str, module: nn.Module) -> bool:
    """True for a list of modules that is called one of experts, and holds several."""
    return isinstance(module, nn.ModuleList) and "expert" in name.rpartition(".")[2] and len(module) > 0


def starred(model: nn.Module, path: str) -> str:
    """The path of a linear of an expert in a list with ``*`` in the place of the expert's number; else ``""``."""
    match = _INSIDE.fullmatch(path)
    if match is None or not is_list(match["list"], model.get_submodule(match["list"])):
        return ""
    return f"{match['list']}.*.{match['rest']}"


def listed_weight(path: str, linears: Mapping[str, Any]) -> Weight:
    """The weight of a path with ``*``, of the linears of all experts by their paths, in order."""
    wanted = [path.replace("*", str(k)) for k in range(len(linears))]
    shapes = {features(linear) for linear in linears.values()}
    problem = next((f"{name} is not among them" for name in wanted if name not in linears), "")
    if not problem and len(shapes) > 1:
        problem = " and ".join(f"{out} x {inp}" for out, inp in sorted(shapes))
    if problem:
        raise NetworkError(
            f"the experts of {path} differ: {problem}",
            remedy="target linears that all experts of the list have, of one shape in each",
        )
    own = tuple(linears[name] for name in wanted)
    return Weight(own[0], *features(own[0]), experts=len(own), linears=own)


def lists(model: nn.Module) -> Iterator[str]:
    """The paths of the lists of experts in a model."""
    return (name for name, module in model.named_modules() if is_list(name, module))
