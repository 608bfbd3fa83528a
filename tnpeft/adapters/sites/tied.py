"""Embeddings and the heads that hold the same Parameter: one site, whose update all of them have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule
from torch import nn

from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.rollback import outside
from tnpeft.adapters.sites.weight import Weight
from tnpeft.networks import Site


def join_tied(model: nn.Module, bases: dict[str, Weight], meant: Callable[[str], Any], known: bool) -> None:
    """Make one target of a targeted embedding or linear and all that hold its Parameter, if one is an embedding.

    Its path is those of all of them, joined by ``=``, the embedding's first. What is excluded stays as it is. Unless
    it is ``known`` from a file, a warning says so.
    """
    holders: dict[int, list[str]] = {}
    layers: dict[str, nn.Module] = {}
    for path, module in outside(model):
        base = module.get_base_layer() if isinstance(module, DenseLinear) else module
        if isinstance(base, nn.Embedding | nn.Linear) and not isinstance(meant(path), _ExcludedModule):
            holders.setdefault(id(base._parameters.get("weight")), []).append(path)
            layers[path] = base
    for group in holders.values():
        targeted = [path for path in group if path in bases]
        embeddings = [path for path in group if isinstance(layers[path], nn.Embedding)]
        if len(group) < 2 or not targeted or not embeddings:
            continue
        first = embeddings[0]
        others = [path for path in group if path != first]
        joined = "=".join([first, *others])
        bases[joined] = Weight.of(layers[first])
        for path in targeted:
            del bases[path]
        if not known:
            names = ", ".join(others)
            warnings.warn(
                f"{names} and {first} hold one Parameter: they are one site, and its update is in all of them; "
                f"exclude_modules={others} leaves {names} as it is",
                stacklevel=2,
            )


def note_tied(layer: DenseLinear, site: Site) -> bool:
    """Tell a layer of a site which others hold its Parameter; true if its matrix is the transpose of the site's."""
    if "=" not in site.module:
        return False
    layer.tied = layer.bank.tied.setdefault(site.module, [])
    if layer not in layer.tied:
        layer.tied.append(layer)
    return isinstance(layer.get_base_layer(), nn.Linear)
