"""Optimizers that see updates: steps and scales of factors that do not depend on the gauge of the bonds."""

from __future__ import annotations

from tnpeft._lazy import lazy

_HOME = {
    "coordinate_check": "coordinate",
    "parameter_groups": "groups",
    "precondition": "preconditioner",
    "rebalance": "balance",
}

__all__ = [*_HOME]
__getattr__, __dir__ = lazy(__name__, _HOME)
