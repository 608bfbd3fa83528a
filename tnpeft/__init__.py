"""Tensor-network algebra for parameter-efficient fine-tuning: an adapter is one line of named einsum.

The public names are handed out lazily: ``import tnpeft`` and counting never import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tnpeft import registration

if TYPE_CHECKING:  # for type checkers and editors; a test keeps it equal to _HOME
    from tnpeft import families as families
    from tnpeft import optim as optim
    from tnpeft import testing as testing
    from tnpeft.adapters import TensorNetworkConfig as TensorNetworkConfig
    from tnpeft.adapters import explain as explain
    from tnpeft.adapters import export_lora as export_lora
    from tnpeft.adapters import factors as factors
    from tnpeft.adapters import hotswap as hotswap
    from tnpeft.adapters import refresh as refresh
    from tnpeft.adapters import replica as replica
    from tnpeft.adapters import replicas as replicas
    from tnpeft.adapters import select as select
    from tnpeft.adapters import set_factors as set_factors
    from tnpeft.adapters.convert import convert as convert
    from tnpeft.comparison import compare as compare
    from tnpeft.counting import budget as budget
    from tnpeft.counting import dof as dof
    from tnpeft.counting import parameter_step as parameter_step
    from tnpeft.counting import parameters as parameters
    from tnpeft.counting import parameters_by_factor as parameters_by_factor
    from tnpeft.counting import rank_bound as rank_bound
    from tnpeft.drawing import draw as draw
    from tnpeft.drawing import mermaid as mermaid
    from tnpeft.networks import AdapterFileError as AdapterFileError
    from tnpeft.networks import ConfigError as ConfigError
    from tnpeft.networks import Factor as Factor
    from tnpeft.networks import Factorization as Factorization
    from tnpeft.networks import Network as Network
    from tnpeft.networks import NetworkError as NetworkError
    from tnpeft.networks import Site as Site
    from tnpeft.networks import SiteRule as SiteRule
    from tnpeft.networks import StudyError as StudyError
    from tnpeft.networks import Term as Term
    from tnpeft.networks import TnpeftError as TnpeftError
    from tnpeft.networks import network as network
    from tnpeft.nn import dense as dense
    from tnpeft.nn import from_tensorly as from_tensorly
    from tnpeft.nn import to_tensorly as to_tensorly
    from tnpeft.nn.fit import fit as fit
    from tnpeft.optim import coordinate_check as coordinate_check
    from tnpeft.optim import parameter_groups as parameter_groups
    from tnpeft.optim import rebalance as rebalance
    from tnpeft.planning import plan as plan
    from tnpeft.planning import plan_table as plan_table
    from tnpeft.scaling import gain as gain
    from tnpeft.scaling import learning_rates as learning_rates

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
    "compare": "comparison",
    "draw": "drawing",
    "mermaid": "drawing",
    "dense": "nn",
    "fit": "nn.fit",  # a module of this name, once imported, hides the function in its package
    "from_tensorly": "nn",
    "to_tensorly": "nn",
    "TensorNetworkConfig": "adapters",
    "factors": "adapters",
    "set_factors": "adapters",
    "refresh": "adapters",
    "select": "adapters",
    "export_lora": "adapters",
    "convert": "adapters.convert",
    "explain": "adapters",
    "hotswap": "adapters",
    "parameter_groups": "optim",
    "coordinate_check": "optim",
    "rebalance": "optim",
    "replica": "adapters",
    "replicas": "adapters",
}
_MODULES = (
    "networks",
    "families",
    "counting",
    "scaling",
    "planning",
    "comparison",
    "drawing",
    "nn",
    "adapters",
    "optim",
    "studies",
    "testing",
    "cli",
)

_EXTRAS = {
    "cli": "cli",
    "testing": "testing",
    "nn": "torch",
    "adapters": "peft",
    "optim": "peft",
    "studies": "studies",
}  # what a layer needs beyond the plain installation

__all__ = ["__version__", "families", "optim", "testing", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module 'tnpeft' has no attribute {name!r}")
    layer = _HOME.get(name, name)
    try:
        module = import_module(f"tnpeft.{layer}")
        value = getattr(module, name) if name in _HOME else module
    except ModuleNotFoundError as error:  # a library that only an extra brings
        if (layer := layer.partition(".")[0]) not in _EXTRAS or (error.name or "tnpeft").partition(".")[
            0
        ] == "tnpeft":
            raise
        remedy = f"pip install 'tnpeft[{_EXTRAS[layer]}]'"
        raise ModuleNotFoundError(f"tnpeft.{name} needs {error.name}; {remedy}", name=error.name) from error
    if name in _HOME:
        globals()[name] = value
    if "tnpeft.networks" in sys.modules:
        import_module("tnpeft.networks.display").offer(_svg)
    return value


def _svg(net: Any) -> str:
    """Draw for a notebook: this module alone may know both networks and the layer that draws them."""
    picture: str = import_module("tnpeft.drawing").svg(net)
    return picture


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


registration.install()
