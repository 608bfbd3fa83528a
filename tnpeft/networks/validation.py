"""What makes a line no contraction, and where in the line it stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from unicodedata import normalize

from tnpeft.networks.factor import PREFIX, RESERVED, Factor

if TYPE_CHECKING:
    from tnpeft.networks.network import Network

# ---- the line as text, with what each token of it is (so that an error can point at it)

Focus = tuple[str, int, int, int]  # ("factor" or "index" or "output", term, factor or group, slot)


def tokens_of(net: Network) -> Iterator[tuple[str, Focus]]:
    """The line in tokens_of, each with what it is.

    >>> from tnpeft.networks import network
    >>> [text for text, what in tokens_of(network("A[out inp] -> out inp")) if what[0] == "index"]
    ['out', 'inp']
    """
    for t, term in enumerate(net.terms):
        if t or term.sign < 0:
            yield (" " if t else "") + ("- " if term.sign < 0 else "+ "), ("sign", t, 0, 0)
        for f, factor in enumerate(term.factors):
            if f:
                yield " ", ("space", t, f, 0)
            yield PREFIX[factor.kind] + factor.name, ("factor", t, f, 0)
            yield "[", ("space", t, f, 0)
            for k, index in enumerate(factor.indices):
                if k:
                    yield " ", ("space", t, f, k)
                yield index, ("index", t, f, k)
            yield "]", ("space", t, f, 0)
    yield " ->", ("arrow", 0, 0, 0)
    for g, group in enumerate(net.output):
        yield (" " if len(group) == 1 else " ("), ("space", 0, g, 0)
        for k, index in enumerate(group):
            if k:
                yield " ", ("space", 0, g, k)
            yield index, ("output", 0, g, k)
        if len(group) != 1:
            yield ")", ("space", 0, g, 0)


def position_of(net: Network, focus: Focus) -> tuple[str, int | None]:
    """The whole line and where in it something stands; None if it does not.

    >>> from tnpeft.networks import network
    >>> position_of(network("A[out inp] -> out inp"), ("output", 0, 1, 0))
    ('A[out inp] -> out inp', 18)
    """
    text, position = "", None
    for token, what in tokens_of(net):
        if what == focus:
            position = len(text)
        text += token
    return text, position


# ---- what makes a line no contraction

Fault = tuple[Focus, str, str]


def find_errors(net: Network) -> Iterator[Fault]:
    """What makes a network no contraction: where, what, and the remedy.

    >>> from tnpeft.networks import network
    >>> list(find_errors(network("A[out inp] -> out inp")))
    []
    """
    yield from _name_faults(net)
    yield from _factor_faults(net)
    yield from _output_faults(net)
    yield from _lone_faults(net)


def _name_faults(net: Network) -> Iterator[Fault]:
    if not net.terms or not all(term.factors for term in net.terms):
        yield ("arrow", 0, 0, 0), "a term without factors", "write at least one factor, such as A[out inp]"
    for t, term in enumerate(net.terms):
        for f, factor in enumerate(term.factors):
            if not _is_name(factor.name):
                yield ("factor", t, f, 0), f"{factor.name!r} is not a name", "use letters, digits and _"
            for k, index in enumerate(factor.indices):
                if not _is_name(index):
                    yield ("index", t, f, k), f"{index!r} is not a name", "use letters, digits and _"
                if index in RESERVED:
                    yield (
                        ("index", t, f, k),
                        f"{index!r} is a reserved word",
                        "choose another name for this index",
                    )
                if index in factor.indices[:k]:
                    yield (
                        ("index", t, f, k),
                        f"index {index!r} is repeated in factor {factor.name!r}",
                        "a factor carries an index once; give one of the two axes another name",
                    )


def _is_name(text: str) -> bool:
    """True if the text is an identifier in the Unicode form (NFKC) in which Python hands keywords on."""
    return text.isidentifier() and normalize("NFKC", text) == text


def _factor_faults(net: Network) -> Iterator[Fault]:
    first: dict[str, tuple[int, Factor]] = {}
    for t, term in enumerate(net.terms):
        for f, factor in enumerate(term.factors):
            before, other = first.setdefault(factor.name, (t, factor))
            kinds = {factor.kind, other.kind}
            if len(factor.indices) != len(other.indices):
                yield (
                    ("factor", t, f, 0),
                    f"factor {factor.name!r} stands here with {len(factor.indices)} indices and before with "
                    f"{len(other.indices)}",
                    "a name that stands twice is one factor; give one of them another name",
                )
            elif len(kinds) > 1 and (kinds != {"trainable", "frozen"} or t == before):
                yield (
                    ("factor", t, f, 0),
                    f"factor {factor.name!r} is {factor.kind} here and {other.kind} before",
                    "give one of them another name (~G beside G in another term is G's frozen start value)",
                )


def _output_faults(net: Network) -> Iterator[Fault]:
    seen: set[str] = set()
    stack = set(net.stack)
    places = [set(term.places()) for term in net.terms]
    for g, group in enumerate(net.output):
        for k, index in enumerate(group):
            carried = [index in place for place in places]
            where: Focus = ("output", 0, g, k)
            if not _is_name(index) or index in RESERVED:
                yield (
                    where,
                    f"{index!r} cannot be an index",
                    "use letters, digits and _, and no reserved word",
                )
            elif index in seen:
                yield (
                    where,
                    f"index {index!r} stands twice in the output",
                    f"leave one out, or join two names with a constant: ^I[{index} {index}2] and {index}2 here, "
                    'init={"I": "eye"}',
                )
            elif not any(carried):
                yield (
                    where,
                    f"no factor carries the output index {index!r}",
                    "add it to a factor, or take it out of the output",
                )
            elif index not in stack and not all(carried):
                yield (
                    where,
                    f"index {index!r} of the matrix is missing in term {carried.index(False) + 1}",
                    "row and column indices must stand in every term; only stack indices are broadcast",
                )
            seen.add(index)


def _lone_faults(net: Network) -> Iterator[Fault]:
    outer = set(net.outer)
    for t, term in enumerate(net.terms):
        places = term.places()
        for f, factor in enumerate(term.factors):
            for k, index in enumerate(factor.indices):
                if places[index] == 1 and index not in outer:
                    yield (
                        ("index", t, f, k),
                        f"index {index!r} stands in one factor only and not in the output",
                        "add it to the output or to a second factor, or drop it: summed alone it wastes parameters",
                    )
