"""The rules that a line must obey to be a contraction."""

from __future__ import annotations

from collections.abc import Iterator
from unicodedata import normalize

from tnpeft.networks.factor import RESERVED, Factor
from tnpeft.networks.formatting import Focus, Output, Terms

Problem = tuple[Focus, str, str]  # where, problem, remedy


def find_errors(terms: Terms, output: Output) -> Iterator[Problem]:
    """Yield the errors of a network: where, what, and the remedy."""
    yield from _name_errors(terms, output)
    yield from _factor_errors(terms, output)
    yield from _output_errors(terms, output)
    yield from _lone_errors(terms, output)


def _name_errors(terms: Terms, output: Output) -> Iterator[Problem]:
    if not terms or not all(term.factors for term in terms):
        yield ("arrow", 0, 0, 0), "a term without factors", "write at least one factor, such as A[out inp]"
    for t, term in enumerate(terms):
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


def _factor_errors(terms: Terms, output: Output) -> Iterator[Problem]:
    first: dict[str, tuple[int, Factor]] = {}
    for t, term in enumerate(terms):
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


def _output_errors(terms: Terms, output: Output) -> Iterator[Problem]:
    seen: set[str] = set()
    stack = {index for group in output[:-2] for index in group}
    places = [set(term.places()) for term in terms]
    for g, group in enumerate(output):
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


def _lone_errors(terms: Terms, output: Output) -> Iterator[Problem]:
    outer = {index for group in output for index in group}
    for t, term in enumerate(terms):
        places = term.places()
        for f, factor in enumerate(term.factors):
            for k, index in enumerate(factor.indices):
                if places[index] == 1 and index not in outer:
                    yield (
                        ("index", t, f, k),
                        f"index {index!r} stands in one factor only and not in the output",
                        "add it to the output or to a second factor, or drop it: summed alone it wastes parameters",
                    )
