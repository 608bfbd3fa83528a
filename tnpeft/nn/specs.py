"""What a start value is, how large its entries are, and which factors start at zero."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnpeft.counting.layout import Piece, Placement
from tnpeft.networks import STACK, Factorization, Network, NetworkError, Term

# How many numbers each start may have in brackets: (least, most).
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
    "tt_svd": (0, 0),
    "base": (0, 0),
}
_FORM = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


@dataclass(frozen=True)
class Spec:
    """A start by its name and its numbers, such as ``normal(0.02)``."""

    name: str
    numbers: tuple[float, ...] = ()

    @staticmethod
    def parse(text: str, label: str = "") -> Spec:
        """The start that a text names.

        Raises:
            NetworkError: there is no such start, or it takes other numbers.

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
        if not least <= len(numbers) <= most or not np.isfinite(numbers).all():
            known = ", ".join(name + "(c)" * low for name, (low, _) in SPECS.items())
            raise NetworkError(f"factor {label!r} cannot start as {text!r}", remedy=f"use {known}, or an array")
        return Spec(name, numbers)


Start = Spec | Tensor


def start(value: Any, label: str) -> Start:
    """A start from a text, a nested list, or a numpy or torch array.

    Raises:
        NetworkError: the text names no start, or the array holds no finite numbers.

    >>> start("kaiming", "A"), start([1, 2], "w")
    (Spec(name='kaiming', numbers=()), tensor([1., 2.]))
    """
    if label.startswith("~"):
        raise NetworkError(
            f"{label} repeats the start of {label[1:]}", remedy=f"name a start of {label[1:]!r} instead"
        )
    if isinstance(value, str):
        return Spec.parse(value, label)
    try:
        array = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
        tensor = torch.as_tensor(array).to(torch.float32, copy=True)
    except (TypeError, ValueError) as error:
        raise NetworkError(f"factor {label!r} cannot start so: {error}", remedy="pass a rectangular array") from None
    if not torch.isfinite(tensor).all():
        raise NetworkError(f"the start of factor {label!r} is not finite", remedy="pass an array of finite numbers")
    return tensor


# ---- how large the entries are


def fans(piece: Piece, placement: Placement) -> tuple[int, int]:
    """Fan-in and fan-out of a factor, see :class:`tnpeft.nn.init.Starter`.

    >>> from tnpeft.networks import Site
    >>> from tnpeft.counting.layout import layout
    >>> f = Factorization.of("B[out a] M[a b] A[b inp] -> out inp", ranks={"a": 2, "b": 3})
    >>> place = layout(f, [Site(0, "q_proj", 8, 5)]).placements[0]
    >>> [fans(piece, place) for piece in place.pieces.values()]
    [(2, 8), (3, 2), (5, 3)]
    """
    axes = {i: size for i, size in zip(piece.indices, piece.shape, strict=True) if i not in STACK}
    total = prod(axes.values())
    rows = [axes[i] for i in placement.network.rows if i in axes]
    cols = [axes[i] for i in placement.network.cols if i in axes]
    last = [*axes.values()][-1] if axes else 1
    fan_in = total // prod(rows) if rows else prod(cols) if cols else last
    fan_out = total // prod(cols) if cols else prod(rows) if rows else total // last
    return fan_in, fan_out


def spread(spec: Spec, piece: Piece, placement: Placement) -> float:
    """The standard deviation of a normal start, the bound of a uniform one.

    >>> from tnpeft.networks import Site
    >>> from tnpeft.counting.layout import layout
    >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2})
    >>> place = layout(f, [Site(0, "q_proj", 4, 16)]).placements[0]
    >>> spread(Spec("kaiming"), place.pieces["A"], place)
    0.25
    """
    if spec.numbers:
        return spec.numbers[0]
    fan_in, fan_out = fans(piece, placement)
    return {"kaiming": 1 / sqrt(fan_in), "xavier": sqrt(6 / (fan_in + fan_out))}.get(spec.name, 1.0)


