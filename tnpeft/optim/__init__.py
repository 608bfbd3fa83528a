"""Optimizers that see updates: steps and scales of factors that do not depend on the gauge of the bonds."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "coordinate_check": "coordinate",
    "parameter_groups": "groups",
    "precondition": "preconditioner",
    "rebalance": "balance",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tnpeft.optim' has no attribute {name!r}")
    value = getattr(import_module(f"tnpeft.optim.{_HOME[name]}"), name)
    globals()[name] = value
    return value
