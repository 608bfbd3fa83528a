"""The kinds that a configuration's fields must have: files may hold anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from sys import float_info
from typing import Any

from tnpeft.adapters.storage.expressions import MOST_TEXT
from tnpeft.networks import ConfigError

_BIAS = ("none", "all", "tensor_network_only")
_MOST = 2**63 - 1
_MOST_REPLICAS = 2**16
_DEEPEST = 64  # levels of lists and maps in a configuration, as many as torch's arrays have axes
_PATH = re.compile(r"[\w\-]+(\.[\w\-]+)*")


def check_fields(config: Any) -> None:
    """Raise at the first field of a :class:`tnpeft.TensorNetworkConfig` whose value is of another kind."""
    for kind, (fits, remedy) in _KINDS.items():
        for name in kind.split():
            value = getattr(config, name)
            if not fits(value):
                raise ConfigError(f"{name} is {shown(value)}", remedy=remedy)


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
    for field, idle in (
        ("modules_to_save", not config.modules_to_save),
        ("trainable_token_indices", config.trainable_token_indices is None),
        ("bias", config.bias == "none"),
    ):
        if not idle:
            raise ConfigError(
                f"{config.replicas} replicas would share what {field} trains",
                remedy=f"train without {field} (score label words instead of a new head), or one adapter at a time",
            )
    if config.dora:
        raise ConfigError("replicas have no magnitudes", remedy="train with dora one adapter at a time")


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max


def _ranks(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_name, value)) and all(_whole(rank, 1) for rank in value.values())


def _listed(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple | set) and all(fits(item) for item in value)


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


def _modules(value: Any) -> bool:
    return value is None or _listed(value, _name) or _pattern(value)


def _order(value: Any) -> bool:
    """A map from names to the numbers from 0 on."""
    return value is None or (_places(value) and all(value))


def _places(value: Any) -> bool:
    """The same of paths: that of the model itself, whose own linears are a layer as well, is empty."""
    if value is None:
        return True
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    return bool(value) and all(map(_whole, value.values())) and sorted(value.values()) == [*range(len(value))]


def _texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_name, (*value, *value.values())))


def _one_of(choices: Collection[Any]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, f"use one of {', '.join(map(str, choices))}"


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "target_modules exclude_modules": (_modules, "pass a list of names, a regular expression, or None"),
    "layers_to_transform": (
        lambda value: value is None or _whole(value) or _listed(value, _whole),
        "pass numbers of layers, from 0 on, or None",
    ),
    "layers_pattern": (
        lambda value: value in (None, "") or _path(value) or _listed(value, _path),
        "pass names, or None",
    ),
    "modules_to_save": (lambda value: value is None or _listed(value, _path), "pass a list of names, or None"),
    "trainable_token_indices": (
        lambda value: (
            value is None
            or _listed(value, _whole)
            or (isinstance(value, Mapping) and all(_path(n) and _listed(v, _whole) for n, v in value.items()))
        ),
        "pass numbers of tokens, from 0 on, or such lists by the embedding's name, or None",
    ),
    "bias": _one_of(_BIAS),
    "dropout": (
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1,
        "pass a number from 0 to below 1",
    ),
    "relative_step": (
        lambda value: value is None or (_finite(value) and value > 0),
        "pass a positive number, such as 1e-2, or None",
    ),
    "stack": (
        lambda value: value is None or (_ranks(value) and all(name.isidentifier() for name in value)),
        'pass a map from stack indices to their sizes, {"scene": 24}, or None',
    ),
    "axes": (
        lambda value: (
            value is None or (isinstance(value, Mapping) and all(isinstance(a, str) for a in value.values()))
        ),
        'pass a map from names of Parameters to their axes, {"kernel": "expert inp out"}, or None',
    ),
    "seed": (_whole, "pass a whole number from 0 on, below 2**63"),
    "tokens": (lambda value: _whole(value, 1), "pass a whole number from 1 on, below 2**63"),
    "replicas": (
        lambda value: _whole(value, 1) and value <= _MOST_REPLICAS,
        f"pass a whole number from 1 to {_MOST_REPLICAS}",
    ),
    "replica_seeds": (
        lambda value: value is None or (isinstance(value, list | tuple) and _listed(value, _whole)),
        "pass a list of whole numbers from 0 on, or None",
    ),
    "replica_ranks": (
        lambda value: value is None or (isinstance(value, list | tuple) and _listed(value, _ranks)),
        'pass a list of ranks by bond, [{"r": 2}, {"r": 4}], or None',
    ),
    "replica_scales": (
        lambda value: value is None or (isinstance(value, list | tuple) and _listed(value, _finite)),
        "pass a list of finite numbers, or None",
    ),
    "auto_mapping": (lambda value: value is None or isinstance(value, Mapping), "pass a map, or None"),
    "base_model_name_or_path revision peft_version": (
        lambda value: value is None or isinstance(value, str),
        "pass text, or None",
    ),
    "save_frozen dora inference_mode": (lambda value: isinstance(value, bool), "pass True or False"),
    "layers": (_places, "check the file: it is a map from paths to their places, from 0 on"),
    "projections": (_order, "check the file: it is a map from names to their places, from 0 on"),
    "embeddings": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value)),
        "pass names of weights, or None",
    ),
    "frozen": (lambda value: value is None or _texts(value), "check the file: it is a map from factors to hashes"),
}
