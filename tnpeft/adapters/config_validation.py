"""The kinds that the fields of a configuration and of a stored network must have: files may hold anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from sys import float_info
from typing import Any

from tnpeft.adapters.sites.selection import RESERVED
from tnpeft.adapters.storage.expressions import MOST_TEXT
from tnpeft.networks import ConfigError

Fits = Callable[[Any], bool]
Kinds = Mapping[str, tuple[Fits, str]]  # fields, several with spaces between; what fits them, as code and in words

_BIAS = ("none", "all", "tensor_network_only")
_MOST = 2**63 - 1
_MOST_REPLICAS = 2**16
_DEEPEST = 64  # levels of lists and maps in a configuration, as many as torch's arrays have axes
_PATH = re.compile(r"[\w\-]+(\.[\w\-]+)*")


def check_kinds(kinds: Kinds, get: Callable[[str], Any], told: str = "{} is {}") -> None:
    """Raise at the first field whose value is of another kind: it is named, with its value and what it may be."""
    for names, (fits, remedy) in kinds.items():
        for name in names.split():
            if not fits(value := get(name)):
                raise ConfigError(told.format(name, shown(value)), remedy=remedy)


def check_fields(config: Any) -> None:
    """Raise at the first field of a :class:`tnpeft.TensorNetworkConfig` whose value is of another kind."""
    check_kinds(_FIELDS, partial(getattr, config))


def shown(value: Any) -> str:
    """The value as an error shows it: short, and text for whatever it is."""
    try:
        return str(value)[:80] or repr(value)
    except ValueError:  # Python writes no longer ones
        return "a number of more than 4,300 digits"


def check_depth(data: Any, where: str) -> None:
    """Raise if lists and maps are nested deeper than any configuration is; copying them would exhaust the stack."""
    level = [data]
    for _ in range(_DEEPEST):
        level = [
            item
            for value in level
            if isinstance(value, list | tuple | Mapping)
            for item in (value.values() if isinstance(value, Mapping) else value)
        ]
        if not level:
            return
    raise ConfigError(
        f"{where} is nested more than {_DEEPEST} levels deep", remedy="write its values as plain lists and maps"
    )


def check_replicas(config: Any) -> None:
    """Raise if the configuration asks of several replicas what only one adapter can do."""
    for name in ("replica_seeds", "replica_ranks", "replica_scales"):
        given = getattr(config, name, None)
        if given is not None and len(given) != config.replicas:
            raise ConfigError(
                f"{name} has {len(given)} entries for {config.replicas} replicas", remedy="give one for each, or None"
            )
        if given is not None and config.replicas == 1 and name != "replica_seeds":
            raise ConfigError(f"{name} is for several replicas", remedy="give the one adapter its own network")
    if config.replicas == 1:
        return
    asked = {
        "modules_to_save": bool(config.modules_to_save),
        "trainable_token_indices": config.trainable_token_indices is not None,
        "bias": config.bias != "none",
    }
    for field in (name for name, there in asked.items() if there):
        raise ConfigError(
            f"{config.replicas} replicas would share what {field} trains",
            remedy=f"train without {field} (score label words instead of a new head), or one adapter at a time",
        )
    if config.dora:
        raise ConfigError("replicas have no magnitudes", remedy="train with dora one adapter at a time")


def check_stack(stack: Mapping[str, int] | None, config: Any) -> None:
    """Raise unless a configuration's lines carry the stack indices that it declares, and it has one update only."""
    if not stack:
        return
    lines = [rule.network for rule in config.factorization.lines]
    for index in stack:
        if index in RESERVED:
            raise ConfigError(f"stack names {index!r}, which a model gives its size", remedy="leave it out of stack")
        if not any(index in line.stack for line in lines):
            raise ConfigError(
                f"stack declares {index!r}, which no line has among its stack indices",
                line=str(lines[0]),
                remedy=f"write it before the rows in the output, such as {index} out inp, or leave it out of stack",
            )
    if config.dora:
        raise ConfigError(
            "a magnitude belongs to one update, and a stack index has several",
            remedy="leave out dora, or attach one adapter for each value",
        )
    if config.replicas > 1:
        raise ConfigError(
            "replicas of a named stack cannot be told apart in one batch", remedy="leave out replicas or stack"
        )


