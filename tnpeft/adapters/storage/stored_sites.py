"""The sites that a file of factors is of, told without the model: their layers, projections, lines and sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tnpeft.adapters.config import TensorNetworkConfig
from tnpeft.adapters.constants import PREFIX
from tnpeft.adapters.layer.bank import BANK
from tnpeft.models.cards import Card, Model, at_hand, card
from tnpeft.networks import Factorization, Network, NetworkError, Site, SiteRule
from tnpeft.networks.sizes import integers

_PLACE = ("layer", "proj")


def label_of(name: str) -> str:
    """The label of a stored factor by its name; some other text for whatever else is stored."""
    return re.split("[@#]", name.rpartition(f".{PREFIX}factors.")[2])[0]


def base_card(model: Model, recorded: Any) -> Card | None:
    """The card of a base model: the one given, else that of a recorded name where this machine knows it.

    Raises:
        NetworkError: the model that is given is unknown.
    """
    if model is not None:
        return card(model)
    try:
        return card(recorded) if isinstance(recorded, str) and at_hand(recorded) else None
    except NetworkError:
        return None


@dataclass(frozen=True)
class StoredSite:
    """A site, its own line and sizes, and those of its factors by label that the file holds."""

    site: Site
    network: Network
    sizes: Mapping[str, int]
    factors: Mapping[str, Any]


class StoredFactors:
    """The factors in a file, tensors or whatever else has a shape, found by site.

    ``homes`` are the modules that own factors, and the slices of their weights that these belong to (``""``: the
    whole); ``others`` is what else the file holds.

    Args:
        config: the configuration beside the file.
        stored: the file's entries by their names in the model.
    """

    def __init__(self, config: TensorNetworkConfig, stored: Mapping[str, Any]) -> None:
        self._config = config
        self._held: dict[tuple[str, str], list[Any]] = {}
        self.homes: dict[tuple[str, str], None] = {}
        self.others: dict[str, Any] = {}
        for name, value in stored.items():
            home, ours, key = name.rpartition(f".{PREFIX}factors.")
            if ours:
                key = key.partition("#")[0]  # what follows is the shape
                self._held.setdefault((home, key), []).append(value)
                self.homes |= {} if home == BANK else {(home, key.partition("@")[2]): None}
            else:
                self.others[name] = value

    def place(self, module: str, part: str = "") -> tuple[int, str] | None:
        """The number of the layer and the projection of a module, or of a slice of it; None if it has none."""
        layers, projs = self._config.layers or {}, self._config.projections or {}
        layer = max((p for p in layers if not p or f"{module}.".startswith(f"{p}.")), key=len, default=None)
        if layer is None:
            return None
        inside = f"_{module[len(layer) :].strip('.').replace('.', '_')}"
        names = {proj: proj.partition("/")[0] for proj in projs if proj.partition("/")[2] in ("", part)}
        found = sorted((proj for proj, name in names.items() if inside.endswith(f"_{name}")), key=len, reverse=True)
        found += [proj for proj, name in names.items() if name.rpartition("_")[2] in inside]
        return (layers[layer], found[0]) if found else None

    def site(self, module: str, part: str, layer: int, proj: str, features: Mapping[str, int]) -> StoredSite | None:
        """A site whose factors are in the file; None if nothing tells the sizes of a line that serves it.

        ``features`` are out, inp and heads as far as they are known; ``module`` is ``""`` if it owns no factors.
        """
        f = self._config.factorization
        for rule in f.lines:
            net, held = rule.network, dict[str, tuple[list[str], list[Any]]]()
            for factor in net.factors:
                label = net.label(factor)
                if module and {*_PLACE} <= {*factor.indices}:
                    key = module, f"{label}@{part}" if part else label
                else:
                    tags = [str(layer)] * ("layer" in factor.indices) + [proj] * ("proj" in factor.indices)
                    key = BANK, "@".join([label, *tags])
                held[label] = [index for index in factor.indices if index not in _PLACE], self._held.get(key, [])
            sizes = _sizes(f, rule, [(axes, {tuple(a.shape) for a in its}) for axes, its in held.values()], features)
            if sizes is None:
                continue
            out, inp = (prod(sizes[index] for index in group) for group in (net.rows, net.cols))
            site = Site(layer, proj, out, inp, module=module)
            if rule.serves(site) and f.rule_for(site) is rule:
                own = net.select(*(index for index in net.stack if index in _PLACE))
                shapes = {label: tuple(sizes[index] for index in axes) for label, (axes, _) in held.items()}
                fit = {label: a for label, (_, its) in held.items() for a in its if tuple(a.shape) == shapes[label]}
                return StoredSite(site, own, sizes, fit)
        return None


def _sizes(
    f: Factorization,
    rule: SiteRule,
    held: Iterable[tuple[Sequence[str], set[tuple[int, ...]]]],
    features: Mapping[str, int],
) -> dict[str, int] | None:
    """The sizes of a line's indices by its factors' axes and the shapes that these may have in the file.

    None if some stay open, or the shapes are another line's.
    """
    net = rule.network
    found = {bond: rank for bond, rank in f.ranks.items() if isinstance(rank, int) and bond in net.bonds}
    for side, group in (("out", net.rows), ("inp", net.cols)):
        found |= {group[0]: features[side]} if len(group) == 1 and side in features else {}
    for axes, shapes in sorted(held, key=lambda item: len(item[1])):
        options = [dict(zip(axes, shape, strict=True)) for shape in shapes if len(shape) == len(axes)]
        fit = [option for option in options if all(found.get(index, n) == n for index, n in option.items())]
        if shapes and not fit:
            return None
        found |= fit[0] if len(fit) == 1 else {}
    try:
        sizes = {"layer": 1, "proj": 1, **f.sizes({**features, **found}, line=rule), **found}
        return integers(net, {index: sizes[index] for index in net.indices if index in sizes})
    except NetworkError:
        return None
