"""The linears that adapters are attached to, and their weights before any update."""

from __future__ import annotations

from typing import Any

from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.networks import NetworkError, Site


def linear(name: str, module: nn.Module, quantised: dict[str, Any]) -> nn.Module:
    """Return the linear that a targeted module is, or that it adapts already.

    Raises:
        NetworkError: it is something else.
    """
    base = module.get_base_layer() if isinstance(module, TensorNetworkLinear) else module
    backend = resolve_quantization_backend(base, **quantised)
    if not isinstance(base, nn.Linear | Conv1D) and getattr(backend, "layer_type", "") != "linear":
        raise NetworkError(
            f"{name} is a {type(base).__name__}, not a linear",
            remedy="target nn.Linear, Conv1D or quantised linears; exclude_modules leaves others out",
        )
    return base


def site_weight(modules: dict[str, nn.Module], quantised: dict[str, Any], site: Site) -> Tensor:
    """The base weight of a site, fp32 ``[out, inp]``."""
    module = modules[site.module]
    if not isinstance(module, TensorNetworkLinear):
        module = TensorNetworkLinear(module, FactorBank(), **quantised)
    rows = slice(site.start, site.start + site.out) if "/out:" in site.proj else slice(None)
    cols = slice(site.start, site.start + site.inp) if "/inp:" in site.proj else slice(None)
    return module.base_matrix()[rows, cols]
