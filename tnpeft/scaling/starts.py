"""Rules of initial values: their names, the size of their entries, the factor that starts at zero, the variance rule.

Sizes may be numbers or sympy expressions; sizes of entries are mean squares, so that no root is drawn before the end.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any

from tnpeft._extras import needed
from tnpeft.networks import STACK, Factor, Factorization, Network, NetworkError, Term
from tnpeft.networks.sizes import Size, product
from tnpeft.scaling.moments import Entry

# Numbers each rule may have in brackets: (least, most).
SPECS: Mapping[str, tuple[int, int]] = {
    "zeros": (0, 0),
    "ones": (0, 0),
    "constant": (1, 1),
    "normal": (0, 1),
    "uniform": (0, 1),
    "kaiming": (0, 0),
    "xavier": (0, 0),
    "orthogonal": (0, 0),
    "eye": (0, 0),
    "dct": (0, 0),
    "circulant": (0, 0),
    "svd": (0, 1),
    "svd_minor": (0, 1),
    "tt_svd": (0, 0),
    "base": (0, 0),
}
FROM_BASE = ("base", "svd", "svd_minor", "tt_svd")  # those that the base weight makes
_FORM = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


@dataclass(frozen=True)
class Spec:
    """A rule of initial values by its name and its numbers, such as ``normal(0.02)``."""

    name: str
    numbers: tuple[float, ...] = ()

    @staticmethod
    def parse(text: str, label: str = "") -> Spec:
        """Return the rule that a text names.

        Raises:
            NetworkError: the rule is unknown, or takes other numbers.

        >>> Spec.parse("normal(0.02)")
        Spec(name='normal', numbers=(0.02,))
        """
        match = _FORM.fullmatch(text)
        name, inside = match.groups(default="") if match else ("", "")
        try:
            numbers = tuple(float(part) for part in inside.split(",") if part.strip())
        except ValueError:
            name, numbers = "", ()
        least, most = SPECS.get(name, (1, 0))
        if not least <= len(numbers) <= most or not all(map(math.isfinite, numbers)):
            known = ", ".join(name + "(c)" * low for name, (low, _) in SPECS.items())
            raise NetworkError(f"factor {label!r} cannot start as {text!r}", remedy=f"use {known}, or an array")
        return Spec(name, numbers)


Start = Any  # a Spec, or an array with the methods of numpy's


# ---- the size of an entry


def fans(indices: Sequence[str], net: Network, sizes: Mapping[str, Size]) -> tuple[Size, Size]:
    """Return fan-in and fan-out of a factor, see :class:`tnpeft.nn.init.initializer.Initializer`.

    >>> from tnpeft.networks import network
    >>> net, sizes = network("B[out a] M[a b] A[b inp] -> out inp"), {"out": 8, "a": 2, "b": 3, "inp": 5}
    >>> [fans(factor.indices, net, sizes) for factor in net.factors]
    [(2, 8), (3, 2), (5, 3)]
    """
    axes = [index for index in indices if index not in STACK and index not in net.stack]
    rows, cols = [i for i in axes if i in net.rows], [i for i in axes if i in net.cols]
    last = axes[-1:]
    into = [i for i in axes if i not in rows] if rows else cols or last
    onto = [i for i in axes if i not in cols] if cols else rows or axes[:-1]
    return product(sizes[i] for i in into), product(sizes[i] for i in onto)


def spread(spec: Spec, indices: Sequence[str], net: Network, sizes: Mapping[str, int]) -> float:
    """Return the standard deviation of a normal start, or the bound of a uniform one.

    >>> from tnpeft.networks import network
    >>> spread(Spec("kaiming"), ("r", "inp"), network("B[out r] A[r inp] -> out inp"), {"r": 2, "inp": 16})
    0.25
    """
    if spec.numbers:
        return spec.numbers[0]
    fan_in, fan_out = fans(indices, net, sizes)
    bounds = {"kaiming": 1 / math.sqrt(fan_in), "xavier": math.sqrt(6 / (fan_in + fan_out))}
    return bounds.get(spec.name, 1.0)


def mean_square(
    given: Start, indices: Sequence[str], net: Network, sizes: Mapping[str, Size], base: Size = 1.0
) -> Size:
    """Return the mean square of the entries of a start, before any ``unit_norm``.

    ``base`` is the RMS of an entry of the base weight. A start by its SVD counts as if all its singular values were
    equal.

    >>> from tnpeft.networks import network
    >>> net = network("B[out r] A[r inp] -> out inp")
    >>> mean_square(Spec("orthogonal"), ("r", "inp"), net, {"r": 2, "inp": 16})
    0.0625
    """
    if not isinstance(given, Spec):
        return float((given * given).mean())
    name, numbers = given.name, given.numbers
    if name in ("zeros", "ones", "constant", "normal"):
        return {"zeros": 0.0}.get(name, 1.0) if not numbers else numbers[0] ** 2
    if name in ("uniform", "kaiming", "xavier"):
        if numbers or name == "uniform":
            return (numbers[0] if numbers else 1.0) ** 2 / 3
        fan_in, fan_out = fans(indices, net, sizes)
        return 1 / (3 * fan_in) if name == "kaiming" else 2 / (fan_in + fan_out)
    if name == "base":
        return base**2
    batch = batch_bonds(indices, net)
    axes = [index for index in indices if index not in STACK and index not in net.stack and index not in batch]
    if name == "circulant":
        return 1 / sizes[axes[0]]
    if name in ("svd", "svd_minor", "tt_svd"):
        return _of_weight(given, axes, net, sizes, base)
    rows, columns = axes[: len(axes) // 2], axes[len(axes) // 2 :]
    if len(axes) == 1:  # a vector that is stored by layer or projection is a row of one matrix
        rows = [index for index in indices if index in ("layer", "proj")]
    if name == "dct":
        features = {*net.rows, *net.cols}
        turned = len(axes) == 2 and axes[0] not in features and axes[1] in features
        return 1 / product(sizes[i] for i in (columns if turned else rows))
    return 1 / _extreme(product(sizes[i] for i in rows), product(sizes[i] for i in columns), most=True)


def batch_bonds(indices: Sequence[str], net: Network) -> tuple[str, ...]:
    """Return the bonds for whose every value a core is a matrix of its own, between its two other bonds.

    >>> from tnpeft.networks import network
    >>> net = network("G[t a b] B[t out a] A[t inp b] -> out inp")
    >>> batch_bonds(("t", "a", "b"), net), batch_bonds(("t", "out", "a"), net)
    (('t',), ())
    """
    own = [index for index in indices if index not in net.stack]
    shared = tuple(index for index in own if index in net.hyper)
    return shared if len(own) == len(shared) + 2 and not {*own} & {*net.outer} else ()


def _of_weight(spec: Spec, axes: list[str], net: Network, sizes: Mapping[str, Size], base: Size) -> Size:
    """The mean square of a factor of the base weight, its singular values all equal."""
    out, inp = (product(sizes[i] for i in group) for group in (net.rows, net.cols))
    square = base**2 * _extreme(out, inp, most=True)  # the square of each singular value
    if spec.name == "tt_svd":
        last = set(net.indices) - {i for i in axes if i in net.outer}
        cores = [f for f in net.factors if any(i in net.outer and i not in net.stack for i in f.indices)]
        if [i for i in cores[len({f.name for f in cores}) - 1].indices if i in axes] == axes and last:
            return square * _extreme(out, inp, most=False) / product(sizes[i] for i in axes)
        bonds = [i for i in axes if i not in net.outer]
        return 1 / product(sizes[i] for i in axes if i not in bonds[-1:])
    left = set(net.rows) <= set(axes)
    power = spec.numbers[0] if spec.numbers else float(left)
    return square**power / (out if left else inp)


def unit_size(indices: Sequence[str], net: Network, sizes: Mapping[str, Size]) -> Size:
    """Return the number of entries in a column of a ``unit_norm`` factor.

    >>> from tnpeft.networks import network
    >>> unit_size(("out", "r"), network("w[r] B[out r] A[r inp] -> out inp"), {"out": 8, "r": 2})
    8
    """
    return product(sizes[i] for i in indices if i in net.rows or i in net.cols)


def constant_value(given: Start) -> float | None:
    """Return the value that all entries of a start have, or None where they differ.

    >>> constant_value(Spec("ones")), constant_value(Spec("normal"))
    (1.0, None)
    """
    if isinstance(given, Spec):
        if given.name in ("zeros", "ones", "constant"):
            return {"zeros": 0.0, "ones": 1.0}.get(given.name) if not given.numbers else given.numbers[0]
        return None
    low, high = float(given.min()), float(given.max())
    return low if low == high else None


def _extreme(a: Size, b: Size, *, most: bool) -> Size:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return max(a, b) if most else min(a, b)
    from sympy import Max, Min

    return Max(a, b) if most else Min(a, b)


# ---- the starts of a factorization


@dataclass(frozen=True)
class Starts:
    """How the factors of a factorization start, and how large their entries are.

    ``named`` are the starts that are given, by label: rules, and arrays.

    >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 8}, init={"A": "kaiming"})
    >>> Starts.of(f).named, sorted(Starts.of(f).zeros)
    ({'A': Spec(name='kaiming', numbers=())}, ['B'])
    """

    f: Factorization
    named: Mapping[str, Start]

    @staticmethod
    def of(f: Factorization) -> Starts:
        """Return the starts with rules parsed, and lists as numpy arrays."""
        return Starts(f, {label: _start(given, label) for label, given in f.init.items()})

    @cached_property
    def zeros(self) -> frozenset[str]:
        """The names of the factors that start at zero, named so or chosen by the rule of one zero factor.

        Raises:
            NetworkError: the start leaves some factor without a gradient for ever.
        """
        zeros = {label for label, given in self.named.items() if _is_zero(given)}
        networks = list(dict.fromkeys(line.network for line in self.f.lines))
        terms = [(net, term) for net in networks for term in net.terms]
        for net, term in terms:
            if not _has_twins(net) and not any(factor.name in zeros for factor in term.factors):
                zeros |= self._choose(net, term, [other for _, other in terms], zeros)
        for net, term in terms:
            _refuse_dead_start(net, term, zeros, self.f.unit_norm)
        return frozenset(zeros)

    def _choose(self, net: Network, term: Term, others: list[Term], zeros: set[str]) -> set[str]:
        """The first factor of the term that may start at zero, best one that leaves no other term with two zeros.

        Factors with row or column indices come before a core, which has few directions for the first steps.
        """
        features = {*net.rows, *net.cols}
        wide = {factor.name for factor in term.factors if features & {*factor.indices}}
        uses = Counter(factor.name for factor in term.factors)
        free = [f.name for f in term.factors if f.kind == "trainable" and f.name not in self.named]
        free = [name for name in free if uses[name] == 1]
        free.sort(key=lambda name: (name in self.f.unit_norm, name not in wide))
        for name in free:
            mates = {f.name for other in others if any(f.name == name for f in other.factors) for f in other.factors}
            if not mates & zeros:
                return {name}
        return set(free[:1])

    def nonzero(self) -> Network | None:
        """Return the first network whose update is not zero at the start although not all its starts are named.

        >>> print(Starts.of(Factorization.of("A[out r] A[inp r] -> out inp", ranks={"r": 8})).nonzero())
        A[out r] A[inp r] -> out inp
        """
        for net in dict.fromkeys(line.network for line in self.f.lines):
            for term in net.terms:
                chosen = any(factor.kind == "trainable" and factor.name not in self.named for factor in term.factors)
                if chosen and not _has_twins(net) and not any(f.name in self.zeros for f in term.factors):
                    return net
        return None

    def by_rule(self, label: str) -> bool:
        """Return True if the variance rule says how large a factor's entries are."""
        name = label.removeprefix("~")
        return name not in self.named and name not in self.zeros and label not in self.f.unit_norm

    def variance(self, net: Network, sizes: Mapping[str, Size], name: str) -> Size:
        """Return the mean square that the variance rule gives to a factor.

        Every term then has the gain ``1 / sqrt(columns)``: a signed unit step of its zero factor moves each output by
        1 for inputs of unit variance. Where no factor is zero, the term's entries have that RMS at the start. A
        factor in several terms takes the smallest that they ask for.

        >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2})
        >>> Starts.of(f).variance(f.network, {"out": 4, "r": 4, "inp": 16}, "A")
        0.015625
        """
        terms = (t for t in net.terms if any(f.name == name and self.by_rule(net.label(f)) for f in t.factors))
        return reduce(partial(_extreme, most=False), (self._share(net, sizes, term) for term in terms))

    def _share(self, net: Network, sizes: Mapping[str, Size], term: Term) -> Size:
        count, known = 0, product(sizes[i] for i in net.cols)
        summed = set(term.places()) - set(net.outer)
        drawn: set[str] = set()  # bonds of factors whose entries differ: their terms add in quadrature
        for factor in term.factors:
            if self.by_rule(net.label(factor)):
                count += 1
            elif factor.name not in self.zeros:
                known = known * self.entry(net, sizes, factor).square
                if constant_value(self.named.get(factor.name, Spec("normal"))) is not None:
                    continue
            drawn.update(factor.indices)
        known = known * product(sizes[i] if i in drawn else sizes[i] ** 2 for i in sorted(summed))
        if isinstance(known, int | float):
            return float((1 / known) ** (1 / count))
        from sympy import Rational

        return (1 / known) ** Rational(1, count)

    def entry(
        self, net: Network, sizes: Mapping[str, Size], factor: Factor, base: Size = 1.0, own: Size | None = None
    ) -> Entry:
        """Return what the entries of a factor are at the start.

        ``base`` is the RMS of an entry of the base weight, ``own`` what the variance rule gives where it is known.
        """
        label, given = net.label(factor), self.named.get(factor.name)
        if factor.name in self.zeros:
            return Entry(0.0, 0.0, 0.0)
        value = None if given is None else constant_value(given)
        column = unit_size(factor.indices, net, sizes) if label in self.f.unit_norm else None
        if given is not None:
            stored = mean_square(given, factor.indices, net, sizes, base)
        elif column is not None:
            stored = 1 / column
        else:
            stored = self.variance(net, sizes, factor.name) if own is None else own
        if column is None:
            return Entry(stored, stored, value)
        value = None if value is None else math.copysign(1.0, value) * root(1 / column)
        return Entry(stored, 1 / column, value, (1 - 1 / column) / (column * stored))


