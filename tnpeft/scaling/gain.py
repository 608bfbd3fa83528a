"""Gain: the RMS change of an entry of one site's update per unit rate at the first signed step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tnpeft.counting.parameters import layout_on
from tnpeft.families import get as get_family
from tnpeft.layout import Layout, ParameterSpec, SiteLayout
from tnpeft.models.cards import Model, Targets
from tnpeft.networks import Factorization, Network, NetworkError, Site, network
from tnpeft.networks.sizes import Size, Sizes, bind, joined, require_network
from tnpeft.scaling import starts
from tnpeft.scaling.moments import Entry, first_step

AnyNetwork = Network | Factorization | str


def gain(
    f: AnyNetwork,
    sizes: Sizes | None = None,
    /,
    *,
    model: Model = None,
    targets: Targets = None,
    rms_base: Size = 1.0,
    **more: Size,
) -> Any:
    """Return how far one step moves an update: the RMS change of an entry per unit rate at the first signed step.

    The first step of Adam, and every step of sign descent, moves an entry by the rate, up or down. A factor moves
    where the others of its term are not zero: at the usual start the zero factor alone, at a start without zeros all
    of them. For one zero factor the gain is the scale, times the root of the product of the sizes of its bonds, times
    the RMS of an entry of what multiplies it. The mean is over signs and initial values, both independent; factors
    that stand twice count as normal. It is the gain of the update itself: DoRA normalises it further.

    Args:
        f: a factorization, a network or a line (factors start by the variance rule), or the name of a family
            (its ranks stay open).
        sizes: sizes of the indices; what is missing stays a symbol, and the answer is a sympy expression.
        model: answer for the sites of a model, one number for each projection.
        targets: the model's projections.
        rms_base: the RMS of an entry of the base weight, for factors that start from it.
        more: sizes by name.

    Raises:
        NetworkError: a size or a start does not fit.

    >>> import tnpeft
    >>> gain("lora")
    sqrt(3)*sqrt(r/inp)/3
    >>> f = tnpeft.families.lora(rank=8)
    >>> gain(f, inp=96), gain(f, model="roberta-base", targets=["query"])
    (0.16666666666666666, {'query': 0.05892556509887897})
    """
    if model is None and targets is not None:
        raise NetworkError("targets are given without a model", remedy="pass model= as well")
    if model is not None:
        f, open_ranks = resolve(f)
        if open_ranks:
            more = {**{b: r for b, r in f.ranks.items() if isinstance(r, int)}, **more}
        squares = squares_on(layout_on(f, sizes, model=model, targets=targets, **more), rms_base)
        return {proj: root(sum(of.values()) / count) for proj, (of, count) in by_projection(squares).items()}
    return root(_total(gain_squares(f, sizes, rms_base=rms_base, **more).values()))


def gain_squares(
    f: AnyNetwork, sizes: Sizes | None = None, /, *, rms_base: Size = 1.0, **more: Size
) -> dict[str, Size]:
    """Return by label the squared gain of each trained factor alone; they add up to the squared gain.

    >>> gain_squares("B[out r] A[r inp] -> out inp", r=2, inp=8)
    {'B': 0.125}
    """
    f, open_ranks = resolve(f)
    bound = open_sizes(f, sizes, open_ranks, more)
    entries = entries_of(f, f.network, bound, rms_base)
    return _scaled(f, first_step(f.network, bound, entries))


def resolve(f: AnyNetwork) -> tuple[Factorization, bool]:
    """Return the factorization that a line, a network or a family's name stands for; True if its ranks are open.

    >>> resolve("lora")[0].name, resolve("lora")[1]
    ('lora', True)
    """
    if isinstance(f, str):
        if "->" not in f:
            return get_family(f)(), True
        f = network(f)
    if isinstance(f, Factorization):
        return f, False
    require_network(f)
    return Factorization.of(f, ranks=dict.fromkeys(f.bonds, 1)), True


class OpenSizes(dict[str, Size]):
    """Sizes by index; a missing one is a symbol.

    >>> OpenSizes(r=2)["r"], OpenSizes(r=2)["inp"]
    (2, inp)
    """

    def __missing__(self, index: str) -> Size:
        from sympy import Symbol

        return Symbol(index)


def open_sizes(f: Factorization, sizes: Sizes | None, open_ranks: bool, more: Sizes) -> OpenSizes:
    """Return the known sizes of the first line's indices, ranks and splits filled in unless ranks are open."""
    net, given = f.network, joined(sizes, more)
    if not open_ranks:
        return OpenSizes(f.bind(sizes, more))
    bind(net, sizes, more, extra=("out", "inp", "heads"))
    filled = bind(net, f.sizes({**given}), {})
    return OpenSizes({i: size for i, size in filled.items() if i not in net.bonds or i in given})


