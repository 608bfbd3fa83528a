"""Sizes of indices: checked whole numbers (or symbols), even splits of a dimension, and rules for ranks."""

from __future__ import annotations

import ast
import math
import operator
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from unicodedata import normalize

from tnpeft.networks.errors import NetworkError
from tnpeft.networks.network import Network

Size = Any  # a positive int, or anything with + and *, such as a sympy symbol
Sizes = Mapping[str, Size]


_MOST_DIGITS = 4_000  # Python prints whole numbers of at most 4,300 digits
_MOST_BITS = 13_280


def check_size(name: str, value: object, line: str = "") -> Size:
    """``value`` as a positive int, or unchanged if it is a symbolic expression.

    Raises:
        NetworkError: it is neither.
    """
    if hasattr(value, "free_symbols") and value.free_symbols:
        return value
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = int(value) if hasattr(value, "free_symbols") and value.is_integer else 0  # type: ignore[call-overload,attr-defined]
    if number.bit_length() > _MOST_BITS:
        raise NetworkError(
            f"the size of {name!r} has over {_MOST_DIGITS:,} digits", line=line, remedy="check its unit"
        )
    if isinstance(value, bool) or number < 1:
        raise NetworkError(
            f"the size of {name!r} is {value!r}",
            line=line,
            remedy=f"pass {name}= a positive whole number or a symbol",
        )
    return number


def require_network(net: object) -> None:
    """Raise a NetworkError unless it is a network, such as the text of one."""
    if not isinstance(net, Network):
        raise NetworkError(
            f"expected a Network, got {type(net).__name__}: {str(net)[:60]!r}",
            remedy="read a line with tnpeft.network(line), take a family with tnpeft.families.get(name)()",
        )


def bind(net: Network, sizes: Sizes | None, keywords: Sizes, extra: Iterable[str] = ()) -> dict[str, Size]:
    """Checked sizes of the line's indices from one mapping (which may hold more) and keywords (which may not).

    Raises:
        NetworkError: ``net`` is not a network, an index is unknown, a size is not a positive whole number or
            symbol, or the two uses of one factor get different sizes.
    """
    require_network(net)
    known = dict.fromkeys(net.indices)
    for name in keywords:
        if name not in known and name not in extra:
            raise NetworkError(
                f"unknown index {name!r}",
                line=str(net),
                remedy=f"the indices are {', '.join(known)}",
            )
    given, line = joined(sizes, keywords), str(net)
    bound = {name: check_size(name, given[name], line) for name in known if name in given}
    shapes: dict[str, tuple[Size, ...]] = {}
    for factor in net.uses():
        if all(index in bound for index in factor.indices):
            shape = tuple(bound[index] for index in factor.indices)
            if sum(size.bit_length() for size in shape if isinstance(size, int)) > _MOST_BITS:
                raise NetworkError(
                    f"factor {factor.name!r} would have more than 10**{_MOST_DIGITS:,} elements",
                    line=line,
                    remedy="check the sizes of the indices that it carries",
                )
            if shapes.setdefault(factor.name, shape) != shape:
                raise NetworkError(
                    f"factor {factor.name!r} is used with shapes {shapes[factor.name]} and {shape}",
                    line=str(net),
                    remedy="a factor that stands twice has one shape: give its indices equal sizes",
                )
    return bound


class IndexSizes(dict[str, Size]):
    """Sizes by index, in which ``out`` and ``inp`` are those of the indices, not the features of their whole groups.

    What :meth:`Factorization.sizes` returns, so that it may be given to it again.
    """


def joined(sizes: Sizes | None, keywords: Sizes) -> dict[str, Size]:
    """Sizes from a mapping and from keywords, which come first; of the mapping's kind unless they give features.

    Raises:
        NetworkError: ``sizes`` is not a mapping.

    >>> joined({"r": 2, "out": 4}, {"r": 8})
    {'r': 8, 'out': 4}
    """
    if not isinstance(sizes, Mapping | None):
        raise NetworkError(
            f"the sizes are {str(sizes)[:60]!r}", remedy='pass a mapping, such as {"r": 8}, or keywords'
        )
    kind = IndexSizes if isinstance(sizes, IndexSizes) and keywords.keys().isdisjoint(("out", "inp")) else dict
    return kind({**folded(sizes or {}), **keywords})