def _start(given: Any, label: str) -> Start:
    if isinstance(given, str):
        return Spec.parse(given, label)
    if hasattr(given, "any"):
        return given
    needed("numpy", "testing", f"factor {label!r}, which starts as numbers,")
    import numpy as np

    return np.asarray(given, dtype=np.float64)


def root(square: Size) -> Any:
    """Return the root of a number or an expression."""
    if isinstance(square, int | float):
        return math.sqrt(square)
    from sympy import nsimplify, sqrt

    return sqrt(nsimplify(square, rational=True))


def _is_zero(given: Start) -> bool:
    if not isinstance(given, Spec):
        return not given.any()
    scaled = given.name in ("constant", "normal", "uniform") and given.numbers == (0.0,)
    return given.name == "zeros" or scaled


def _has_twins(net: Network) -> bool:
    return any(net.label(factor).startswith("~") for factor in net.factors)


def _alone(net: Network, name: str, zeros: set[str]) -> bool:
    """True if the factor is the only zero of some term, which then wakes it in all others."""
    return any([f.name for f in term.factors if f.name in zeros] == [name] for term in net.terms)


def _refuse_dead_start(net: Network, term: Term, zeros: set[str], unit_norm: Sequence[str]) -> None:
    zero = [factor for factor in term.factors if factor.name in zeros]
    unit = [factor.name for factor in zero if net.label(factor) in unit_norm]
    if unit:
        raise NetworkError(
            f"{unit[0]} is to have columns of unit norm, and starts at zero",
            line=str(net),
            remedy="give the term a factor that is not normalised, such as w[r], or name a start for each factor",
        )
    if len(zero) > 1 and not all(_alone(net, factor.name, zeros) for factor in zero):
        problem = f"{' and '.join(f.name for f in zero)} both start at zero: no gradient would reach them"
    elif zero and zero[0].kind == "constant":
        problem = f"the constant {zero[0].name} is zero: its term stays zero for ever"
    else:
        return
    raise NetworkError(problem, line=str(net), remedy="name starts so that one trainable factor of a term is zero")
