"""The catalogue: every declaration by its name. A new family enters it by standing under ``@family``."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import TypeVar

from tnpeft.networks import Factorization, NetworkError

Family = Callable[..., Factorization]
F = TypeVar("F", bound=Family)

FAMILIES: dict[str, Family] = {}


def family(declare: F) -> F:
    """The declaration itself, entered in the catalogue under its own name.

    Raises:
        NetworkError: another family has that name.

    >>> lora = family(lambda rank=8: Factorization.of("A[out inp] -> out inp"))
    >>> lora is FAMILIES.pop("<lambda>")
    True
    """
    name = declare.__name__
    if name in FAMILIES and FAMILIES[name].__module__ != declare.__module__:
        raise NetworkError(f"a family is already called {name!r}", remedy="choose another name")
    FAMILIES[name] = declare
    return declare


def names() -> tuple[str, ...]:
    """All families by name, in alphabetical order.

    >>> names()[:3]
    ('abba', 'bd_lora', 'block_term')
    """
    return tuple(sorted(FAMILIES))


def get(name: str) -> Family:
    """The family of that name: a function of ranks, splits and scale that returns a Factorization.

    Raises:
        NetworkError: there is none; the message lists the nearest names.

    >>> print(get("lora")(rank=4).network)
    B[layer proj out r] A[layer proj r inp] -> layer proj out inp
    """
    if name in FAMILIES:
        return FAMILIES[name]
    near = get_close_matches(str(name), names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"the families are {', '.join(names())}"
    raise NetworkError(f"no family is called {name!r}", remedy=hint)
