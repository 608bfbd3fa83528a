"""The types that the fields of a configuration and of a stored network must have: files may hold anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from sys import float_info
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tnpeft.adapters.sites.selection import RESERVED
from tnpeft.adapters.storage.expressions import MOST_TEXT
from tnpeft.networks import ConfigError

Kinds = Mapping[str, tuple[Any, str]]  # fields, several with spaces between; the type of what fits, also in words

_BIAS = ("none", "all", "tensor_network_only")
_MOST = 2**63 - 1
_MOST_REPLICAS = 2**16
_DEEPEST = 64  # levels of lists and maps in a configuration, as many as torch's arrays have axes


def check_kinds(kinds: Kinds, get: Callable[[str], Any], told: str = "{} is {}") -> None:
    """Raise at the first field whose value is of another kind: it is named, with its value and what it may be."""
    for names, (kind, remedy) in kinds.items():
        for name in names.split():
            if not fits(value := get(name), kind):
                raise ConfigError(told.format(name, shown(value)), remedy=remedy)


_ITEMS: Mapping[Any, tuple[type, ...]] = {list: (list,), Sequence: (list, tuple), Collection: (list, tuple, set)}


def fits(value: Any, kind: Any) -> bool:
    """True if a value is of a type as annotations write it; what stands behind one in ``Annotated`` tests it further.

    A float is any finite number, and neither it nor an int is a bool; a sequence is a list or a tuple, a collection
    also a set.

    >>> [fits(value, Annotated[int, lambda number: number > 0] | None) for value in (1, None, 0, True, 1.0)]
    [True, True, False, False, False]
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, args[0]) and all(test(value) for test in args[1:])
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in args)
    if origin is Literal:
        return value in args
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if origin in _ITEMS:
        return isinstance(value, _ITEMS[origin]) and all(fits(item, args[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def check_fields(config: Any) -> None:
    """Raise at the first field of a :class:`tnpeft.TensorNetworkConfig` that is not what its annotation says."""
    kinds = get_type_hints(type(config), include_extras=True)
    remedies = {name: remedy for names, remedy in _REMEDIES.items() for name in names.split()}
    check_kinds({name: (kinds[name], remedy) for name, remedy in remedies.items()}, partial(getattr, config))


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


# ---- the fields of a configuration


def _is_pattern(value: str) -> bool:
    if not value or len(value) > MOST_TEXT:
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def counted(places: Mapping[str, int]) -> bool:
    """True if the values are the numbers from 0 on."""
    return [*range(len(places))] == sorted(places.values()) != []


Name = Annotated[str, bool]
Path = Annotated[str, re.compile(r"[\w\-]+(\.[\w\-]+)*").fullmatch]  # the end of one: PEFT reads it as an expression
Pattern = Annotated[str, _is_pattern]
Whole = Annotated[int, lambda value: 0 <= value <= _MOST]
Count = Annotated[int, lambda value: 1 <= value <= _MOST]
Replicas = Annotated[int, lambda value: 1 <= value <= _MOST_REPLICAS]
Positive = Annotated[float, lambda value: value > 0]
Share = Annotated[float, lambda value: 0 <= value < 1]
Bias = Annotated[str, _BIAS.__contains__]
Index = Annotated[str, str.isidentifier]
_REMEDIES = {  # several fields with spaces between, in the order in which they are checked
    "target_modules exclude_modules": "pass a list of names, a regular expression, or None",
    "layers_to_transform": "pass numbers of layers, from 0 on, or None",
    "layers_pattern": "pass names, or None",
    "modules_to_save": "pass a list of names, or None",
    "trainable_token_indices": "pass numbers of tokens, from 0 on, or such lists by the embedding's name, or None",
    "bias": f"use one of {', '.join(_BIAS)}",
    "dropout": "pass a number from 0 to below 1",
    "relative_step": "pass a positive number, such as 1e-2, or None",
    "stack": 'pass a map from stack indices to their sizes, {"scene": 24}, or None',
    "axes": 'pass a map from names of Parameters to their axes, {"kernel": "expert inp out"}, or None',
    "seed": "pass a whole number from 0 on, below 2**63",
    "tokens": "pass a whole number from 1 on, below 2**63",
    "replicas": f"pass a whole number from 1 to {_MOST_REPLICAS}",
    "replica_seeds": "pass a list of whole numbers from 0 on, or None",
    "replica_ranks": 'pass a list of ranks by bond, [{"r": 2}, {"r": 4}], or None',
    "replica_scales": "pass a list of finite numbers, or None",
    "auto_mapping": "pass a map, or None",
    "base_model_name_or_path revision peft_version": "pass text, or None",
    "save_frozen dora inference_mode": "pass True or False",
    "layers": "check the file: it is a map from paths to their places, from 0 on",
    "projections": "check the file: it is a map from names to their places, from 0 on",
    "embeddings": "pass names of weights, or None",
    "frozen": "check the file: it is a map from factors to hashes",
}
