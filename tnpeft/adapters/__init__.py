"""INTO a transformer: a PEFT tuner whose update is any factorization.

Importing this package imports peft first, and with it registers the tuner: no module of it ever runs before that.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import peft as _peft  # noqa: F401  (see above)

_HOME = {
    "TensorNetworkConfig": "config",
    "TensorNetworkModel": "model",
    "factors": "state",
    "set_factors": "state",
    "refresh": "state",
    "select": "sites.selection",
    "explain": "layer.routes",
    "hotswap": "storage.files",
    "export_lora": "export",
    "replica": "replicas",
    "replicas": "replicas",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tnpeft.adapters' has no attribute {name!r}")
    module = import_module(f"tnpeft.adapters.{_HOME[name]}")
    value = module if name == _HOME[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__]
