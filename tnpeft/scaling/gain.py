"""Gain: the RMS change of an entry of one site's update per unit rate at the first signed step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tnpeft.counting.parameters import layout_on
from tnpeft.families import get as get_family
from tnpeft.layout import Layout, ParameterSpec, SiteLayout
from tnpeft.models.cards import Model, Targets
from tnpeft.networks import Factorization, Network, NetworkError, Site, network
from tnpeft.networks.sizes import Size, Sizes, bind, joined, require_network
from tnpeft.scaling.moments import Entry, first_step
from tnpeft.scaling.starts import FROM_BASE, Spec, Starts, root

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
        found: dict[str, list[dict[str, Size]]] = {}
        for site, squares in squares_on(layout_on(f, sizes, model=model, targets=targets, **more), rms_base).items():
            found.setdefault(site.proj, []).append(squares)
        means = {}
        for proj, each in found.items():
            totals = [sum(of.get(k, 0.0) for of in each) for k in dict.fromkeys(k for of in each for k in of)]
            means[proj] = root(sum(totals) / len(each))
        return means
    return root(sum(gain_squares(f, sizes, rms_base=rms_base, **more).values(), 0.0))


def gain_squares(
    f: AnyNetwork, sizes: Sizes | None = None, /, *, rms_base: Size = 1.0, **more: Size
) -> dict[str, Size]:
    """Return by label the squared gain of each trained factor alone; they add up to the squared gain.

    >>> gain_squares("B[out r] A[r inp] -> out inp", r=2, inp=8)
    {'B': 0.125}
    """
    f, open_ranks = resolve(f)
    bound = open_sizes(f, sizes, open_ranks, more)
    return first_step(f.network, bound, entries_of(f, f.network, bound, rms_base), f.scale)


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


def entries_of(f: Factorization, net: Network, sizes: Mapping[str, Size], rms_base: Size = 1.0) -> dict[str, Entry]:
    """Return by label the entries of every factor at the start."""
    starts = Starts.of(f)
    return {net.label(factor): starts.entry(net, sizes, factor, rms_base) for factor in net.factors}


def squares_on(layout: Layout, rms_base: Size | Mapping[Site, float] = 1.0) -> dict[Site, dict[str, Size]]:
    """Return for every site the squared gains of its trained factors, by label."""
    return {site: squares for site, (_, squares) in starts_on(layout, rms_base).items()}


def starts_on(
    layout: Layout, rms_base: Size | Mapping[Site, float] = 1.0
) -> dict[Site, tuple[dict[str, Entry], dict[str, Size]]]:
    """Return for every site the entries of its factors and the squared gains of the trained ones, by label."""
    f = layout.factorization
    starts = Starts.of(f)
    shared = least_variances(layout, starts)
    data = any(isinstance(given, Spec) and given.name in FROM_BASE for given in starts.named.values())
    found, known = {}, dict[Any, tuple[dict[str, Entry], dict[str, Size]]]()
    for place in layout.site_layouts:
        own = {label: shared[param] for label, param in place.parameters.items() if param in shared}
        base = rms_base[place.site] if isinstance(rms_base, Mapping) else rms_base
        key = (place.line, tuple(place.sizes.items()), tuple(own.items()), base if data else 0)
        if key not in known:
            net, sizes = place.line.network, stacked_sizes(layout, place)
            entries = {}
            for factor in net.factors:
                label = net.label(factor)
                entries[label] = starts.entry(net, sizes, factor, base, own.get(label))
            known[key] = entries, first_step(net, sizes, entries, f.scale)
        found[place.site] = known[key]
    return found


def least_variances(layout: Layout, starts: Starts) -> dict[ParameterSpec, Size]:
    """Return the mean square by the variance rule of every unnamed param: the least that its sites ask for."""
    least: dict[ParameterSpec, Size] = {}
    known: dict[Any, Size] = {}
    for place in layout.site_layouts:
        sizes = stacked_sizes(layout, place)
        for label, param in place.parameters.items():
            key = (place.line, label, tuple(place.sizes.items()))
            if starts.by_rule(label):
                if key not in known:
                    known[key] = starts.variance(place.line.network, sizes, label.removeprefix("~"))
                least[param] = min(least.get(param, known[key]), known[key])
    return least


def stacked_sizes(layout: Layout, place: SiteLayout) -> dict[str, int]:
    """Return a site's sizes with those of the layer and proj axes."""
    return {**place.sizes, "layer": len(layout.layers), "proj": len(layout.projs)}
