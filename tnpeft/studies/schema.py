"""The keys and the kinds of values that a table of settings may have: one check for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from math import inf
from typing import Any

from tnpeft.studies.files import StudyError

Kinds = Mapping[str, Any]
_NUMBER = float | int
_CALLED = {str: "string", int: "integer", _NUMBER: "number", bool: "switch", Mapping: "table", object: "value"}
_CALLED |= {str | Mapping: "names or table"}  # in lists
_ANNOTATED = {"str": str, "int": int, "float": _NUMBER, "bool": bool, "Mapping[str, str]": Mapping}
_ANNOTATED |= {"tuple[str, ...]": [str], "tuple[float, ...]": [_NUMBER]}


@cache
def kinds(cls: Any) -> Kinds:
    """Return the kinds of a dataclass's fields, by its annotations."""
    return {field.name: _ANNOTATED[str(field.type)] for field in fields(cls)}


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
            if kind is not object and isinstance(number, _NUMBER) and not 0 <= number < inf:
                raise StudyError(f"{key} = {value!r}", where=where, remedy="give finite numbers from 0 on")


def at_least(its: object, where: str, **least: int) -> None:
    """Refuse attributes that are below these numbers."""
    for name, low in least.items():
        if getattr(its, name) < low:
            raise StudyError(f"{name} = {getattr(its, name)}", where=where, remedy=f"give at least {low}")


def repeated(names: Sequence[str]) -> str | None:
    """Return the first of the names that stands there twice."""
    return next((name for name in names if names.count(name) > 1), None)