# ---- kinds


def or_none(fits: Fits) -> Fits:
    """Also None."""
    return lambda value: value is None or fits(value)


def of_type(*types: type) -> Fits:
    """A value of one of some types."""
    return lambda value: isinstance(value, types)


def list_of(fits: Fits, *types: type) -> Fits:
    """A list, a tuple or a set (or one of some types) of what fits."""
    return lambda value: isinstance(value, types or (list, tuple, set)) and all(map(fits, value))


def map_of(name: Fits, fits: Fits) -> Fits:
    """A map of what fits."""
    return lambda value: isinstance(value, Mapping) and all(map(name, value)) and all(map(fits, value.values()))


text, truth = of_type(str), of_type(bool)


def number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max


def _whole(least: int = 0, most: int = _MOST) -> Fits:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _pattern(value: Any) -> bool:
    if not _name(value) or len(value) > MOST_TEXT:
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _path(value: Any) -> bool:
    """True for the end of a module's path: PEFT reads some of these as regular expressions."""
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


def _places(name: Fits) -> Fits:
    """A map from names to the numbers from 0 on; that of a model itself, which may be a layer as well, is empty."""
    return lambda value: bool(map_of(name, _whole())(value) and [*range(len(value))] == sorted(value.values()) != [])


_ranks = map_of(_name, _whole(1))
_wholes = list_of(_whole())
_FIELDS: Kinds = {
    "target_modules exclude_modules": (
        or_none(lambda value: list_of(_name)(value) or _pattern(value)),
        "pass a list of names, a regular expression, or None",
    ),
    "layers_to_transform": (
        or_none(lambda value: _whole()(value) or _wholes(value)),
        "pass numbers of layers, from 0 on, or None",
    ),
    "layers_pattern": (
        or_none(lambda value: value == "" or _path(value) or list_of(_path)(value)),
        "pass names, or None",
    ),
    "modules_to_save": (or_none(list_of(_path)), "pass a list of names, or None"),
    "trainable_token_indices": (
        or_none(lambda value: _wholes(value) or map_of(_path, _wholes)(value)),
        "pass numbers of tokens, from 0 on, or such lists by the embedding's name, or None",
    ),
    "bias": (lambda value: value in _BIAS, f"use one of {', '.join(_BIAS)}"),
    "dropout": (lambda value: number(value) and 0 <= value < 1, "pass a number from 0 to below 1"),
    "relative_step": (
        or_none(lambda value: number(value) and value > 0),
        "pass a positive number, such as 1e-2, or None",
    ),
    "stack": (
        or_none(map_of(lambda name: text(name) and name.isidentifier(), _whole(1))),
        'pass a map from stack indices to their sizes, {"scene": 24}, or None',
    ),
    "axes": (
        or_none(map_of(of_type(object), text)),
        'pass a map from names of Parameters to their axes, {"kernel": "expert inp out"}, or None',
    ),
    "seed": (_whole(), "pass a whole number from 0 on, below 2**63"),
    "tokens": (_whole(1), "pass a whole number from 1 on, below 2**63"),
    "replicas": (_whole(1, _MOST_REPLICAS), f"pass a whole number from 1 to {_MOST_REPLICAS}"),
    "replica_seeds": (
        or_none(list_of(_whole(), list, tuple)),
        "pass a list of whole numbers from 0 on, or None",
    ),
    "replica_ranks": (
        or_none(list_of(_ranks, list, tuple)),
        'pass a list of ranks by bond, [{"r": 2}, {"r": 4}], or None',
    ),
    "replica_scales": (or_none(list_of(number, list, tuple)), "pass a list of finite numbers, or None"),
    "auto_mapping": (or_none(of_type(Mapping)), "pass a map, or None"),
    "base_model_name_or_path revision peft_version": (or_none(text), "pass text, or None"),
    "save_frozen dora inference_mode": (truth, "pass True or False"),
    "layers": (or_none(_places(text)), "check the file: it is a map from paths to their places, from 0 on"),
    "projections": (or_none(_places(_name)), "check the file: it is a map from names to their places, from 0 on"),
    "embeddings": (or_none(list_of(text, list)), "pass names of weights, or None"),
    "frozen": (or_none(map_of(_name, _name)), "check the file: it is a map from factors to hashes"),
}
