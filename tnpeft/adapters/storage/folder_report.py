"""An adapter's folder explained without its model: the network, where it sits, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from peft.utils.constants import CONFIG_NAME

from tnpeft._text import Table, block
from tnpeft.adapters.config import TensorNetworkConfig
from tnpeft.adapters.constants import PREFIX
from tnpeft.adapters.layer.bank import BANK
from tnpeft.adapters.storage.contents import Stored
from tnpeft.adapters.storage.files import fetch, file_in
from tnpeft.counting.cuts import rank_bound
from tnpeft.models.cards import Model, at_hand, card
from tnpeft.networks import AdapterFileError, Factorization, Network, NetworkError, Site
from tnpeft.networks.sizes import integers
from tnpeft.planning.planner import plan

_KEY = re.compile(r"(?P<label>~?[^@#]+)(?P<tags>(?:@[^@#]+)*)(?:#(?P<shape>.+))?")


@dataclass(frozen=True)
class Place:
    """One projection: its sites, their features, and what the update of one of them can do and costs.

    A line that cuts sites into squares counts the squares. Numbers are None where nothing tells the shape.
    """

    projection: str
    sites: int
    out: int | None = None
    inp: int | None = None
    rank_bound: int | None = None
    macs: float | None = None
    saved: float | None = None


@dataclass(frozen=True)
class FolderReport:
    """The adapter in a folder; prints as facts and a table of its projections.

    ``macs`` and ``saved`` elements are those of one site and token, planned for the configured number of tokens.
    """

    folder: str
    name: str
    lines: tuple[str, ...]
    ranks: Mapping[str, int | str]
    scale: float
    init: Mapping[str, str]
    seed: int
    base_model: str
    options: tuple[str, ...]
    layers: int
    parameters: int
    others: int
    bytes: int
    tokens: int
    places: tuple[Place, ...]

    def __str__(self) -> str:
        return f"{self._facts().text()}\n\n{self._table().text(rule=True)}"

    def _repr_html_(self) -> str:
        return block(self._facts(), self._table())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def _facts(self) -> Table:
        facts = {
            "folder": self.folder,
            "family": self.name,
            "line": "\n".join(self.lines) if len(self.lines) == 1 else " ; ".join(self.lines),
            "ranks": _pairs(self.ranks) or "none",
            "scale": f"{self.scale:g}",
            "init": _pairs(self.init) or "by the variance rule",
            "seed": str(self.seed),
            "options": ", ".join(self.options),
            "base model": self.base_model or "not recorded",
            "layers": self.layers,
            "parameters": self.parameters,
            "other tensors": self.others or None,
            "file": f"{self.bytes:,} bytes",
        }
        return Table((), tuple((name, value) for name, value in facts.items() if value not in (None, "")))

    def _table(self) -> Table:
        head = ("projection", "sites", "out", "inp", "rank bound", "macs / token / site", "saved / token / site")
        rows = []
        for p in self.places:
            costs = (
                None if cost is None else f"{cost:,.5g}" if cost < 1e4 else f"{cost:,.0f}"
                for cost in (p.macs, p.saved)
            )
            cells = (p.out, p.inp, p.rank_bound, *costs)
            rows.append((p.projection, p.sites, *("-" if cell is None else cell for cell in cells)))
        return Table(head, tuple(rows), "<>")


def explain_folder(folder: str | Path, *, model: Model = None) -> FolderReport:
    """Return what the adapter in a folder is, where it sits and what it costs; no model is loaded.

    The configuration and the file of factors pass the checks that loading makes. Shapes are those of the stored
    factors; where a frozen or shared factor hides them, those of the base model's card, if that is known.

    Args:
        folder: a folder that ``save_pretrained`` wrote.
        model: the base model as :func:`tnpeft.parameters` takes it; by default the one that the folder names.

    Raises:
        AdapterFileError: the folder has no adapter of this package, or its files are damaged.
        ConfigError: a value is not one that this version reads.
        NetworkError: ``model`` is unknown.

    >>> explain_folder("no/such/folder")
    Traceback (most recent call last):
    tnpeft.networks.errors.AdapterFileError: no adapter_config.json in 'no/such/folder'
    pass a folder that save_pretrained wrote
    """
    file_in(folder, CONFIG_NAME)
    config = TensorNetworkConfig.from_pretrained(str(folder))
    if not isinstance(config, TensorNetworkConfig):
        raise AdapterFileError(
            f"the adapter in {str(folder)!r} is a {getattr(config.peft_type, 'value', config.peft_type)}",
            remedy="bring it into this package's form first: tnpeft convert FOLDER NEW",
        )
    file = fetch(str(folder))  # says what is missing
    stored, f = config.stored or {}, config.factorization
    factors = {name: entry for name, entry in stored.items() if f".{PREFIX}" in f".{name}"}
    named = config.base_model_name_or_path or ""
    shapes = _card_sites(model if model is not None else named, named=model is None)
    frozen = {net.label(factor) for net in _nets(f) for factor in net.factors if factor.kind == "frozen"}
    trained = sum(prod(e.shape or ()) for name, e in factors.items() if _parsed(name)[1] not in frozen)
    projections = sorted(config.projections or {}, key=lambda p: (config.projections or {})[p])
    flags = {
        "DoRA": config.dora,
        f"{config.replicas} replicas": config.replicas > 1,
        f"biases: {config.bias}": config.bias != "none",
        "frozen factors saved": config.save_frozen,
        f"trained in full: {', '.join(config.modules_to_save or ())}": bool(config.modules_to_save),
    }
    return FolderReport(
        str(folder),
        f.name,
        tuple(str(rule.network) + ("" if rule.sites == "*" else f"  # {rule.sites}") for rule in f.lines),
        dict(f.ranks),
        f.scale,
        {label: start if isinstance(start, str) else "array" for label, start in f.init.items()},
        config.seed,
        named,
        tuple(name for name, on in flags.items() if on),
        len(config.layers or {}),
        trained,
        len(stored) - len(factors),
        file.stat().st_size,
        config.tokens,
        tuple(_place(p, config, factors, shapes.get(p)) for p in projections),
    )


def _card_sites(model: Model, named: bool) -> dict[str, tuple[int, int, int]]:
    """Features and heads of the model's projections; none where a recorded name tells nothing on this machine."""
    if named and not at_hand(model):
        return {}
    try:
        return {p.name: (p.out, p.inp, p.heads) for p in card(model).projections}
    except NetworkError:
        if not named:
            raise
        return {}


