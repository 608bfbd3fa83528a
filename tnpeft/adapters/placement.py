"""Laying an adapter's factors out over a model: sites, arrays, start values, and the checks before any is made."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from tnpeft.adapters.sites.selection import one_value
from tnpeft.adapters.sites.weight import Weight
from tnpeft.adapters.storage.contents import check_contents, contents
from tnpeft.adapters.targets import select
from tnpeft.counting.cuts import warn_ranks
from tnpeft.layout import Layout, ParameterSpec, layout
from tnpeft.networks import REPLICA, ConfigError, Factorization, NetworkError, Site, SiteRule
from tnpeft.nn.executor.grouped import grouped_program
from tnpeft.nn.executor.program import program
from tnpeft.nn.init.initializer import Initializer, factor_hash

if TYPE_CHECKING:
    from tnpeft.adapters.config import TensorNetworkConfig

_MOST = 16  # times the model's own parameters: more is a slip or a hostile file
_LEAST = 2**22  # elements that are always allowed
_LEAST_ROW = 2**14  # the same for each row of activations
_MOST_STEP = 256  # times the linear's elements, or its inputs and outputs; C3A and RandLoRA pass through 16 to 32


def base_constants(f: Factorization) -> tuple[str, ...]:
    """Labels of the constant factors that are the base weight itself: read where it lies, never copied."""
    kinds = {line.network.label(factor): factor.kind for line in f.lines for factor in line.network.factors}
    named = {label: value for label, value in f.init.items() if isinstance(value, str | list)}  # arrays are data
    return tuple(
        label for label, kind in kinds.items() if kind == "constant" and named.get(label) in ("base", ["base"])
    )


def build_layout(model: nn.Module, weights: Mapping[str, Weight], config: TensorNetworkConfig) -> Layout:
    """The layout of the configuration's network on the model's chosen weights.

    The order of layers and projections is written into the configuration; if a file fixed it, it has to agree.
    """
    saved = config.loaded
    places = config.projections or {}
    order = sorted(places, key=places.__getitem__) if saved else config.named
    chosen = select(model, weights, order, config.layers if saved else None)
    if saved and config.projections != chosen.projections:
        raise NetworkError(
            f"the adapter was made for {', '.join(config.projections or {})}, "
            f"and this model offers {', '.join(chosen.projections)}",
            remedy="load it onto the model class that it was trained on",
        )
    found = layout(config.factorization, chosen.sites, [*chosen.projections], stack=config.stack)
    check_experts(found)
    check_slices(found)
    check_patterns(config.factorization, config.patterns, [site_layout.site for site_layout in found.site_layouts])
    if config.replicas > 1 and any(site_layout.site.experts for site_layout in found.site_layouts):
        raise ConfigError(
            "experts cannot be trained as several replicas: their rows are not in blocks",
            remedy="leave the experts out of target_modules, or train one adapter at a time",
        )
    if config.replicas > 1:
        found = layout(config.side_by_side, chosen.sites, found.projs, stack={REPLICA: config.replicas})
    if not found.count():
        raise NetworkError(
            "the network has nothing to train",
            line=str(config.factorization.network),
            remedy="declare at least one factor without ~ (frozen) or ^ (constant)",
        )
    count = found.count(frozen=True)
    most = max(_LEAST, _MOST * sum(p.numel() for p in model.parameters()))
    if count > most:
        raise NetworkError(
            f"the network would hold {count:,} elements on this model, of which {most:,} are allowed",
            line=str(config.factorization.network),
            remedy="choose smaller ranks",
        )
    check_memory(found, config.tokens, refused=saved)
    its = contents(model, config, found)
    if config.stored is not None:
        check_contents(config.stored, its, SAFETENSORS_WEIGHTS_NAME)
    if not saved:
        for line, sizes in {(p.line.network, tuple(p.sizes.items())): None for p in found.site_layouts}:
            warn_ranks(line, dict(sizes))
    config.layers, config.projections = dict(chosen.layers), dict(chosen.projections)
    return found


def check_memory(found: Layout, tokens: int, refused: bool = True) -> None:
    """Raise, or warn, if a result on the way to an update is absurdly larger than what the linear has and creates."""
    kinds = {(its.network, tuple(its.sizes.items())): its.site for its in found.site_layouts}
    for (net, sizes), site in kinds.items():
        make: Any = grouped_program if site.experts else program
        run = make(*one_value(net, dict(sizes), () if site.experts else ("expert",))[:2], tokens=tokens)
        for step in (*run.plan.steps, *run.fused_plan.steps):
            if step.kind == "reshape":  # creates nothing, and its indices are groups
                continue
            row = run.plan.activation in step.indices
            names = [name for index in step.indices for name in index.strip("()").split()]  # "(o1 o2)" is fused
            size = math.prod(int(run.plan.sizes[name]) for name in names if name != run.plan.activation)
            own = site.out + site.inp if row else site.out * site.inp
            most = max(_LEAST_ROW if row else _LEAST, _MOST_STEP * own) * run.replicas
            if size <= most:
                continue
            error = ConfigError(
                f"the update of {site.proj} ({site.out} x {site.inp}) passes through {size:,} elements"
                f"{' for each row of activations' if row else ''}, of which {most:,} are allowed in a folder",
                line=str(net),
                remedy="choose smaller ranks, or let factors share fewer bonds",
            )
            if refused:
                raise error
            warnings.warn(str(error), stacklevel=2)
            break


def check_experts(found: Layout) -> None:
    """Raise if lines with the index ``expert`` serve no experts, or a constant without it stands for several of them.

    Beside weights of experts, a linear is one expert.
    """
    several = any(site_layout.site.experts for site_layout in found.site_layouts)
    for site_layout in found.site_layouts:
        net, site = site_layout.line.network, site_layout.site
        if "expert" in net.indices and not several:
            raise ConfigError(
                f"the index 'expert' has no meaning on {site.proj} ({site.out} x {site.inp}): it is one matrix, "
                "not one for every expert",
                line=str(net),
                position=str(net).index("expert"),
                remedy="leave 'expert' out of the line, or target weights that hold one matrix for every expert",
            )
        for label in base_constants(found.factorization) if site.experts else ():
            if label in site_layout.parameters and "expert" not in site_layout.parameters[label].indices:
                raise ConfigError(
                    f"the base weight {label} of {site.proj} is {site.experts} matrices, one for every expert",
                    line=str(site_layout.line.network),
                    position=str(site_layout.line.network).index(label),
                    remedy=f"let it carry the index 'expert', as in ^{label}[layer proj expert out inp]",
                )


def check_slices(found: Layout) -> None:
    """Raise if a site of one matrix is a slice of rows and of columns: layers know slices of one side."""
    for site in (site_layout.site for site_layout in found.site_layouts):
        if "/out:" in site.proj and "/inp:" in site.proj and not site.experts:
            whole, _, own = site.proj.partition("/")
            raise NetworkError(
                f"{whole}/{own.partition('/')[0]} is a slice of {whole}, and cut into squares it would be slices of "
                "rows and columns at once",
                remedy="leave this projection out, or choose a factorization without square slices",
            )


def check_patterns(f: Factorization, patterns: Sequence[str], sites: Sequence[Site]) -> None:
    """Raise if an entry of a rank pattern, or one of the names in it, decides the ranks of no site."""
    projs = ", ".join(dict.fromkeys(site.proj for site in sites))
    used = {f.rule_for(site).sites for site in sites}
    for pattern in patterns:
        for name in map(str.strip, pattern.split("|")):
            if not any(SiteRule(f.network, name).serves(site) for site in sites):
                raise NetworkError(
                    f"the rank pattern names {name!r}, and no adapted projection is called so",
                    remedy=f"the adapted projections are {projs}",
                )
        if pattern not in used:
            raise NetworkError(
                f"the rank pattern's entry {pattern!r} is never used: earlier entries take all its projections",
                remedy="put it before them, or leave it out",
            )


def start_values(
    config: TensorNetworkConfig, found: Layout, weight: Callable[[Site], Tensor]
) -> dict[ParameterSpec, Tensor]:
    """The start value of every array of the layout, fp32 on the CPU; the base weight itself is left out."""
    constants = base_constants(config.factorization)
    layouts = [extract_replica(found, config.of_replica(k)) for k in range(config.replicas)]
    started = []
    for one, seed in zip(layouts, config.seeds, strict=True):
        starter = Initializer(one, seed, weight)
        if starter.away and not config.loaded:
            warnings.warn(
                f"the update is not zero at the start, for no factor can be: {starter.away}; if that is meant, name "
                'the start of every factor, init={"A": "normal(0.02)"}',
                stacklevel=2,
            )
        started.append({param: starter(param) for param in one.parameters if param.label not in constants})
    hashes = frozen_hashes(started[0])
    if config.replicas > 1:
        hashes = {f"{label}/{k}": its for k, own in enumerate(started) for label, its in frozen_hashes(own).items()}
    pairs = [dict(match_parameters(found, one)) for one in layouts]
    values = {
        many: _side_by_side(many, [own[its[many]] for own, its in zip(started, pairs, strict=True)])
        if many in pairs[0]
        else torch.tensor(found.factorization.init[many.label], dtype=torch.float32)  # masks and scales
        for many in found.parameters
        if many.label not in constants
    }
    if config.loaded and not config.save_frozen and (config.frozen or {}) != hashes:
        changed = sorted(label for label in hashes if (config.frozen or {}).get(label) != hashes[label])
        raise NetworkError(
            f"the frozen factor {', '.join(changed) or 'of the file'} regenerated from seed {config.seed} "
            "is not the one that the adapter was trained with",
            remedy="save the adapter with save_frozen=True where it was trained, then load that",
        )
    if not (config.loaded and config.save_frozen and config.frozen):  # else the file's own take their place
        config.frozen = hashes
    return values


def extract_replica(found: Layout, f: Factorization) -> Layout:
    """The layout of one replica, ``f`` on the same sites."""
    if REPLICA not in found.factorization.network.stack:
        return found
    return layout(f, [p.site for p in found.site_layouts], found.projs)


def match_parameters(found: Layout, one: Layout) -> list[tuple[ParameterSpec, ParameterSpec]]:
    """The pieces of replicas, but for masks and scales, each with that of one of them."""
    labels = {param.label for param in one.parameters}
    pieces = [param for param in found.parameters if param.label in labels]
    kinds = [[(p.label, p.layer, p.proj, p.home) for p in its] for its in (pieces, one.parameters)]
    if kinds[0] != kinds[1]:
        raise NetworkError(
            "the ranks of one replica let projections share a factor, and those of others do not",
            remedy="give all replicas equal ranks at the same projections, or train them apart",
        )
    return list(zip(pieces, one.parameters, strict=True))


def _side_by_side(param: ParameterSpec, values: list[Tensor]) -> Tensor:
    """The values of all replicas in one array, padded with zeros; of a constant the one that all have."""
    if REPLICA in param.indices:
        array = torch.zeros(param.shape)
        for k, value in enumerate(values):
            array[(k, *map(slice, value.shape))] = value
        return array
    whole = max(values, key=Tensor.numel)
    others = (value for value in values if value is not whole)
    if any(not torch.equal(value, whole[tuple(map(slice, value.shape))]) for value in others):
        raise NetworkError(
            f"the constant {param.label!r} differs from seed to seed or rank to rank, and replicas share constants",
            remedy=f"declare it frozen, ~{param.label}: each replica then has its own",
        )
    return whole


def frozen_hashes(values: Mapping[ParameterSpec, Tensor]) -> dict[str, str]:
    """A short hash of every frozen factor, by label, over its arrays in the layout's order."""
    found: dict[str, str] = {}
    for param, value in values.items():
        if param.kind == "frozen":
            chain = found.get(param.label, "") + factor_hash(value)
            found[param.label] = hashlib.sha256(chain.encode()).hexdigest()[:16]
    return found
