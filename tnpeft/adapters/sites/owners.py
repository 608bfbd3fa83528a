"""Linears whose owner reads ``.weight`` itself instead of calling them: an adapter there would have no effect.

Attention of torch, state-space kernels and fused layers do so; the source of the owner's class tells which.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from tnpeft.networks import NetworkError

# Attributes of a weight that are not its numbers, and methods that are not on the way of a forward.
_ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_cuda", "is_meta", "layout"}
_SETUP = {
    "__init__", "_init_weights", "init_weights", "initialize_weights", "reset_parameters", "_reset_parameters",
    "tie_weights", "extra_repr", "resize_position_embeddings", "set_output_embeddings",
}  # fmt: skip
# Read in a branch that a model of transformers does not enter: tensor-parallel pretraining, and a second query.
_UNREACHED = {"BloomAttention": {"dense"}, "BloomMLP": {"dense_4h_to_h"}, "DisentangledSelfAttention": {"in_proj"}}


def check_owner(model: nn.Module, name: str) -> None:
    """Raise if a module that holds a linear, at any depth, reads the linear's weight itself."""
    parts = name.split(".")
    for depth in range(len(parts)):
        owner, inside = model.get_submodule(".".join(parts[:depth])), parts[depth:]
        if not fused(owner) and any(_same(inside, path.split(".")) for path in read_weights(type(owner))):
            raise NetworkError(
                f"{name} cannot be adapted: {type(owner).__name__} reads its weight without calling it",
                remedy="leave it out of target_modules, or name it in exclude_modules",
            )


def _same(inside: list[str], path: list[str]) -> bool:
    return len(inside) == len(path) and all(its in ("*", part) for part, its in zip(inside, path, strict=True))


def fused(owner: nn.Module) -> bool:
    """True if the owner reads weights only where nothing is hooked to its modules."""
    return isinstance(owner, nn.TransformerEncoderLayer | nn.TransformerEncoder)


def keep_unfused(module: nn.Module, args: Any) -> None:
    """Do nothing: a forward pre-hook by which torch's fused encoder layer sees that it has to call the module."""


@lru_cache(maxsize=1024)
def read_weights(owner: type[nn.Module]) -> frozenset[str]:
    """Modules inside a class, by path, of which it reads the weight's numbers in any of its methods."""
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
    """What each method of a class reads. Only methods that name a ``weight`` are parsed: parsing takes the time."""
    return {
        name: set[str]().union(*map(_source_reads, _codes(value, f"{cls.__qualname__}.{name}")))
        for name, value in vars(cls).items()
    }


def _codes(value: Any, qualname: str) -> list[CodeType]:
    """The code of a method under its decorators, if it names a weight; of a property its parts'."""
    found, pending, seen = [], [value], set[int]()
    while pending:
        its = pending.pop()
        if id(its) in seen:
            continue
        seen.add(id(its))
        if isinstance(its, property):
            pending += [its.fget, its.fset]
        elif isinstance(its, staticmethod | classmethod):
            pending.append(its.__func__)
        elif isinstance(its, FunctionType):
            if its.__code__.co_qualname == qualname and _names_weight(its.__code__):
                found.append(its.__code__)
            pending += [getattr(its, "__wrapped__", None), *(cell.cell_contents for cell in its.__closure__ or ())]
    return found


def _names_weight(code: CodeType) -> bool:
    inner = (its for its in code.co_consts if isinstance(its, CodeType))
    return "weight" in code.co_names or any(map(_names_weight, inner))


def _source_reads(code: CodeType) -> set[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # no source: it is defined in a shell, or generated
        return set()
    return _reads(tree.body[0]) if isinstance(tree.body[0], ast.FunctionDef) else set()


def _reads(function: ast.FunctionDef) -> set[str]:
    """``x.y`` of every ``self.x.y.weight`` whose numbers are used, ``*`` for an item of a list or a loop."""
    above = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    means: dict[str, str] = {"self": ""}  # paths of local names
    for node in sorted(above, key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.Assign | ast.For):
            target = node.target if isinstance(node, ast.For) else node.targets[0]
            path = _path(node.iter if isinstance(node, ast.For) else node.value, means)
            if isinstance(target, ast.Name) and target.id != "self":
                means.pop(target.id, None)
                means |= {} if path is None else {target.id: f"{path}.*" if isinstance(node, ast.For) else path}
    found = set()
    for node in above:
        if not (isinstance(node, ast.Attribute) and node.attr == "weight"):
            continue
        path, user = _path(node.value, means), above[node]
        about = isinstance(user, ast.Attribute) and user.attr in _ABOUT
        asked = (
            isinstance(user, ast.Call)
            and isinstance(user.func, ast.Name)
            and user.func.id in ("isinstance", "hasattr")
        )
        if path and not (about or asked):
            found.add(path.lstrip("."))
    return found


def _path(node: ast.AST, means: Mapping[str, str]) -> str | None:
    """The path of the module that an expression stands for, None if it is none below ``self``."""
    if isinstance(node, ast.Name):
        return means.get(node.id)
    if not isinstance(node, ast.Attribute | ast.Subscript) or (path := _path(node.value, means)) is None:
        return None
    if isinstance(node, ast.Attribute):
        return f"{path}.{node.attr}"
    return f"{path}.{node.slice.value if isinstance(node.slice, ast.Constant) else '*'}"
