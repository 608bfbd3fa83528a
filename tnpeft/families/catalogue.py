"""The catalogue: every declaration by its name. A new family enters it by standing under ``@family``."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from inspect import Signature, signature
from typing import Any, TypeVar, cast

from tnpeft.networks import Factorization, Network, NetworkError, TnpeftError, network
from tnpeft.networks.sizes import require_network

Family = Callable[..., Factorization]
F = TypeVar("F", bound=Family)

FAMILIES: dict[str, Family] = {}


def family(declare: F) -> F:
    """The declaration, entered in the catalogue under its own name; an argument that it cannot use is refused.

    Raises:
        NetworkError: another family has that name.

    >>> half = family(lambda rank=8: Factorization.of("A[out inp] -> out inp", ranks={"r": rank // 2}))
    >>> FAMILIES.pop("<lambda>")("two")
    Traceback (most recent call last):
    tnpeft.networks.errors.NetworkError: <lambda>('two') has an unfit argument: unsupported operand type(s) for //...
    call it as <lambda>(rank=8)
    >>> FAMILIES["lora"](rankk=3)
    Traceback (most recent call last):
    tnpeft.networks.errors.NetworkError: lora has no argument 'rankk'
    did you mean 'rank'? call it as lora(rank=8, alpha=None, rslora=False)
    """
    name = declare.__name__
    if name in FAMILIES and FAMILIES[name].__module__ != declare.__module__:
        raise NetworkError(f"a family is already called {name!r}", remedy="choose another name")
    known = signature(declare)

    @wraps(declare)
    def declared(*args: Any, **kwargs: Any) -> Factorization:
        try:
            for option, value in known.bind(*args, **kwargs).arguments.items():
                if isinstance(known.parameters[option].default, bool) and not isinstance(value, bool):
                    raise TypeError(f"{option} is True or False")
            return declare(*args, **kwargs)
        except TnpeftError:
            raise
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            options = [its.replace(annotation=its.empty) for its in known.parameters.values()]
            given = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
            remedy = f"call it as {name}{Signature(options)}"
            unknown = next((key for key in kwargs if key not in known.parameters), None)
            if unknown is None:
                raise NetworkError(f"{name}({given}) has an unfit argument: {error}", remedy=remedy) from error
            near = get_close_matches(unknown, known.parameters, n=1)
            remedy = f"did you mean {near[0]!r}? {remedy}" if near else remedy
            raise NetworkError(f"{name} has no argument {unknown!r}", remedy=remedy) from error

    FAMILIES[name] = declared
    return cast("F", declared)


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


def rank_option(name: str) -> str | None:
    """The argument that sets a family's ranks, None where it has one size only.

    >>> rank_option("lora"), rank_option("tucker"), rank_option("ia3")
    ('rank', 'ranks', None)
    """
    return next((option for option in ("rank", "ranks") if option in signature(get(name)).parameters), None)


def factorization(given: str | Network | Factorization) -> Factorization:
    """What a family's name (with a rank, ``"lora:4"``), a line or a network stands for; a line's bonds start at 1.

    Raises:
        NetworkError: it is none of these.

    >>> factorization("lora:4").ranks, factorization("B[out k] A[k inp] -> out inp").ranks
    ({'r': 4}, {'k': 1})
    """
    if isinstance(given, Factorization):
        return given
    if isinstance(given, Network) or (isinstance(given, str) and ("[" in given or "->" in given)):
        net = network(given) if isinstance(given, str) else given
        return Factorization.of(net, name=str(net), ranks=dict.fromkeys(net.bonds, 1))
    if not isinstance(given, str):
        require_network(given)
    name, colon, rank = str(given).partition(":")
    declare = get(name.strip())
    if not colon:
        return declare()
    option = rank_option(name.strip())
    if option is None:
        raise NetworkError(f"{name!r} has no rank to choose", remedy=f"write {name}")
    if not rank.strip().isdecimal():
        raise NetworkError(f"invalid rank {rank!r} in {given!r}", remedy=f"write such as {name}:8")
    return declare(**{option: int(rank)})
