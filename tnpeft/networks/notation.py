"""Text to network. A line is ``factors (+|- factors)* -> output``; printing a network gives it back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple
from unicodedata import normalize

from tnpeft.networks.errors import NetworkError
from tnpeft.networks.factor import PREFIX, Factor, Group, Kind, Term
from tnpeft.networks.network import Network

MAX_CHARACTERS = 20_000
_TOKEN = re.compile(r"\s+|->|[~^+\-\[\]()]|\w+|.", re.DOTALL)
_KIND: dict[str, Kind] = {prefix: kind for kind, prefix in PREFIX.items()}


_MULTILINEAR = "an adapter is multilinear: factors are multiplied and summed, no function is applied to them"
_ADVICE = {
    "*": "factors that stand side by side are multiplied: leave * out",
    "/": "a line has no division: put a number into scale=",
    "=": "sizes are passed apart from the line, as keywords or ranks",
    **dict.fromkeys("0123456789.", "a line holds no numbers: put a factor into scale=, leave an index of size 1 out"),
}


class _Token(NamedTuple):
    text: str
    position: int


def network(line: str) -> Network:
    """Parse one line of named einsum.

    ``Name[index ...]`` is a factor, ``~Name`` frozen random, ``^Name`` constant; ``(o1 o2)`` fuses indices
    row-major; terms join with ``+`` and ``-``. The last two output groups are rows and columns.

    Raises:
        NetworkError: the line is not a network; the message quotes it with a caret and says what to change.

    >>> net = network("B[layer proj out r] A[layer proj r inp] -> layer proj out inp")
    >>> net.bonds, net.stack, network(str(net)) == net
    (('r',), ('layer', 'proj'), True)
    """
    if not isinstance(line, str):
        raise NetworkError(
            f"a network is written as text, not as {type(line).__name__}",
            remedy='for example tnpeft.network("B[out r] A[r inp] -> out inp")',
        )
    if len(line) > MAX_CHARACTERS:
        raise NetworkError(
            f"the line has {len(line):,} characters, at most {MAX_CHARACTERS:,} are read",
            line=line[:200],
            remedy="a network is one line of factors; check that the right text was passed",
        )
    return _Parser(line).parse()


class _Parser:
    """Recursive descent without recursion: a cursor over tokens, one method per part of the grammar."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.tokens = [*self._scan(), _Token("", len(line))]
        self.at = 0

    def _scan(self) -> Iterator[_Token]:
        for match in _TOKEN.finditer(self.line):
            if not match.group().isspace():
                yield _Token(match.group(), match.start())

    def parse(self) -> Network:
        terms = [self._term(self._sign(first=True))]
        while self._peek() in ("+", "-"):
            terms.append(self._term(self._sign()))
        self._expect("->", "after the factors comes -> and the output")
        output = []
        while self._peek():
            output.append(self._group())
        return Network(tuple(terms), tuple(output))

    def _sign(self, first: bool = False) -> int:
        if self._peek() == "-" or (not first and self._peek() == "+"):
            return -1 if self._next() == "-" else 1
        return 1

    def _term(self, sign: int) -> Term:
        factors = [self._factor()]
        while self._peek() not in ("+", "-", "->", ""):
            factors.append(self._factor())
        return Term(tuple(factors), sign)

    def _factor(self) -> Factor:
        kind = _KIND[self._next() if self._peek() in ("~", "^") else ""]
        name = self._name("a factor, such as A[r inp]")
        self._expect(
            "[",
            _MULTILINEAR
            if self._peek() == "("
            else f"write the indices of {name!r} in brackets, such as {name}[out r]",
        )
        indices = []
        while self._peek() != "]":
            indices.append(self._name(f"an index, or ] to end factor {name!r}"))
        self._next()
        return Factor(name, tuple(indices), kind)

    def _group(self) -> Group:
        if self._peek() != "(":
            return (self._name("an output index or a group such as (o1 o2)"),)
        self._next()
        group = []
        while self._peek() != ")":
            group.append(self._name("an index, or ) to end the group (groups do not nest)"))
        self._next()
        return tuple(group)

    # ---- the cursor

    def _peek(self) -> str:
        return self.tokens[self.at].text

    def _next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1].text

    def _name(self, wanted: str) -> str:
        if not self._peek().isidentifier():
            self._fail(wanted)
        return normalize("NFKC", self._next())

    def _expect(self, text: str, remedy: str) -> None:
        if self._peek() != text:
            self._fail(repr(text), remedy)
        self._next()

    def _fail(self, wanted: str, remedy: str = "") -> None:
        token = self.tokens[self.at]
        found = f"{token.text[:20]!r}" if token.text else "the end of the line"
        hint = "indices are separated by blanks" if token.text == "," else remedy or _ADVICE.get(token.text[:1], "")
        raise NetworkError(f"expected {wanted}, found {found}", line=self.line, position=token.position, remedy=hint)
