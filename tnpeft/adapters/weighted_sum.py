"""The weighted sum of adapters as one adapter: the direct sum of their networks, exact and without a dense matrix."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner

from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.rollback import or_as_before
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.adapters.storage.serialization import lower
from tnpeft.adapters.targets import natural
from tnpeft.layout import Layout, ParameterSpec
from tnpeft.networks import Factor, Factorization, Network, NetworkError, Site, SiteRule, Term


def combine(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Add the adapter ``name`` whose update is the weighted sum of others: one term for each of theirs.

    Weights and scales go into one factor of each term; the result holds its own copies of all factors. It serves the
    sites of all; an adapter acts as zero where it has none.
    """
    configs = [_config(tuner, adapter) for adapter in adapters]
    if len(weights) != len(adapters) or not adapters or not all(map(math.isfinite, weights)):
        raise NetworkError("give one finite weight per adapter", remedy="such as weights=[0.5, 0.5]")
    if name in tuner.peft_config:
        raise NetworkError(f"the adapter {name!r} exists already", remedy="choose another name")
    if any(config.stack != configs[0].stack for config in configs):
        raise NetworkError("the adapters declare different stacks", remedy="keep them apart: set_adapter")
    bank = bank_of(tuner.model, adapters[0])
    found = [config.factorization for config in configs]
    total = direct_sum(found, [[its.site for its in bank.layouts[adapter].site_layouts] for adapter in adapters])
    config = type(configs[0])(network=lower(total), save_frozen=True, task_type=configs[0].task_type)
    config.tokens, config.loaded = configs[0].tokens, True
    config.stack = configs[0].stack
    config.axes = {name: axes for each in configs for name, axes in (each.axes or {}).items()} or None
    for field, value in _targets(configs, [bank.layouts[adapter] for adapter in adapters]).items():
        setattr(config, field, value)
    layers = sorted({path for each in configs for path in each.layers}, key=natural)
    config.layers = {path: k for k, path in enumerate(layers)}
    config.projections = {proj: k for k, proj in enumerate(dict.fromkeys(p for c in configs for p in c.projections))}
    with or_as_before(tuner):
        tuner.peft_config[name] = config
        tuner.inject_adapter(tuner.model, name)
        _fill(tuner, adapters, weights, name, found)