def folded(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping with its names in the Unicode form (NFKC) that Python gives to keywords and the parser to indices.

    >>> folded({"\u00b5": 3}) == {"\u03bc": 3}
    True
    """
    if all(not isinstance(name, str) or name.isascii() for name in given):
        return given
    return {normalize("NFKC", name) if isinstance(name, str) else name: value for name, value in given.items()}


def complete(net: Network, bound: Mapping[str, Size], needed: Iterable[str] | None = None) -> None:
    """Raise unless every index of the line (or of ``needed``) has a size."""
    missing = [index for index in (net.indices if needed is None else needed) if index not in bound]
    if missing:
        raise NetworkError(
            f"no size for {', '.join(map(repr, missing))}",
            line=str(net),
            remedy=f"pass {', '.join(f'{index}=...' for index in missing)}",
        )


def integers(net: Network, bound: Mapping[str, Size]) -> dict[str, int]:
    """All sizes as ints, for questions that have no symbolic answer."""
    complete(net, bound)
    for index, size in bound.items():
        if not isinstance(size, int):
            raise NetworkError(
                f"the size of {index!r} is the symbol {size}",
                line=str(net),
                remedy=f"pass {index}= a whole number",
            )
    return dict(bound)


def product(values: Iterable[Size]) -> Size:
    """The product, 1 if there is nothing; only ``*`` is used."""
    total: Size = 1
    for value in values:
        total = total * value
    return total


# ---- splitting a dimension


_SPLITTABLE = 1 << 48  # sizes up to which prime factors are looked for


@lru_cache(maxsize=4096)
def even_split(size: int, parts: int) -> tuple[int, ...]:
    """``size`` as a product of ``parts`` ascending divisors with the smallest sum, the most even split.

    Raises:
        NetworkError: the size is too large to be factored.

    >>> even_split(2048, 2), even_split(768, 3), even_split(7, 2)
    ((32, 64), (8, 8, 12), (1, 7))
    """
    if parts == 0:
        return ()
    primes = _primes(size)
    if parts >= len(primes):  # two factors have a smaller sum than their product and a one
        return (1,) * (parts - len(primes)) + primes
    divisors = [1]
    for prime, power in Counter(primes).items():
        divisors = [divisor * prime**k for divisor in divisors for k in range(power + 1)]
    return _most_even(size, parts, sorted(divisors))


def _most_even(size: int, parts: int, divisors: Sequence[int]) -> tuple[int, ...]:
    """The ascending divisors with the smallest sum (of these the first in order), by branch and bound.

    The nearer a part comes to the root of what is left, the smaller the sum of the rest can be; what cannot get below
    the best sum so far is left out.
    """
    best: tuple[int, tuple[int, ...]] = (size + parts, ())

    def extend(chosen: tuple[int, ...], rest: int, places: int) -> None:
        nonlocal best
        if places == 1:
            best = min(best, (sum(chosen) + rest, (*chosen, rest)))
            return
        root, least = rest ** (1 / places) * (1 + 1e-9), chosen[-1] if chosen else 1
        for part in reversed(divisors[bisect_left(divisors, least) : bisect_right(divisors, root)]):
            smallest = sum(chosen) + part + (places - 1) * (rest // part) ** (1 / (places - 1))
            if smallest * (1 - 1e-9) > best[0]:
                break
            if rest % part == 0:
                extend((*chosen, part), rest // part, places - 1)

    extend((), size, parts)
    return best[1]


def _primes(size: int) -> tuple[int, ...]:
    """The prime factors in ascending order."""
    if size > _SPLITTABLE:
        raise NetworkError(
            "a size above 2**48 is not split by itself", remedy="pass the sizes of the group's indices"
        )
    found, prime = [], 2
    while prime * prime <= size:
        while size % prime == 0:
            found.append(prime)
            size //= prime
        prime += 1 if prime == 2 else 2
    return (*found, size) if size > 1 else tuple(found)


def split(size: int, group: Sequence[str], given: Sequence[int | None], line: str = "") -> dict[str, int]:
    """Sizes of the indices of one group whose product is ``size``; ``None`` in ``given`` is deduced.

    Raises:
        NetworkError: the given sizes do not divide ``size``, or their number is not the group's.

    >>> split(2048, ("o1", "o2"), (None, 32)), split(12, ("a", "b"), ())
    ({'o1': 64, 'o2': 32}, {'a': 3, 'b': 4})
    """
    wanted = [*given] if given else [None] * len(group)
    label = f"({' '.join(group)})"
    position = line.find(label, line.find("->"))
    caret = {"line": line, "position": position if position >= 0 else None}
    if len(wanted) != len(group):
        raise NetworkError(
            f"{len(wanted)} sizes are given for the {len(group)} indices of {label}",
            **caret,  # type: ignore[arg-type]
            remedy="give one size per index, None where it is to be deduced",
        )
    fixed = math.prod(part for part in wanted if part is not None)
    open_parts = wanted.count(None)
    if fixed == 0 or size % fixed or (not open_parts and fixed != size):
        raise NetworkError(
            f"{label} cannot have the sizes {tuple(wanted)}: their product does not make {size}",
            **caret,  # type: ignore[arg-type]
            remedy=f"choose divisors of {size}, or None for a size to be deduced",
        )
    rest = iter(even_split(size // fixed, open_parts))
    return {index: part if part is not None else next(rest) for index, part in zip(group, wanted, strict=True)}


# ---- a rank as a function of sizes, written as text so that it stays plain data

_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_CALLS: dict[str, Callable[..., int]] = {
    "min": min,
    "max": max,
    "ceildiv": lambda a, b: -(-a // b),
    "gcd": math.gcd,
    "isqrt": math.isqrt,
}


def evaluate(rule: str, sizes: Mapping[str, int]) -> int:
    """The value of a rule over sizes: whole numbers, index names, ``+ - * //``, min, max, gcd, ceildiv, isqrt.

    Raises:
        NetworkError: the rule holds anything else or names an unknown size.

    >>> evaluate("ceildiv(min(out, inp), r)", {"out": 512, "inp": 2048, "r": 100})
    6
    """

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _CALLS
            and not node.keywords
        ):
            return _CALLS[node.func.id](*map(value, node.args))
        raise NetworkError(
            f"{ast.unparse(node)!r} cannot be worked out in the rule {rule!r}",
            remedy=f"use whole numbers, + - * //, {', '.join(_CALLS)} and the sizes {', '.join(sizes)}",
        )

    if len(rule) > 200:
        raise NetworkError(f"the rule {rule[:40]!r}... is too long", remedy="use at most 200 characters")
    try:
        return value(ast.parse(rule, mode="eval").body)
    except NetworkError:
        raise
    except (SyntaxError, ValueError, ZeroDivisionError, TypeError, RecursionError) as error:
        raise NetworkError(f"invalid expression {rule!r}: {error}", remedy="such as min(out, inp) // r") from None
