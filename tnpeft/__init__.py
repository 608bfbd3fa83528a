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
    "coordinate_check": "adapters",
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

_EXTRAS = {
    "nn": "torch",
    "adapters": "peft",
    "studies": "studies",
}  # what a layer needs beyond the plain installation

__all__ = ["__version__", "families", "testing", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module 'tnpeft' has no attribute {name!r}")
    layer = _HOME.get(name, name)
    try:
        module = import_module(f"tnpeft.{layer}")
        value = getattr(module, name) if name in _HOME else module
    except ModuleNotFoundError as error:  # a library that only an extra brings
        if layer not in _EXTRAS or (error.name or "tnpeft").partition(".")[0] == "tnpeft":
            raise
        remedy = f"pip install 'tnpeft[{_EXTRAS[layer]}]'"
        raise ModuleNotFoundError(f"tnpeft.{name} needs {error.name}; {remedy}", name=error.name) from error
    if name in _HOME:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


registration.install()
