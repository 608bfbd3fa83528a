"""The keys and the kinds of values that a table of settings may have: one check for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from math import inf
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tnpeft.studies.files import StudyError

Kinds = Mapping[str, Any]
NUMBER = float | int
_CALLED = {str: "string", int: "integer", NUMBER: "number", bool: "switch", Mapping: "table", object: "value"}
_CALLED |= {str | Mapping: "names or table"}  # in lists


@cache
def kinds(cls: Any) -> Kinds:
    """Return the kinds of a dataclass's fields, by its annotations."""
    return {name: _kind(hint) for name, hint in get_type_hints(cls).items()}


def _kind(hint: Any) -> Any:
    origin = get_origin(hint)
    if origin is Literal:
        return get_args(hint)
    return [_kind(get_args(hint)[0])] if origin is tuple else NUMBER if hint is float else origin or hint


def fits(value: Any, kind: Any) -> bool:
    """Return True if a value is of a kind: a type, ``[type]`` for a list or tuple, or a tuple of words, of which it
    is one. A switch is not a number.

    >>> fits([1, 2], [int]), fits(True, int), fits("1", int), fits("loss", ("loss", "metric"))
    (True, False, False, True)
    """
    if isinstance(kind, tuple):
        return value in kind
    if isinstance(kind, list):
        return isinstance(value, list | tuple) and all(fits(item, kind[0]) for item in value)
    return isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))


def check(table: Mapping[str, Any], known: Kinds, where: str, part: str = "") -> None:
    """Refuse unknown keys, values of the wrong kind, unknown words, and numbers that are negative or not finite.

    ``where`` is the place, for errors, and ``part`` what the table is in it, such as ``"a method"``.

    >>> check({"steps": 5, "choose": "loss"}, {"steps": int, "tasks": [str], "choose": ("loss", "metric")}, "a study")
    """
    unknown = sorted(set(table) - set(known))
    if unknown:
        problem = f"unknown key {unknown[0]!r}{f' in {part}' if part else ''}"
        raise StudyError(problem, where=where, remedy=f"the keys are {', '.join(known)}")
    where = f"{where}, {part}" if part else where
    for key, value in table.items():
        kind = known[key]
        if not fits(value, kind):
            if isinstance(kind, tuple):
                raise StudyError(f"{key} = {value!r} is unknown", where=where, remedy=f"use one of {', '.join(kind)}")
            called = f"list of {_CALLED[kind[0]]}s" if isinstance(kind, list) else _CALLED[kind]
            called = f"an {called}" if called[0] in "aeiou" else f"a {called}"
            raise StudyError(f"{key} = {value!r} is not {called}", where=where, remedy=f"give {called}")
        for number in value if isinstance(kind, list) else (value,):
            if kind is not object and isinstance(number, NUMBER) and not 0 <= number < inf:
                raise StudyError(f"{key} = {value!r}", where=where, remedy="give finite numbers from 0 on")


def build(cls: type[Any], table: Mapping[str, Any], where: str) -> Any:
    """Return the dataclass that a table describes.

    Raises:
        StudyError: a key is unknown or missing, or a value has the wrong kind.
    """
    check(table, kinds(cls), where)
    for field in fields(cls):
        if field.name not in table and field.default is MISSING:
            raise StudyError(f"no {field.name}", where=where, remedy=f"see tnpeft.studies.{cls.__name__}")
    converted = {
        name: float(value) if kinds(cls)[name] == NUMBER else tuple(value) if isinstance(value, list) else value
        for name, value in table.items()
    }
    return cls(**converted)


def at_least(its: object, where: str, **least: int) -> None:
    """Refuse attributes that are below these numbers."""
    for name, low in least.items():
        if getattr(its, name) < low:
            raise StudyError(f"{name} = {getattr(its, name)}", where=where, remedy=f"give at least {low}")


def repeated(names: Sequence[str]) -> str | None:
    """Return the first of the names that stands there twice."""
    return next((name for name in names if names.count(name) > 1), None)
