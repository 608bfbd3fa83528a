"""WITH torch: contract a network, execute a plan, initialise factors, fit them to a dense target."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tnpeft.nn.dense import dense  # at once: a module of that name would hide it

_HOME = {
    "Program": "executor.program",
    "program": "executor.program",
    "Initializer": "init.initializer",
    "fit": "fit",
    "from_tensorly": "tensorly_formats",
    "to_tensorly": "tensorly_formats",
}

__all__ = ["dense", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tnpeft.nn' has no attribute {name!r}")
    value = getattr(import_module(f"tnpeft.nn.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__]