def entries_of(
    f: Factorization,
    net: Network,
    sizes: Mapping[str, Size],
    rms_base: Size = 1.0,
    own: Mapping[str, Size] | None = None,
) -> dict[str, Entry]:
    """Return by label the entries of every factor at the start; ``own`` has mean squares that are known already."""
    named = starts.starts(f)
    zeros = starts.zero_init_factors(f, named)
    found = {}
    for factor in net.factors:
        label, given = net.label(factor), named.get(factor.name)
        square = starts.start_square(f, net, sizes, factor, named, zeros, rms_base)
        value = 0.0 if factor.name in zeros else None if given is None else starts.constant_value(given)
        step: Size = 1.0
        if own and label in own and label not in f.unit_norm and factor.name not in zeros:
            square = own[label]
        if label in f.unit_norm:
            column = starts.unit_size(factor.indices, net, sizes)
            raw = 1 / column if given is None else starts.mean_square(given, factor.indices, net, sizes, rms_base)
            step = (1 - 1 / column) / (column * raw)
            value = None if value is None else math.copysign(1.0, value) * root(1 / column)
        found[label] = Entry(square, value, step)
    return found


def squares_on(layout: Layout, rms_base: Size | Mapping[Site, float] = 1.0) -> dict[Site, dict[str, Size]]:
    """Return for every site the squared gains of its trained factors, by label."""
    f, shared = layout.factorization, least_variances(layout)
    data = any(isinstance(g, starts.Spec) and g.name in ("base", "svd", "tt_svd") for g in starts.starts(f).values())
    found, known = {}, dict[Any, dict[str, Size]]()
    for place in layout.site_layouts:
        own = {label: shared[param] for label, param in place.parameters.items() if param in shared}
        base = rms_base[place.site] if isinstance(rms_base, Mapping) else rms_base
        key = (place.line, tuple(place.sizes.items()), tuple(own.items()), base if data else 0)
        if key not in known:
            sizes = stacked_sizes(layout, place)
            entries = entries_of(f, place.line.network, sizes, base, own)
            known[key] = _scaled(f, first_step(place.line.network, sizes, entries))
        found[place.site] = known[key]
    return found


def least_variances(layout: Layout) -> dict[ParameterSpec, Size]:
    """Return the mean square by the variance rule of every unnamed param: the least that its sites ask for."""
    f, named = layout.factorization, starts.starts(layout.factorization)
    zeros = starts.zero_init_factors(f, named)
    least: dict[ParameterSpec, Size] = {}
    known: dict[Any, Size] = {}
    for place in layout.site_layouts:
        sizes = stacked_sizes(layout, place)
        for label, param in place.parameters.items():
            name = label.removeprefix("~")
            if name in named or name in zeros or label in f.unit_norm:
                continue
            key = (place.line, label, tuple(place.sizes.items()))
            if key not in known:
                known[key] = starts.variance(f, place.line.network, sizes, name, named, zeros)
            least[param] = min(least.get(param, known[key]), known[key])
    return least


def stacked_sizes(layout: Layout, place: SiteLayout) -> dict[str, int]:
    """Return a site's sizes with those of the layer and proj axes."""
    return {**place.sizes, "layer": len(layout.layers), "proj": len(layout.projs)}


def by_projection(squares: Mapping[Site, Mapping[str, Size]]) -> dict[str, tuple[dict[str, Size], int]]:
    """Return the sums of squared gains by factor over the sites of each projection, and the number of sites."""
    found: dict[str, tuple[dict[str, Size], int]] = {}
    for site, of in squares.items():
        total, count = found.get(site.proj, ({}, 0))
        found[site.proj] = ({**total, **{k: total.get(k, 0.0) + v for k, v in of.items()}}, count + 1)
    return found


def root(square: Size) -> Any:
    """Return the root of a number or an expression."""
    if isinstance(square, int | float):
        return math.sqrt(square)
    from sympy import nsimplify, sqrt

    return sqrt(nsimplify(square, rational=True))


def _scaled(f: Factorization, squares: Mapping[str, Size]) -> dict[str, Size]:
    return {label: f.scale**2 * square for label, square in squares.items()}


def _total(values: Iterable[Size]) -> Size:
    total: Size = 0.0
    for value in values:
        total = total + value
    return total
