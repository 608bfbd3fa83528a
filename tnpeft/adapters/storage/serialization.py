"""A factorization as plain data, the form in which files keep it, and back, with every value checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from tnpeft import families
from tnpeft.adapters.config_validation import Kinds, check_kinds, fits, shown
from tnpeft.networks import ConfigError, Factorization, Network, SiteRule, network

SCHEMA = 1  # of what `lower` writes; a reader refuses any other
_LARGEST = 1e30  # of a scale: fp32 holds it, and products of it with what a model computes
_MOST_TEXT = 20_000  # characters of a line in a file, as many as a chain of a thousand factors has
_MOST_LINES = 1_000
_Table = Mapping[str, object]
_FIELDS: Kinds = {  # the types of the fields of a factorization, and in words what to pass for them
    "ranks": (_Table, 'pass a map from bonds to sizes, {"r": 8}'),
    "splits": (Mapping[str, list | tuple], 'pass a map from sides to lists of sizes, {"out": (32, None)}'),
    "init": (_Table, 'pass a map from factors to starts, {"B": "zeros"}'),
    "scale": (float, "pass a finite number"),
    "unit_norm": (Sequence[str], "pass a list of factors' names"),
    "lr_multiplier": (_Table, 'pass a map from factors to numbers, {"G": 16}'),
    "square": (bool, "pass True or False"),
}
_MAPS = ("ranks", "splits", "init", "lr_multiplier")
_CHECK = "check the file"
_Line = Annotated[
    Mapping[Literal["network", "sites"], str],
    lambda line: len(line) == 2 and len(line["network"]) <= _MOST_TEXT,
]
_STORED: Kinds = {  # the types of the entries of what `lower` writes, besides the schema
    "lines": (Annotated[list[_Line], lambda lines: 0 < len(lines) <= _MOST_LINES], _CHECK),
    "name source": (str, _CHECK),
    **{name: (kind | None if name in _MAPS else kind, _CHECK) for name, (kind, _) in _FIELDS.items()},
}


def factorization(given: Any, **changes: Any) -> Factorization:
    """The factorization that a family's name, a line, a network or plain data stands for, with fields changed.

    ``ranks``, ``splits``, ``init`` and ``lr_multiplier`` add to what is given; the other fields replace it. A change
    that is None is none.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    check_kinds({name: kind for name, kind in _FIELDS.items() if name in changes}, changes.get)
    if "splits" in changes:
        changes["splits"] = {side: tuple(parts) for side, parts in changes["splits"].items()}
    if isinstance(given, str) and "->" in given:
        given = network(given)
    if isinstance(given, Network):
        return _checked(Factorization.of(given, **changes))
    if isinstance(given, str):
        given = families.get(given)()
    if isinstance(given, Mapping):
        given = _raised(given)
    if not isinstance(given, Factorization):
        raise ConfigError(
            f"network= is {type(given).__name__}",
            remedy="pass a Factorization such as tnpeft.families.lora(rank=8), a family's name, or a line of einsum",
        )
    for name in _MAPS:
        if name in changes:
            changes[name] = {**getattr(given, name), **changes[name]}
    return _checked(replace(given, **changes))


def lower(f: Factorization) -> dict[str, Any]:
    """The factorization as text, numbers, lists and dicts: what ``json.dumps`` takes."""
    return {
        "schema": SCHEMA,
        "name": f.name,
        "lines": [{"network": str(line.network), "sites": line.sites} for line in f.lines],
        "ranks": dict(f.ranks),
        "splits": {side: list(parts) for side, parts in f.splits.items()},
        "init": {label: its if isinstance(its, str | list) else its.tolist() for label, its in f.init.items()},
        "scale": float(f.scale),
        "unit_norm": list(f.unit_norm),
        "lr_multiplier": {label: float(value) for label, value in f.lr_multiplier.items()},
        "square": bool(f.square),
        "source": f.source,
    }


