"""Linears whose owner reads ``.weight`` itself instead of calling them: an adapter there would have no effect.

Attention of torch, state-space kernels and fused layers do so; the source of the owner's class tells which.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any

from torch import nn

from tnpeft.networks import NetworkError

_ABOUT = {
    "dtype",
    "device",
    "shape",
    "size",
    "dim",
    "ndim",
    "numel",
    "is_cuda",
    "is_meta",
    "layout",
}  # not the numbers
_SETUP = {
    "__init__",
    "_init_weights",
    "init_weights",
    "reset_parameters",
    "_reset_parameters",
    "tie_weights",
    "extra_repr",
}
# Read in a branch that a model of transformers does not enter: tensor-parallel pretraining, and a second query.
_UNREACHED = {"BloomAttention": {"dense"}, "BloomMLP": {"dense_4h_to_h"}, "DisentangledSelfAttention": {"in_proj"}}


def check_owner(model: nn.Module, name: str) -> None:
    """Raise if the module that holds a linear reads the linear's weight itself.

    Raises:
        NetworkError: it does.

    >>> check_owner(nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}), "attn.out_proj")
    Traceback (most recent call last):
    tnpeft.networks.errors.NetworkError: attn.out_proj cannot be adapted: MultiheadAttention reads its weight...
    leave it out of target_modules, or name it in exclude_modules
    """
    path, _, child = name.rpartition(".")
    owner = model.get_submodule(path)
    if not fused(owner) and child in read_weights(type(owner)):
        raise NetworkError(
            f"{name} cannot be adapted: {type(owner).__name__} reads its weight without calling it",
            remedy="leave it out of target_modules, or name it in exclude_modules",
        )


def fused(owner: nn.Module) -> bool:
    """True if the owner reads weights only where nothing is hooked to its modules.

    >>> fused(nn.TransformerEncoderLayer(4, 2))
    True
    """
    return isinstance(owner, nn.TransformerEncoderLayer)


def keep_unfused(module: nn.Module, args: Any) -> None:
    """Do nothing: a forward pre-hook by which torch's fused encoder layer sees that it has to call the module."""


@lru_cache(maxsize=1024)
def read_weights(owner: type[nn.Module]) -> frozenset[str]:
    """Children of which a class reads the weight's numbers in any of its methods.

    >>> sorted(read_weights(nn.MultiheadAttention))
    ['out_proj']
    """
    found: set[str] = set()
    seen = {*_SETUP}
    for cls in owner.__mro__:
        if cls.__module__ == "torch.nn.modules.module" or not issubclass(cls, nn.Module):
            continue
        for name, children in _methods(cls).items():
            if name not in seen:
                found |= children
        seen |= {*vars(cls)}
    return frozenset(found - _UNREACHED.get(owner.__name__, set()))


def _methods(cls: type) -> dict[str, set[str]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # no source: it is defined in a shell, or generated
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    return {f.name: _reads(f) for f in body if isinstance(f, ast.FunctionDef)}


def _reads(function: ast.FunctionDef) -> set[str]:
    """``x`` of every ``self.x.weight`` whose numbers are used."""
    above = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    found = set()
    for node in ast.walk(function):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute)):
            continue
        holder, user = node.value.value, above[node]
        about = isinstance(user, ast.Attribute) and user.attr in _ABOUT
        asked = (
            isinstance(user, ast.Call)
            and isinstance(user.func, ast.Name)
            and user.func.id in ("isinstance", "hasattr")
        )
        if isinstance(holder, ast.Name) and holder.id == "self" and not (about or asked):
            found.add(node.value.attr)
    return found