def _nets(f: Factorization) -> list[Network]:
    return [rule.network for rule in f.lines]


def _parsed(name: str) -> tuple[str, str, str, bool]:
    """Module, label, projection (of a shared factor, ``""`` for all) of a stored factor; True if its shapes vary."""
    home, _, key = name.rpartition(f".{PREFIX}factors.")
    found = _KEY.fullmatch(key)
    if not home or found is None:
        return name, "", "", False
    tags = [tag for tag in found["tags"].split("@") if tag and not (home == BANK and tag.isdigit())]
    base = home.rpartition(".")[2]
    own = f"{base}/{tags[0]}" if home != BANK and tags else base if home != BANK else "@".join(tags)
    return home, found["label"], own, found["shape"] is not None


def _place(
    projection: str, config: TensorNetworkConfig, factors: Stored, known: tuple[int, int, int] | None
) -> Place:
    """Sizes from the stored factors, then from the card; what is still open leaves the numbers out."""
    f, places = config.factorization, set[tuple[str, str]]()
    if f.square and known is not None:
        one = Site(0, projection, known[0], known[1]).squares()[0]
        known = (one.out, one.inp, 0)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in factors.items():
        home, label, own, varied = _parsed(name)
        part = own.partition("/")[2]
        paths = {own, own.partition("/")[0], home, f"{home}/{part}"} if home != BANK else {own, own.partition("/")[0]}
        mine = any(f".{path}".endswith(f".{projection}") for path in paths) or (home == BANK and not own)
        if mine and home != BANK:
            places.add((home, part))
        if mine and label and not varied and entry.shape is not None:
            shapes.setdefault(label, entry.shape)
    sites = len(places) or len(config.layers or {})
    for rule in f.lines:
        net = rule.network
        site = None if known is None else Site(0, projection, known[0], known[1], known[2])
        if site is not None and not rule.serves(site):
            continue
        sizes = _sizes(f, rule, shapes, known)
        if sizes is None:
            continue
        single = net.select(*(index for index in net.stack if index in ("layer", "proj")))
        out, inp = (prod(sizes[i] for i in group) for group in (net.rows, net.cols))
        if site is None and not rule.serves(Site(0, projection, out, inp)):
            continue
        best = plan(single, sizes, tokens=config.tokens)
        bound = rank_bound(single, {i: sizes[i] for i in single.indices})
        return Place(projection, sites, out, inp, bound, best.macs / config.tokens, best.saved / config.tokens)
    return Place(projection, sites, *((None, None) if known is None else known[:2]))


def _sizes(
    f: Factorization, rule: Any, shapes: Mapping[str, tuple[int, ...]], known: tuple[int, int, int] | None
) -> dict[str, int] | None:
    """The sizes of a line's indices, None if some stay open or the shapes are another line's."""
    net, found = rule.network, dict[str, int]()
    for factor in net.factors:
        indices = [index for index in factor.indices if index not in ("layer", "proj")]
        shape = shapes.get(net.label(factor))
        if shape is None:
            continue
        if len(shape) != len(indices):
            return None
        for index, size in zip(indices, shape, strict=True):
            if found.setdefault(index, size) != size:
                return None
    features = {} if known is None else {k: v for k, v in zip(("out", "inp", "heads"), known, strict=True) if v}
    try:
        sizes = {"layer": 1, "proj": 1, **f.sizes({**features, **found}, line=rule), **found}
        return integers(net, {index: sizes[index] for index in net.indices if index in sizes})
    except NetworkError:
        return None


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
