"""Which path each adapted layer takes, and why it is not a faster one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tnpeft._text import Printed, Table
from tnpeft.adapters.layer.bank import find_bank
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.sites.selection import described
from tnpeft.networks import ConfigError


@dataclass(frozen=True)
class LayerPath:
    """One adapter at one site: sizes of it and of its factors, the path of the layer, and why not a faster one."""

    layer: str
    adapter: str
    active: bool
    site: str
    out: int
    inp: int
    factors: dict[str, tuple[int, ...]]
    path: str
    reason: str
    experts: int = 0


@dataclass(frozen=True)
class Explanation(Printed):
    """Rows of plain data, and the targets of each adapter that matched no layer. It prints as a table."""

    rows: tuple[LayerPath, ...]
    unmatched: dict[str, tuple[str, ...]]

    def _parts(self) -> list[str | Table]:
        head = ("layer", "adapter", "site", "out x inp", "factors", "path", "reason")
        missing = [f"{name}: no layer matches {', '.join(found)}" for name, found in self.unmatched.items() if found]
        return [Table(head, tuple(self._cells(row) for row in self.rows), "<"), *missing]

    @staticmethod
    def _cells(row: LayerPath) -> tuple[str, ...]:
        factors = " ".join(f"{label}{list(shape)}".replace(", ", "x") for label, shape in row.factors.items())
        adapter = row.adapter if row.active else f"{row.adapter} (inactive)"
        size = f"{row.experts} x " * bool(row.experts) + f"{row.out} x {row.inp}"
        return row.layer, adapter, row.site, size, factors, row.path, row.reason


def explain(model: nn.Module) -> Explanation:
    """Return the path that every adapted layer of a model takes as it is now, and why it is not a faster one.

    The path is that of a call with as many rows as the adapter was planned for, in the base weight's dtype, in the
    current mode: train or eval, with or without gradients, under autocast or not. See
    :meth:`~tnpeft.adapters.layer.linear.TensorNetworkLinear.route` for the paths. Nothing is computed.

    Args:
        model: a PeftModel, or a model of transformers with adapters of this package.

    Raises:
        ConfigError: the model has no adapter of this package.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"], dora=True)
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> [(row.layer, row.factors, row.path, row.reason) for row in explain(model).rows]
    [('base_model.model.0', {'B': (8, 2), 'A': (2, 4)}, 'plain', 'DoRA rescales the output')]
    """
    bank = find_bank(model)
    if bank is None:
        raise ConfigError("the model has no adapter of tnpeft", remedy="attach one with peft.get_peft_model first")
    rows = tuple(row for name, layer in _layers(model) for row in _paths(name, layer))
    raw = [f"{name.rpartition('.')[0]}.{layer.weight_name}" for name, layer in _layers(model)]
    unmatched = {adapter: _unmatched(config.target_modules, rows, raw) for adapter, config in bank.configs.items()}
    return Explanation(rows, unmatched)


def _layers(model: nn.Module) -> Iterator[tuple[str, DenseLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, DenseLinear))


def _paths(name: str, layer: DenseLinear) -> Iterator[LayerPath]:
    weight = getattr(layer, "weight", None)  # of the layer, or as it is without updates: nothing is formed
    dtype = (
        weight.dtype if isinstance(weight, torch.Tensor) and weight.is_floating_point() else torch.get_default_dtype()
    )
    for adapter, items in layer.updates.items():
        row = torch.empty(1, layer.in_features, dtype=dtype, device=layer.home_device())
        route = layer.route(row.expand(items[0].tokens, -1))
        active = adapter in layer.active_adapters
        for item in items:
            shapes = {label: tuple(param.shape) for label, param in item.site_layout.parameters.items()}
            site = item.site_layout.site
            reason = route.reason if active else "the adapter is not active"
            reason = "; ".join(filter(None, [reason, described(item.stack, item.chosen(layer.bank.selected))]))
            path = route.kind if active else "base"
            yield LayerPath(name, adapter, active, site.proj, site.out, site.inp, shapes, path, reason, site.experts)


def _unmatched(targets: object, rows: tuple[LayerPath, ...], more: Collection[str] = ()) -> tuple[str, ...]:
    names = {*more, *(row.layer for row in rows)}
    of_experts = [row.layer for row in rows if row.experts]
    names |= {name.rpartition(".")[0] for name in of_experts}  # targets name a module of experts, too
    names |= {re.sub(r"\.\d+(\.\D[^.]*)+$", "", name) for name in of_experts}  # or a list of them
    if isinstance(targets, str):
        found = targets == "all-linear" or any(re.search(f"(^|\\.)(?:{targets})$", name) for name in names)
        return () if found else (targets,)
    wanted = sorted(targets) if isinstance(targets, list | set | tuple) else []
    return tuple(target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names))
