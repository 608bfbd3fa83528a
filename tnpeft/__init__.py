"""Tensor-network algebra for parameter-efficient fine-tuning: an adapter is one line of named einsum.

The public names are handed out lazily: ``import tnpeft`` and counting never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tnpeft import registration

__version__ = "0.1.0"

_HOME = {
    "AdapterFileError": "networks",
    "ConfigError": "networks",
    "Factor": "networks",
    "Factorization": "networks",
    "SiteRule": "networks",
    "Network": "networks",
    "NetworkError": "networks",
    "Site": "networks",
    "StudyError": "networks",
    "Term": "networks",
    "TnpeftError": "networks",
    "network": "networks",
    "parameters": "counting",
    "parameters_by_factor": "counting",
    "parameter_step": "counting",
    "rank_bound": "counting",
    "dof": "counting",
    "budget": "counting",
    "gain": "scaling",
    "learning_rates": "scaling",
    "plan": "planning",
    "plan_table": "planning",
    "draw": "drawing",
    "mermaid": "drawing",
    "dense": "nn",
    "fit": "nn",
    "TensorNetworkConfig": "adapters",
    "factors": "adapters",
    "set_factors": "adapters",
    "refresh": "adapters",
    "export_lora": "adapters",
    "hotswap": "adapters",
    "parameter_groups": "adapters",
    "replica": "adapters",
    "replicas": "adapters",
}
_MODULES = (
    "networks",
    "families",
    "counting",
    "scaling",
    "planning",
    "drawing",
    "nn",
    "adapters",
    "studies",
    "testing",
    "cli",
)

__all__ = ["__version__", "families", "testing", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"tnpeft.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'tnpeft' has no attribute {name!r}")
    value = getattr(import_module(f"tnpeft.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


registration.install()