def direct_sum(found: Sequence[Factorization], sites: Sequence[Sequence[Site]]) -> Factorization:
    """The sum of factorizations as one: at each projection the terms of those that serve it.

    Names are numbered so that nothing is shared between the summands.
    """
    first = found[0]
    served: dict[str, dict[int, Network]] = {}  # the networks at a projection by the number of their summand
    for k, (f, its) in enumerate(zip(found, sites, strict=True), start=1):
        if f.square != first.square or dict(f.splits) != dict(first.splits):
            raise _differ(f, first)
        for proj, net in {(site.proj, f.rule_for(site).network): None for site in its}:
            if k in served.setdefault(proj, {}):
                raise _differ(f, first)
            served[proj][k] = net
    rules: dict[Network, list[str]] = {}
    for proj, nets in served.items():
        outputs = {net.output for net in nets.values()}
        if len(outputs) > 1:
            raise _differ(*(found[k - 1] for k in [*nets][:2]))
        terms = tuple(term for k, net in nets.items() for term in _numbered(net, k).terms)
        rules.setdefault(Network(terms, outputs.pop()), []).append(proj)
    used = {name for net in rules for name in (*net.bonds, *map(net.label, net.factors))}

    def numbered(fields: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """A field of all summands, without entries that only lines without a site have."""
        entries = ((f"{name}_{k}", its) for k, field in enumerate(fields, start=1) for name, its in field.items())
        return {name: its for name, its in entries if name in used}

    return replace(
        first,
        name="sum",
        lines=tuple(SiteRule(net, "|".join(projs) if len(rules) > 1 else "*") for net, projs in rules.items()),
        ranks=numbered({bond: _rank(f, bond, k) for bond in f.ranks} for k, f in enumerate(found, start=1)),
        init=numbered(f.init for f in found),
        lr_multiplier=numbered(f.lr_multiplier for f in found),
        unit_norm=tuple(numbered(dict.fromkeys(f.unit_norm) for f in found)),
        scale=1.0,
        source="sum of adapters",
    )


def _rank(f: Factorization, bond: str, k: int) -> int | str:
    """The size of a bond, by numbered names where it is a rule over those of others."""
    rank = f.ranks[bond]
    if not isinstance(rank, str):
        return rank
    return re.sub(r"\w+", lambda word: f"{word[0]}_{k}" if word[0] in f.ranks else word[0], rank)


def _differ(one: Factorization, other: Factorization) -> NetworkError:
    return NetworkError(
        f"{one.name!r} and {other.name!r} differ in lines, outputs or splits and are not one network",
        line=str(one.network),
        remedy="keep both adapters active instead: set_adapter([...])",
    )


def _targets(configs: Sequence[Any], layouts: Sequence[Layout]) -> dict[str, Any]:
    """The fields that choose the modules of all adapters: their lists as one, or the modules by path."""
    names = ("exclude_modules", "layers_to_transform", "layers_pattern")
    found = {name: getattr(configs[0], name) for name in names}
    listed = [config.target_modules for config in configs]
    if all(getattr(config, name) == value for config in configs for name, value in found.items()):
        if all(targets == listed[0] for targets in listed):
            return {**found, "target_modules": listed[0]}
        if all(isinstance(targets, list) for targets in listed):
            return {**found, "target_modules": [*dict.fromkeys(name for targets in listed for name in targets)]}
    paths = dict.fromkeys(its.site.module for layout in layouts for its in layout.site_layouts)
    return {**dict.fromkeys(names), "target_modules": [*paths]}


def carriers(f: Factorization) -> tuple[str, ...]:
    """Labels of trainable factors of which every term has exactly one use: scaling them scales the update."""
    terms = [term for line in f.lines for term in line.network.terms]
    uses = [Counter(factor.name for factor in term.factors if factor.kind == "trainable") for term in terms]
    chosen: list[str] = []
    for k, count in enumerate(uses):
        if any(label in count for label in chosen):
            continue
        fits = [
            label
            for label in count
            if label not in f.unit_norm
            and all(other[label] <= 1 and not (other[label] and any(c in other for c in chosen)) for other in uses)
        ]
        if not fits:
            raise NetworkError(
                f"term {k + 1} of {f.name!r} has no factor of its own that could take a weight",
                line=str(f.network),
                remedy="keep the adapters active together instead: set_adapter([...])",
            )
        chosen.append(fits[0])
    return tuple(chosen)


def _config(tuner: BaseTuner, adapter: str) -> Any:
    bank_of(tuner.model, adapter)
    config = tuner.peft_config[adapter]
    if config.replicas > 1:
        raise NetworkError(
            f"{adapter!r} is {config.replicas} replicas", remedy="take them out with tnpeft.replicas.attach first"
        )
    if config.dora:
        problem = f"{adapter!r} has a magnitude vector, which cannot be summed"
        raise NetworkError(problem, remedy="leave it out of the sum")
    if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
        raise NetworkError(
            f"{adapter!r} trains modules, tokens or biases besides its factors, which cannot be summed",
            remedy="keep such adapters apart: set_adapter, or adapter_names for each row",
        )
    return config


def _numbered(net: Network, k: int) -> Network:
    renamed = net.rename({bond: f"{bond}_{k}" for bond in net.bonds})
    terms = tuple(
        Term(tuple(Factor(f"{f.name}_{k}", f.indices, f.kind) for f in term.factors), term.sign)
        for term in renamed.terms
    )
    return Network(terms, renamed.output)


@torch.no_grad()
def _fill(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    found: list[Factorization],
) -> None:
    bank = bank_of(tuner.model, name)
    places = tuner.peft_config[name].layers
    new = {_place(param): array for param, array in arrays(tuner.model, bank, name).items()}
    own = {}  # the arrays that a summand has
    for k, (adapter, weight, f) in enumerate(zip(adapters, weights, found, strict=True), start=1):
        scaled = carriers(f)
        layers = {position: places[path] for path, position in tuner.peft_config[adapter].layers.items()}
        for param, array in arrays(tuner.model, bank, adapter).items():
            if param.kind != "constant":
                its = replace(param, label=f"{param.label}_{k}", layer=layers.get(param.layer))
                own[_place(its)] = array * (weight * f.scale) if param.label in scaled else array
    for place in _zeros(adapters, bank, bank.layouts[name], own.keys()):
        new[place].zero_()
    for place, array in own.items():
        new[place].copy_(array)


_Place = tuple[str, int | None, str | None, tuple[int, ...], str]


def _place(param: ParameterSpec) -> _Place:
    return param.label, param.layer, param.proj, param.shape, param.home


def _zeros(adapters: Sequence[str], bank: FactorBank, layout: Layout, own: Collection[_Place]) -> set[_Place]:
    """The arrays of the sum that are zero: those that only sites use where a summand has no site."""
    served = {
        (k, its.site.module, its.site.proj)
        for k, name in enumerate(adapters, 1)
        for its in bank.layouts[name].site_layouts
    }
    lacking = {
        place
        for param in layout.parameters
        if param.kind == "trainable"
        and param.label not in layout.factorization.unit_norm
        and (place := _place(param)) not in own
    }
    for site_layout in layout.site_layouts:
        site = site_layout.site
        for term in site_layout.network.terms:
            labels = [site_layout.network.label(factor) for factor in term.factors]
            k = int(labels[0].rpartition("_")[2])
            places = {_place(site_layout.parameters[label]) for label in labels}
            if (k, site.module, site.proj) not in served and places.isdisjoint(lacking):
                raise NetworkError(
                    f"{adapters[k - 1]!r} has no site at {site.module}, and all its factors are shared",
                    remedy="keep the adapters active together instead: set_adapter([...])",
                )
    return lacking
