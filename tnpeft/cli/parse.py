"""Parse what is typed at the shell: networks, sizes, ranks and options of families."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import inf
from typing import Annotated, Any

import typer

from tnpeft.networks import Factorization, Network, NetworkError, network

NetworkArgument = Annotated[
    str, typer.Argument(metavar="NETWORK", help="A family's name, or a line of einsum in quotes.", show_default=False)
]
RankOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rank", "-r", metavar="NAME=NUMBER", help="Size of a bond, such as `-r r=8`; `-r 8` for all of them."
    ),
]
SizeOption = Annotated[
    list[str] | None,
    typer.Option("--size", "-s", metavar="NAME=NUMBER", help="Size of an index, such as `-s layer=24`."),
]
RatioOption = Annotated[
    list[str] | None,
    typer.Option("--ratio", metavar="NAME=NUMBER", help="A rank relative to the others, such as `--ratio a=2`."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Argument of a family, such as `--set out=32,64`."),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="A model's name, such as facebook/opt-1.3b, or its folder.")
]
TargetsOption = Annotated[
    str | None, typer.Option("--targets", "-t", help="Projections, such as q_proj,v_proj; all-linear for all.")
]
ByOption = Annotated[str, typer.Option(help="The quantity that the budget limits: parameters or dof.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_DIGITS = 4000  # of a whole number: Python reads no more than 4,300


Texts = Iterable[str] | None


def read_network(
    text: str, ranks: Texts = None, sizes: Texts = None, options: Texts = None
) -> tuple[Network | Factorization, dict[str, int]]:
    """The network that was typed, a line or a family called with its options, with its ranks set, and the sizes.

    A line whose bonds all have a rank is a factorization; else it stays a network, and the ranks are sizes.

    >>> read_network("lora:4")[0].ranks, read_network("cp", ["2"], options=["out=32,64"])[0].splits
    ({'r': 4}, {'out': (32, 64)})
    >>> read_network("A[layer out r] B[r s] C[s inp] -> layer out inp", ["r=8"], ["layer=24"])[1]
    {'layer': 24, 'r': 8}
    """
    given, known = read_sizes(ranks), read_sizes(sizes)
    if "[" not in text and "->" not in text:
        return _family(text, given, dict(_pairs(options or ()))), known
    if options:
        raise NetworkError("--set is for families", line=text, remedy="give sizes with --size, ranks with --rank")
    net = network(text)
    if "" in given:  # a number without a name is the size of every bond that is not named
        given = {**dict.fromkeys(net.bonds, given.pop("")), **given}
    return (Factorization.of(net, ranks=given), known) if set(net.bonds) <= set(given) else (net, known | given)


def read_number(text: str) -> int | str:
    """The number of parameters that was typed; text that is not a number stays as it is.

    >>> read_number("196_608"), read_number("lora:1")
    (196608, 'lora:1')
    """
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return text
    if not 1 <= number < inf or number != int(number):
        raise NetworkError(f"the budget is {text}", remedy="give a whole number from 1 on, or a network")
    return int(number)


def read_named(text: str) -> str | tuple[str, str]:
    """A family or a line, with the name that stands before it.

    >>> read_named("mine=A[out inp] -> out inp"), read_named("lora:4")
    (('mine', 'A[out inp] -> out inp'), 'lora:4')
    """
    name, equals, line = text.partition("=")
    return (name.strip(), line.strip()) if equals and name.strip() else text


def read_sizes(sizes: Texts) -> dict[str, int]:
    """Sizes or ranks by name; a number alone has none."""
    return {name: _whole(name, value) for name, value in _pairs(sizes or ())}


def read_ratios(ratios: Texts) -> dict[str, float]:
    """Ratios by rank."""
    found = {name: _value(text) for name, text in _pairs(ratios or ())}
    for name, ratio in found.items():
        if not name or not isinstance(ratio, int | float) or not 0 < ratio < inf:
            raise NetworkError(f"invalid ratio {name}={ratio}", remedy="write NAME=NUMBER, such as a=2 or b=0.5")
    return found


def _family(name: str, ranks: dict[str, int], options: dict[str, str]) -> Factorization:
    from inspect import signature

    from tnpeft.families.catalogue import get, rank_option

    name, colon, rank = name.partition(":")
    if colon:
        ranks = {"": _whole("rank", rank), **ranks}
    declare = get(name)
    known = signature(declare).parameters
    if "" in ranks:
        options = {rank_option(name) or "rank": str(ranks.pop("")), **options}
    if unknown := [option for option in options if option not in known]:
        problem = f"the family {name!r} has no option {unknown[0]!r}"
        raise NetworkError(problem, remedy=f"its options are {', '.join(known)}")
    f = declare(**{option: _value(text) for option, text in options.items()})
    return replace(f, ranks={**f.ranks, **ranks})


def _pairs(texts: Iterable[str]) -> Iterable[tuple[str, str]]:
    for text in texts:
        name, equals, value = text.partition("=")
        yield (name.strip(), value.strip()) if equals else ("", text.strip())


def _whole(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > _DIGITS:
        what = f"{name}={text[:40]}" if name else text[:40]
        raise NetworkError(f"invalid size {what!r}", remedy="write NAME=NUMBER, such as r=8 or layer=24")
    return int(text)


def _value(text: str) -> Any:
    """An option's value: a number, true, false, none, a list with commas, or text."""
    if "," in text:
        return tuple(_value(part.strip()) for part in text.split(",") if part.strip())
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