def root_mean_square(given: Start, piece: Piece, placement: Placement) -> float:
    """The size of an entry of a start; 1 for what comes from the base weight.

    >>> from tnpeft.networks import Site
    >>> from tnpeft.counting.layout import layout
    >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2})
    >>> place = layout(f, [Site(0, "q_proj", 4, 16)]).placements[0]
    >>> root_mean_square(Spec("orthogonal"), place.pieces["A"], place)
    0.25
    """
    if isinstance(given, Tensor):
        return float(given.square().mean().sqrt())
    if given.name in ("normal", "constant"):
        return abs(spread(given, piece, placement))
    if given.name in ("uniform", "kaiming", "xavier"):
        return abs(spread(given, piece, placement)) / sqrt(3)
    if given.name in ("orthogonal", "eye", "dct"):
        rows = prod(piece.shape[: len(piece.shape) // 2])
        return 1 / sqrt(max(rows, piece.size // rows))
    return 1 / sqrt(piece.shape[0]) if given.name == "circulant" else 1.0


def balanced(placement: Placement, term: Term, named: Mapping[str, Start], zeros: frozenset[str]) -> float:
    """The standard deviation that the variance rule gives to the factors of a term that are not named.

    >>> from tnpeft.networks import Site
    >>> from tnpeft.counting.layout import layout
    >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2})
    >>> place = layout(f, [Site(0, "q_proj", 4, 16)]).placements[0]
    >>> balanced(place, place.network.terms[0], {}, frozenset("B"))
    0.25
    """
    net, sizes = placement.network, placement.sizes
    count, scale = 0, 1.0
    summed = set(term.places()) - set(net.outer)
    for factor in term.factors:
        if factor.name in zeros:
            summed -= set(factor.indices)
        elif factor.name in named:
            scale *= root_mean_square(named[factor.name], placement.pieces[factor.name], placement)
        else:
            count += 1
    target = 1 / sqrt(prod(sizes[index] for index in net.cols))
    return float((target / (scale * sqrt(prod(sizes[index] for index in summed)))) ** (1 / count))


# ---- which factors start at zero


def zero_labels(f: Factorization, named: Mapping[str, Start]) -> frozenset[str]:
    """Labels of the factors that start at zero, named so or chosen by the rule of one zero factor.

    Raises:
        NetworkError: no gradient would ever reach some factor.

    >>> sorted(zero_labels(Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 8}), {}))
    ['B']
    """
    zeros = {label for label, given in named.items() if _is_zero(given)}
    networks = list(dict.fromkeys(line.network for line in f.lines))
    terms = [(net, term) for net in networks for term in net.terms]
    for net, term in terms:
        if not _has_twins(net) and not any(factor.name in zeros for factor in term.factors):
            zeros |= _choose(term, [other for _, other in terms], named, zeros, f.unit_norm)
    for net, term in terms:
        _refuse_dead_start(net, term, zeros, f.unit_norm)
    return frozenset(zeros)


def starting_away(f: Factorization, named: Mapping[str, Start], zeros: frozenset[str]) -> Network | None:
    """The first network whose update is not zero at the start although not all its starts are named.

    >>> print(starting_away(Factorization.of("A[out r] A[inp r] -> out inp", ranks={"r": 8}), {}, frozenset()))
    A[out r] A[inp r] -> out inp
    """
    for net in dict.fromkeys(line.network for line in f.lines):
        for term in net.terms:
            chosen = any(factor.kind == "trainable" and factor.name not in named for factor in term.factors)
            if chosen and not _has_twins(net) and not any(factor.name in zeros for factor in term.factors):
                return net
    return None


def _is_zero(given: Start) -> bool:
    if isinstance(given, Tensor):
        return not given.any()
    scaled = given.name in ("constant", "normal", "uniform") and given.numbers == (0.0,)
    return given.name == "zeros" or scaled


def _has_twins(net: Network) -> bool:
    return any(net.label(factor).startswith("~") for factor in net.factors)


def _choose(
    term: Term, others: list[Term], named: Mapping[str, Start], zeros: set[str], unit_norm: Sequence[str]
) -> set[str]:
    """The first factor of the term that may start at zero, best one that leaves no other term with two zeros."""
    uses = Counter(factor.name for factor in term.factors)
    free = [f.name for f in term.factors if f.kind == "trainable" and f.name not in named and uses[f.name] == 1]
    free.sort(key=lambda name: name in unit_norm)  # these only if there is no other
    for name in free:
        mates = {f.name for other in others if any(f.name == name for f in other.factors) for f in other.factors}
        if not mates & zeros:
            return {name}
    return set(free[:1])


def _refuse_dead_start(net: Network, term: Term, zeros: set[str], unit_norm: Sequence[str]) -> None:
    zero = [factor for factor in term.factors if factor.name in zeros]
    unit = [factor.name for factor in zero if net.label(factor) in unit_norm]
    if unit:
        raise NetworkError(
            f"{unit[0]} is to have columns of unit norm, and starts at zero",
            line=str(net),
            remedy="give the term a factor that is not normalised, such as w[r], or name a start for each factor",
        )
    if len(zero) > 1:
        problem = f"{' and '.join(f.name for f in zero)} both start at zero: no gradient would reach them"
    elif zero and zero[0].kind == "constant":
        problem = f"the constant {zero[0].name} is zero: its term stays zero for ever"
    else:
        return
    raise NetworkError(problem, line=str(net), remedy="name starts so that one trainable factor of a term is zero")
