"""Names of adapters that mean one thing everywhere."""

from __future__ import annotations

from typing import Any

from torch import nn

from tnpeft.adapters.constants import PREFIX
from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.layout import Layout
from tnpeft.networks import NetworkError

_CONTAINERS = type("Containers", (nn.ModuleDict, nn.ParameterDict), {})()  # of adapters, by name
_MEANT = ("__base__", "base_layer", "original_module", "modules_to_save", "token_adapter")


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
