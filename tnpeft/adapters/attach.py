"""Attaching an adapter: its sites on a model, its layout over them, and each array to the module that owns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from tnpeft.adapters.config import TensorNetworkConfig
from tnpeft.adapters.constants import PREFIX
from tnpeft.adapters.layer import columns
from tnpeft.adapters.layer.bank import BANK, FactorBank
from tnpeft.adapters.layer.binding import SiteUpdate, transposed
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.layer.shared_input import join
from tnpeft.adapters.placement import base_constants, build_layout, start_values
from tnpeft.adapters.replicas.batch import expect_blocks
from tnpeft.adapters.sites.bases import adapted_layer, check_kind, site_weight, targets_of
from tnpeft.adapters.sites.owners import check_owner
from tnpeft.adapters.sites.tied import note_tied
from tnpeft.adapters.targets import shared_input_groups
from tnpeft.layout import Layout, ParameterSpec, SiteLayout
from tnpeft.networks import NetworkError

_Values = Mapping[ParameterSpec, Tensor]
_CONTAINERS = type("Containers", (nn.ModuleDict, nn.ParameterDict), {})()  # of adapters, by name
_MEANT = ("__base__", "base_layer", "original_module", "modules_to_save", "token_adapter")


def attach(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: TensorNetworkConfig,
    adapter: str,
    meant: Callable[[str], Any],
    bank_for: Callable[[nn.Module], FactorBank],
) -> None:
    """Give targeted modules an adapter, all checks before the first of them is touched.

    ``meant`` is PEFT's answer for the path of a weight, as in :func:`targets_of`; ``bank_for`` gives the model its
    bank if it has none.
    """
    weights = targets_of(model, modules, config, meant)
    for name, weight in weights.items():
        for path in () if weight.held else name.replace("*", "0").split("="):
            check_owner(model, path)
        check_kind(name, weight, config, get_quantization_kwargs(model))
    layout = build_layout(model, weights, config)
    check_name(adapter, layout, getattr(model, BANK, None))
    values = start_values(config, layout, partial(site_weight, model, weights))
    holders = [weight.module for weight in weights.values()]
    if any(array.dtype == torch.float64 for holder in holders for array in holder.parameters()):
        values = {param: value.double() for param, value in values.items()}  # or loading would round them
    bank = bank_for(holders[0])
    bank.layouts[adapter], bank.configs[adapter] = layout, config
    bank.keys[adapter], bank.unit_norm[adapter] = frozenset(param.key for param in layout.parameters), {}
    if config.replicas > 1:
        expect_blocks(model)
    shared = {param: value for param, value in values.items() if not param.home}
    bank.register_factors(adapter, shared, config.save_frozen)
    bank._move_adapter_to_device_of_base_layer(adapter)
    site_layouts: dict[tuple[str, str, int], list[SiteLayout]] = {}
    for site_layout in layout.site_layouts:
        for expert, path in enumerate(site_layout.site.paths):
            site_layouts.setdefault((site_layout.site.module, path, expert), []).append(site_layout)
    for (name, path, expert), its in site_layouts.items():
        layer = adapted_layer(model, path, weights[name], bank)
        _register(layer, path, expert, adapter, config, values, sorted(its, key=lambda p: p.site.start))
    if bank.unit_norm[adapter]:
        columns.share(model)
    for names in shared_input_groups(model, [site_layout.site for site_layout in layout.site_layouts]):
        join(adapter, map(model.get_submodule, names))


def check_name(adapter: str, layout: Layout, bank: Any) -> None:
    """Raise if an adapter cannot have a name: it is part of the names of modules, Parameters and entries of files."""
    others = bank.keys if isinstance(bank, FactorBank) else {}
    printed = adapter != "" and adapter.isprintable()
    if not printed or "." in adapter or PREFIX in adapter or hasattr(_CONTAINERS, adapter):
        raise NetworkError(
            f"no adapter can be called {adapter!r}: its name is part of the names of its factors",
            remedy=f"choose a printable name without a dot or {PREFIX!r}, and not that of a module's method",
        )
    if adapter in _MEANT:
        raise NetworkError(f"{adapter!r} means something else to PEFT", remedy="choose another adapter name")
    keys = {param.key for param in layout.parameters}
    taken = [adapter] if adapter in keys or any(adapter in its for its in others.values()) else []
    for name in [*taken, *(name for name in others if name in keys)]:
        raise NetworkError(
            f"the adapter {name!r} is called as one of the factors, and PEFT would mix the two up in files",
            remedy="choose another adapter name",
        )


def _register(
    layer: DenseLinear,
    path: str,
    expert: int,
    adapter: str,
    config: TensorNetworkConfig,
    values: _Values,
    site_layouts: list[SiteLayout],
) -> None:
    """Give one layer or weight the adapter's updates and the arrays that only it uses."""
    f = layer.bank.layouts[adapter].factorization
    turned = note_tied(layer, site_layouts[0].site)
    args = f.unit_norm, base_constants(f), float(f.scale), config.tokens, expert, turned
    oriented = map(transposed, site_layouts) if turned else site_layouts
    layer.updates[adapter] = tuple(SiteUpdate(site_layout, *args) for site_layout in oriented)
    layer.dropouts[adapter] = config.dropout
    layer.prepare(adapter)
    used = [param for site_layout in site_layouts for param in site_layout.parameters.values()]
    own = {param: values[param] for param in used if param.home and param in values}
    layer.register_factors(adapter, own, config.save_frozen)
    if config.dora:
        length = layer.base_matrix().norm(dim=-1)
        if length.device.type != "meta" and not torch.isfinite(length).all():
            raise NetworkError(
                f"the rows of {path} have no finite length, with which their magnitudes would start",
                remedy="check the model, or attach without dora",
            )
        layer.tnpeft_magnitude[adapter] = nn.Parameter(length)
    layer._move_adapter_to_device_of_base_layer(adapter)
    for its in (its for item in layer.updates[adapter] for its in item.operands):
        if its.norm and not its.stack and its.source != "base":
            layer.bank.unit_norm[adapter][layer.owner(its).tnpeft_factors[adapter], its.key, its.norm] = None
