"""Regular expressions of a configuration: refused if matching them against a model's names could take for ever.

Python's matcher backtracks. Its steps are counted here before it runs, by dynamic programming over the parsed
expression: for every position in a name, the number of ways in which backtracking reaches it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
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
        steps = 0
        for name, count in kinds.items():
            steps += _Count(name, bool(parsed.state.flags & re.IGNORECASE)).steps(parsed) * count
            if steps > _MOST_STEPS:
                raise _Ambiguous
    except (_Ambiguous, RecursionError):
        raise ConfigError(
            f"{field}={pattern[:80]!r} could match for ever: a repeat in it can take one name apart in too many ways",
            remedy="write it without a repeat inside a repeat, or give a list of names",
        ) from None


class _Count:
    """The steps of a backtracking match of one name."""

    def __init__(self, name: str, folded: bool) -> None:
        self.name, self.folded = name.lower() if folded else name, folded
        self.work = self.total = 0

    def steps(self, parsed: Any) -> int:
        self._through(parsed, {0: 1})
        return self.total

    def _through(self, items: Any, ways: _Ways) -> _Ways:
        for kind, argument in items:
            if not ways:
                break
            ways = self._item(kind, argument, ways)
        return ways

    def _item(self, kind: Any, argument: Any, ways: _Ways) -> _Ways:
        self.work += len(ways)
        self.total += sum(ways.values())
        if self.work > _MOST_WORK or self.total > _MOST_STEPS:
            raise _Ambiguous
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return {
                at + 1: count
                for at, count in ways.items()
                if at < len(self.name) and self._takes(kind, argument, self.name[at])
            }
        if kind is op.BRANCH:
            return _sum(self._through(branch, ways) for branch in argument[1])
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
            return self._repeated(*argument, ways)
        if kind is op.SUBPATTERN:
            return self._through(argument[-1], ways)
        if kind is op.ATOMIC_GROUP:
            return self._through(argument, ways)
        if kind in (op.ASSERT, op.ASSERT_NOT):  # they take nothing; behind is as much work as ahead
            self._through(argument[1], ways)
            return ways
        if kind is op.AT:
            return ways  # as if it always held
        raise _Ambiguous  # a back reference or a condition

    def _repeated(self, least: int, most: int, items: Any, ways: _Ways) -> _Ways:
        found: list[_Ways] = []
        for turn in range(min(most, least + len(self.name)) + 1):
            if turn >= least:
                found.append(ways)
            if turn == most or not ways:
                break
            before = ways
            if turn < least or items.getwidth()[0]:
                ways = self._through(items, before)
            else:  # from the least number of turns on, the matcher takes none that moves nothing
                ways = _sum(
                    {to: n for to, n in self._through(items, {at: count}).items() if to != at}
                    for at, count in before.items()
                )
            if ways == before:
                return ways if turn < least else _sum(found)
        return _sum(found)

    def _takes(self, kind: Any, argument: Any, character: str) -> bool:
        if kind is op.ANY:
            return True
        if kind is op.IN:
            return self._among(argument, character)
        same = bool(character == (chr(argument).lower() if self.folded else chr(argument)))
        return same is (kind is op.LITERAL)

    def _among(self, items: Any, character: str) -> bool:
        return True if self.folded else _listed(items, character)


def _listed(items: Any, character: str) -> bool:
    negated, found = False, False
    for kind, argument in items:
        if kind is op.NEGATE:
            negated = True
        elif kind is op.LITERAL:
            found |= character == chr(argument)
        elif kind is op.RANGE:
            found |= argument[0] <= ord(character) <= argument[1]
        else:
            found |= bool(_CATEGORIES[argument].fullmatch(character))
    return found is not negated


_CATEGORIES = {
    op.CATEGORY_DIGIT: re.compile(r"\d"),
    op.CATEGORY_NOT_DIGIT: re.compile(r"\D"),
    op.CATEGORY_SPACE: re.compile(r"\s"),
    op.CATEGORY_NOT_SPACE: re.compile(r"\S"),
    op.CATEGORY_WORD: re.compile(r"\w"),
    op.CATEGORY_NOT_WORD: re.compile(r"\W"),
}


def _sum(parts: Iterable[_Ways]) -> _Ways:
    total: Counter[int] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
