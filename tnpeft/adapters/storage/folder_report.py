"""An adapter's folder explained without its model: the network, where it sits, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from peft.utils.constants import CONFIG_NAME

from tnpeft._text import Printed, Table
from tnpeft.adapters.config import TensorNetworkConfig
from tnpeft.adapters.constants import PREFIX
from tnpeft.adapters.storage.files import fetch, file_in
from tnpeft.adapters.storage.stored_sites import StoredFactors, base_card, label_of
from tnpeft.counting.cuts import rank_bound
from tnpeft.models.cards import Model
from tnpeft.networks import AdapterFileError, Site
from tnpeft.planning.planner import plan


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
class FolderReport(Printed):
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

    def _parts(self) -> tuple[Table, str, Table]:
        return self._facts(), "", self._table()

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def _facts(self) -> Table:
        facts = {
            "folder": self.folder,
            "family": self.name,
            "line": " ; ".join(self.lines),
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
        return Table(head, tuple(rows), "<>", rule=True)


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
    ours = {name: entry for name, entry in stored.items() if f".{PREFIX}" in f".{name}"}
    frozen = {rule.network.label(a) for rule in f.lines for a in rule.network.factors if a.kind == "frozen"}
    factors = StoredFactors(config, ours)
    named = config.base_model_name_or_path or ""
    base = base_card(model, named)
    shapes = {p.name: {"out": p.out, "inp": p.inp, "heads": p.heads} for p in base.projections} if base else {}
    places = config.projections or {}
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
        sum(prod(entry.shape or ()) for name, entry in ours.items() if label_of(name) not in frozen),
        len(stored) - len(ours),
        file.stat().st_size,
        config.tokens,
        tuple(_place(p, config, factors, shapes.get(p, {})) for p in sorted(places, key=places.__getitem__)),
    )


def _place(projection: str, config: TensorNetworkConfig, factors: StoredFactors, known: dict[str, int]) -> Place:
    """One projection, by the first of its sites; numbers that nothing tells are left out."""
    if config.factorization.square and known:
        square = Site(0, projection, known["out"], known["inp"]).squares()[0]
        known = {"out": square.out, "inp": square.inp}
    homes = {home: factors.place(*home) for home in factors.homes}
    own = [(*home, place[0]) for home, place in homes.items() if place is not None and place[1] == projection]
    home, part, layer = own[0] if own else ("", "", 0)
    sites = len(own) or len(config.layers or {})
    found = factors.site(home, part, layer, projection, {name: size for name, size in known.items() if size})
    if found is None:
        return Place(projection, sites, known.get("out"), known.get("inp"))
    net, tokens = found.network, config.tokens
    best, bound = plan(net, found.sizes, tokens=tokens), rank_bound(net, {i: found.sizes[i] for i in net.indices})
    return Place(projection, sites, found.site.out, found.site.inp, bound, best.macs / tokens, best.saved / tokens)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
