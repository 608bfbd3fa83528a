"""The weighted sum of adapters as one adapter: the direct sum of their networks, exact and without a dense matrix."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner

from tnpeft.adapters.serialization import lower
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.networks import Factor, Factorization, Network, NetworkError, SiteRule, Term


def combine(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Add the adapter ``name`` whose update is the weighted sum of others: one term for each of theirs.

    Weights and scales go into one factor of each term; the result holds its own copies of all factors.

    Raises:
        NetworkError: the adapters differ in sites, splits or lines, one is a DoRA, trains something besides, or
            normalises the only factors that could take its weight, or the name is taken.
    """
    configs = [_config(tuner, adapter) for adapter in adapters]
    if len(weights) != len(adapters) or not adapters or not all(map(math.isfinite, weights)):
        raise NetworkError("give one finite weight per adapter", remedy="such as weights=[0.5, 0.5]")
    if name in tuner.peft_config:
        raise NetworkError(f"the adapter {name!r} exists already", remedy="choose another name")
    bank = bank_of(tuner.model, adapters[0])
    sites = [{site_layout.site for site_layout in bank.layouts[adapter].site_layouts} for adapter in adapters]
    for adapter, its in zip(adapters, sites, strict=True):
        if its != sites[0]:
            raise NetworkError(
                f"{adapter!r} and {adapters[0]!r} serve other sites", remedy="sum adapters of the same targets"
            )
    found = [config.factorization for config in configs]
    total = direct_sum(found)
    config = type(configs[0])(network=lower(total), save_frozen=True, task_type=configs[0].task_type)
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "tokens"):
        setattr(config, field, getattr(configs[0], field))
    config.layers, config.projections, config.loaded = configs[0].layers, configs[0].projections, True
    tuner.peft_config[name] = config
    try:
        tuner.inject_adapter(tuner.model, name)
        _fill(tuner, adapters, weights, name, found)
    except NetworkError:
        if name in bank_of(tuner.model, adapters[0]).layouts:
            tuner.delete_adapter(name)
        tuner.peft_config.pop(name, None)
        raise


def direct_sum(found: Sequence[Factorization]) -> Factorization:
    """The sum of factorizations as one: the terms of all, names numbered so that nothing is shared between them.

    Raises:
        NetworkError: their lines serve other sites or have other outputs, or their splits differ.

    >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2})
    >>> print(direct_sum([f, f.with_ranks(r=4)]).network)
    B_1[out r_1] A_1[r_1 inp] + B_2[out r_2] A_2[r_2 inp] -> out inp
    """
    first = found[0]
    for f in found:
        same = [line.sites for line in f.lines] == [line.sites for line in first.lines] and f.square == first.square
        outputs = [line.network.output for line in f.lines] == [line.network.output for line in first.lines]
        if not (same and outputs and dict(f.splits) == dict(first.splits)):
            raise NetworkError(
                f"{f.name!r} and {first.name!r} differ in sites, outputs or splits and are no one network",
                line=str(f.network),
                remedy="keep both adapters active instead: set_adapter([...])",
            )
    lines = []
    for lot in zip(*(f.lines for f in found), strict=True):
        numbered = [_numbered(line.network, k) for k, line in enumerate(lot, start=1)]
        terms = tuple(term for net in numbered for term in net.terms)
        lines.append(SiteRule(Network(terms, numbered[0].output), lot[0].sites))
    fields: dict[str, dict[str, Any]] = {"init": {}, "lr_multiplier": {}}
    for k, f in enumerate(found, start=1):
        for name, field in fields.items():
            field |= {f"{label}_{k}": value for label, value in getattr(f, name).items()}
    return replace(
        first,
        name="sum",
        lines=tuple(lines),
        ranks={f"{bond}_{k}": rank for k, f in enumerate(found, start=1) for bond, rank in f.ranks.items()},
        unit_norm=tuple(f"{label}_{k}" for k, f in enumerate(found, start=1) for label in f.unit_norm),
        scale=1.0,
        source="sum of adapters",
        **fields,  # type: ignore[arg-type]
    )


def carriers(f: Factorization) -> tuple[str, ...]:
    """Labels of trainable factors of which every term has exactly one use: scaling them scales the update.

    Raises:
        NetworkError: there is no such choice.

    >>> carriers(Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2}))
    ('B',)
    """
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
    if adapter not in tuner.peft_config:
        raise NetworkError(f"there is no adapter {adapter!r}", remedy=f"there are {', '.join(tuner.peft_config)}")
    config = tuner.peft_config[adapter]
    if config.replicas > 1:
        raise NetworkError(
            f"{adapter!r} is {config.replicas} replicas", remedy="take them out with tnpeft.replicas.attach first"
        )
    if config.dora:
        raise NetworkError(f"{adapter!r} has a magnitude vector and is no sum", remedy="leave it out of the sum")
    if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
        raise NetworkError(
            f"{adapter!r} trains modules, tokens or biases beside its factors, which are no sum",
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


def _fill(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    found: list[Factorization],
) -> None:
    bank = bank_of(tuner.model, name)
    new = {(p.label, p.layer, p.proj, p.shape, p.home): a for p, a in arrays(tuner.model, bank, name).items()}
    with torch.no_grad():
        for k, (adapter, weight, f) in enumerate(zip(adapters, weights, found, strict=True), start=1):
            scaled = carriers(f)
            for param, array in arrays(tuner.model, bank, adapter).items():
                if param.kind != "constant":
                    key = (f"{param.label}_{k}", param.layer, param.proj, param.shape, param.home)
                    if key not in new:
                        raise NetworkError(
                            f"{adapter!r} serves other sites", remedy="sum adapters of the same targets"
                        )
                    new[key].copy_(array * (weight * f.scale) if param.label in scaled else array)