def with_rank_pattern(f: Factorization, pattern: Mapping[str, Mapping[str, int]]) -> Factorization:
    """The factorization with other ranks at some projections: ``{"v_proj": {"r": 4}}``, globs as in ``SiteRule``.

    Each entry becomes a line of its own in which the bonds of another rank carry the entry's number. A factor that
    both lines share is stored once for each of its shapes.
    """
    if not fits(pattern, _Table):
        raise ConfigError(
            f"rank_pattern is {shown(pattern)}", remedy="name projections and bonds: {'v_proj': {'r': 4}}"
        )
    lines: list[SiteRule] = []
    ranks = dict(f.ranks)
    for k, (sites, changed) in enumerate(pattern.items(), start=1):
        if not isinstance(changed, Mapping):
            raise ConfigError(
                f"the rank pattern of {sites!r} is {changed!r}", remedy="name the bond: {'v_proj': {'r': 4}}"
            )
        for line in f.lines:
            if line.sites != "*":
                raise ConfigError(
                    f"{f.name!r} has lines for some sites only, and takes no rank pattern",
                    remedy="give its lines their ranks in the factorization itself",
                )
            for bond in changed:
                if bond not in line.network.bonds:
                    raise ConfigError(
                        f"the rank pattern of {sites!r} names {bond!r}, which is not a bond",
                        line=str(line.network),
                        remedy=f"its bonds are {', '.join(line.network.bonds)}",
                    )
            names = {bond: f"{bond}_{k}" for bond, rank in changed.items() if rank != f.ranks.get(bond)}
            ranks |= {names[bond]: changed[bond] for bond in names}
            lines.append(SiteRule(line.network.rename(names), sites))
    return replace(f, lines=(*lines, *f.lines), ranks=ranks)


def _raised(data: Mapping[str, Any]) -> Factorization:
    schema = data.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        newer = type(schema) is int and schema > SCHEMA
        raise ConfigError(
            f"the adapter's network is written in schema {schema!r}; this tnpeft reads schema {SCHEMA}",
            remedy="upgrade tnpeft" if newer else "save the adapter again with a tnpeft that can load it",
        )
    fields = " ".join(_STORED).split()
    unknown = sorted({*map(str, data)} - {"schema", *fields})
    if unknown:
        raise ConfigError(f"the adapter's network has an unknown entry {unknown[0]!r}", remedy=_CHECK)
    check_kinds(_STORED, data.get, "the adapter's network has {}={!r}")
    its = {name: data[name] for name in fields if data.get(name) is not None}
    its["lines"] = tuple(SiteRule(network(line["network"]), line["sites"]) for line in data["lines"])
    its["splits"] = {side: tuple(parts) for side, parts in its.get("splits", {}).items()}
    return Factorization(**its)


def _checked(f: Factorization) -> Factorization:
    """The factorization, once its numbers are known to be finite numbers."""
    for name, value in {"scale": f.scale, **f.lr_multiplier}.items():
        if not fits(value, float) or abs(value) > _LARGEST:
            raise ConfigError(f"{name} is {shown(value)}", remedy=f"pass a number of at most {_LARGEST:g}")
    if f.scale == 0:
        raise ConfigError("scale is 0: the update would be zero for ever", remedy="pass another number")
    if abs(f.scale) < 1 / _LARGEST:
        raise ConfigError(f"scale is {f.scale}: the update would be zero", remedy="pass a larger number")
    for label, rate in f.lr_multiplier.items():
        if rate < 0:
            raise ConfigError(f"the learning rate of {label!r} is multiplied by {rate}", remedy="pass 0 or more")
    for label, start in f.init.items():
        if not isinstance(start, str | list) and not hasattr(start, "tolist"):
            raise ConfigError(f"init[{label!r}] is {start!r}", remedy="pass the name of a start, or an array")
    for side, parts in f.splits.items():
        if not all(part is None or isinstance(part, int | str) for part in parts):
            raise ConfigError(f"splits[{side!r}] is {parts!r}", remedy="pass whole numbers, None, or rules as text")
    return f
