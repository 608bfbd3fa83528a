"""Regular expressions of a configuration: refused if matching them against a model's names could take for ever.

Python's matcher backtracks. Its steps are counted here before it runs, by dynamic programming over the parsed
expression: for every position in a name, the number of ways in which backtracking reaches it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from re import _compiler as compiler  # type: ignore[attr-defined]
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from tnpeft.networks.errors import ConfigError

MOST_TEXT = 2_000  # characters of an expression
_MOST_STEPS = 10**8  # of Python's matcher over all names: about a second
_MOST_WORK = 10**5  # of the counting for one name
_NUMBER = re.compile(r"\d+")
_Ways = dict[int, int]  # position in the name: in how many ways it is reached


class _Ambiguous(Exception):
    pass


def check_expression(field: str, pattern: str, names: Iterable[str]) -> None:
    """Raise if matching the expression against all the names could take more than about a second."""
    kinds = Counter(_NUMBER.sub("0", name) for name in names)  # layers differ in their numbers only
    try:
        parsed = parser.parse(pattern)
        steps, items = 0, dict[Any, re.Pattern[str]]()
        for name, count in kinds.items():
            steps += _Count(name, parsed, items).total * count
            if steps > _MOST_STEPS:
                raise _Ambiguous
    except (_Ambiguous, RecursionError):
        raise ConfigError(
            f"{field}={pattern[:80]!r} could match for ever: a repeat in it can take one name apart in too many ways",
            remedy="write it without a repeat inside a repeat, or give a list of names",
        ) from None


class _Count:
    """The steps of a backtracking match of one name (``total``); ``items`` are those that are compiled already."""

    def __init__(self, name: str, parsed: Any, items: dict[Any, re.Pattern[str]]) -> None:
        self.name, self.state, self.items = name, parsed.state, items
        self.work = self.total = 0
        self._through(parsed, {0: 1}, parsed.state.flags)

    def _through(self, items: Any, ways: _Ways, flags: int) -> _Ways:
        for kind, argument in items:
            if ways:
                ways = self._item(kind, argument, ways, flags)
        return ways

    def _item(self, kind: Any, argument: Any, ways: _Ways, flags: int) -> _Ways:
        self.work += len(ways)
        self.total += sum(ways.values())
        if self.work > _MOST_WORK or self.total > _MOST_STEPS:
            raise _Ambiguous
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return {
                at + 1: count
                for at, count in ways.items()
                if at < len(self.name) and self._takes(kind, argument, flags, self.name[at])
            }
        if kind is op.BRANCH:
            return _sum(self._through(branch, ways, flags) for branch in argument[1])
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
            return self._repeated(*argument, ways, flags)
        if kind is op.SUBPATTERN:
            _, added, taken, inner = argument
            return self._through(inner, ways, (flags | added) & ~taken)
        if kind is op.ATOMIC_GROUP:
            return self._through(argument, ways, flags)
        if kind in (op.ASSERT, op.ASSERT_NOT):  # they take nothing; behind is as much work as ahead
            self._through(argument[1], ways, flags)
            return ways
        if kind is op.AT:
            return ways  # as if it always held
        raise _Ambiguous  # a back reference or a condition

    def _repeated(self, least: int, most: int, items: Any, ways: _Ways, flags: int) -> _Ways:
        found: list[_Ways] = []
        for turn in range(min(most, least + len(self.name)) + 1):
            if turn >= least:
                found.append(ways)
            if turn == most or not ways:
                break
            before = ways
            if turn < least or items.getwidth()[0]:
                ways = self._through(items, before, flags)
            else:  # from the least number of turns on, the matcher takes none that moves nothing
                ways = _sum(
                    {to: n for to, n in self._through(items, {at: count}, flags).items() if to != at}
                    for at, count in before.items()
                )
            if ways == before:
                return ways if turn < least else _sum(found)
        return _sum(found)

    def _takes(self, kind: Any, argument: Any, flags: int, character: str) -> bool:
        """True if one item of the expression matches a character."""
        key = kind, str(argument), flags
        if key not in self.items:
            self.items[key] = compiler.compile(parser.SubPattern(self.state, [(kind, argument)]), flags)
        return self.items[key].match(character) is not None


def _sum(parts: Iterable[_Ways]) -> _Ways:
    total: Counter[int] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
