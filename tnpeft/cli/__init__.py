"""Thin commands over the library: ``tnpeft count``, ``plan``, ``draw``, ``check``, ``families``, ``budget`` and more.

Every module of this package is read on import, so a new group of commands is a module with ``@app.command()``
functions. They import what they need when they run: ``tnpeft --help`` and counting load no torch.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tnpeft.cli.app import app, main

__all__ = ["app", "main"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
