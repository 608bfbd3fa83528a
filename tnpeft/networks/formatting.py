"""A network as a line of text, token by token, so that an error can point into it."""

from __future__ import annotations

from collections.abc import Iterator

from tnpeft.networks.factor import PREFIX, Group, Term

Terms = tuple[Term, ...]
Output = tuple[Group, ...]
Focus = tuple[str, int, int, int]  # ("factor" or "index" or "output", term, factor or group, slot)


def tokens_of(terms: Terms, output: Output) -> Iterator[tuple[str, Focus]]:
    """Yield the tokens of the line, each with the part of the network that it stands for."""
    for t, term in enumerate(terms):
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
    for g, group in enumerate(output):
        yield (" " if len(group) == 1 else " ("), ("space", 0, g, 0)
        for k, index in enumerate(group):
            if k:
                yield " ", ("space", 0, g, k)
            yield index, ("output", 0, g, k)
        if len(group) != 1:
            yield ")", ("space", 0, g, 0)


def position_of(terms: Terms, output: Output, focus: Focus) -> tuple[str, int | None]:
    """Return the whole line and the position in it of a part; None for a part that it lacks."""
    text, position = "", None
    for token, what in tokens_of(terms, output):
        if what == focus:
            position = len(text)
        text += token
    return text, position
