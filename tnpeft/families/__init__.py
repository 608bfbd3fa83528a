"""Named factorizations: each a function that returns a Factorization, one module per lineage, facts only.

``families.lora(rank=8)``, ``families.names()``, ``families.get("lora")``. Every module of this package is read on
import, so a new family is a function under ``@family`` in one of them (or in a module of one's own) and nothing else.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tnpeft.families.catalogue import FAMILIES, Family, family, get, names

__all__ = ["FAMILIES", "Family", "family", "get", "names"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Family:
    if name not in FAMILIES:
        raise AttributeError(f"no family is called {name!r}; tnpeft.families.names() lists all")
    return FAMILIES[name]


def __dir__() -> list[str]:
    return sorted({*__all__, *FAMILIES})
