"""tnpeft's own adapter folders: from lines to the files that PeftModel.from_pretrained reads, and back."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from tnpeft.adapters.config import TensorNetworkConfig
from tnpeft.adapters.constants import PREFIX as OURS
from tnpeft.adapters.convert.formats import KOHYA, LYCORIS, PEFT, PER_EXPERT, SHARED_OUTER
from tnpeft.adapters.convert.lines import AdapterLines, SiteAdapter, grown
from tnpeft.adapters.convert.read import ABOUT, Shapes, Source, shape_of
from tnpeft.adapters.layer.bank import BANK
from tnpeft.adapters.placement import frozen_hashes
from tnpeft.adapters.storage.contents import PEFT_PREFIX, factor_shapes
from tnpeft.adapters.storage.files import save
from tnpeft.adapters.storage.stored_sites import StoredFactors
from tnpeft.adapters.targets import names_by_path, natural, on_card
from tnpeft.layout import Layout, ParameterSpec, layout, sorted_projs
from tnpeft.models import Card
from tnpeft.networks import AdapterFileError, ConfigError, Factorization, Network, NetworkError, Site, SiteRule

_NOTE = "tnpeft_converted"  # entry of the file's header: axes of every array, ranks and scales as in the source
_Group = tuple[Network, tuple[tuple[str, int], ...]]


# ---- writing


def write_folder(lines: AdapterLines, folder: Path, to: str, card: Card | None) -> bool:
    """Write the lines as a tnpeft adapter; true if that rounds them, as scales that differ go into factors."""
    names = _names([site.module for site in lines.sites], card)
    scale = Counter(site.scale for site in lines.sites).most_common(1)[0][0]
    ranks = {site.module: _ranks(site) for site in lines.sites}
    sites = _padded([site.scaled(scale) for site in lines.sites], names)
    places = {name: k for k, name in enumerate(sorted({layer for layer, _ in names.values()}, key=natural))}
    f, chosen = _factorization(sites, names, places, scale)
    placed = layout(f, list(chosen.values()))
    values = _values(placed, {site.module: site for site in sites})
    magnitudes = {site.module: site.magnitude for site in sites if site.magnitude is not None}
    if magnitudes and len(magnitudes) != len(sites):
        raise ConfigError("some sites have a DoRA magnitude and others none", remedy="convert them apart")
    config = TensorNetworkConfig(
        network=f,
        target_modules=[site.module for site in sites],
        dora=bool(magnitudes),
        save_frozen=any(param.kind == "frozen" for param in placed.parameters),
        **{key: value for key, value in lines.about.items() if key != "fan_in_fan_out" and value is not None},
    )
    config.layers, config.projections = places, {proj: k for k, proj in enumerate(placed.projs)}
    config.frozen = frozen_hashes(values)
    config.inference_mode = True
    arrays = {f"{param.home or BANK}.{OURS}factors.{param.key}": value for param, value in values.items()}
    arrays |= {f"{module}.{OURS}magnitude": value for module, value in magnitudes.items()}
    assert {name: tuple(value.shape) for name, value in arrays.items()} == factor_shapes(config, placed)
    axes = {param.key: list(param.indices) for param in placed.parameters}
    scales = {site.module: site.scale for site in lines.sites if site.scale != scale}
    padded = {site.module: ranks[site.module] for site in sites if ranks[site.module] != _ranks(site)}
    config.save_pretrained(str(folder))
    save(
        {f"{PEFT_PREFIX}{name}": value for name, value in {**arrays, **lines.others}.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        {_NOTE: json.dumps({"axes": axes, "ranks": padded, "scales": scales}, sort_keys=True)},
    )
    return bool(scales)


def _names(modules: Sequence[str], card: Card | None) -> dict[str, tuple[str, str]]:
    """The layer and the projection of every module, by the model's card where it is known."""
    found: dict[str, tuple[str, str]] = {}
    for module in modules:
        for layer, p in on_card(card, module):
            if "/" in p.name and not p.experts:
                raise ConfigError(
                    f"{module} is several projections in one ({p.name}, ...), each a site of its own",
                    remedy='convert it to="lora" and load that with PEFT',
                )
            found[module] = layer, p.name.partition("/")[0]
    return found | names_by_path([module for module in modules if module not in found])


def _ranks(site: SiteAdapter) -> dict[str, int]:
    return {bond: site.sizes[bond] for bond in site.network.bonds}


def _padded(sites: Sequence[SiteAdapter], names: Mapping[str, tuple[str, str]]) -> list[SiteAdapter]:
    """The sites with the bonds of a projection equally large in all layers: zeros fill the smaller ones."""
    most: Counter[tuple[str, Network, str]] = Counter()
    for site in sites:
        most |= Counter({(names[site.module][1], site.network, bond): rank for bond, rank in _ranks(site).items()})
    wide = []
    for site in sites:
        proj = names[site.module][1]
        sizes = {index: most[proj, site.network, index] or size for index, size in site.sizes.items()}
        axes = {site.network.label(factor): factor.indices for factor in site.network.factors}
        factors = {label: grown(its, [sizes[index] for index in axes[label]]) for label, its in site.factors.items()}
        wide.append(replace(site, factors=factors))
    return wide


def _whole(net: Network) -> Network:
    """The site's line with the stack put back: what the format declares, found by the line of one site."""
    known = (*(p for packings in PEFT.values() for p in packings), PER_EXPERT, *SHARED_OUTER, *KOHYA, *LYCORIS)
    for packing in known:
        if packing.site == net:
            return packing.network
    raise ConfigError("the line belongs to no format", line=str(net), remedy='convert it to="lora"')


def _factorization(
    sites: Sequence[SiteAdapter],
    names: Mapping[str, tuple[str, str]],
    places: Mapping[str, int],
    scale: float,
) -> tuple[Factorization, dict[str, Site]]:
    by_proj: dict[str, dict[_Group, list[SiteAdapter]]] = {}
    for site in sites:
        group = site.network, tuple(sorted(_ranks(site).items()))
        by_proj.setdefault(names[site.module][1], {}).setdefault(group, []).append(site)
    groups: dict[_Group, list[str]] = {}
    for proj, kinds in by_proj.items():
        if len(kinds) > 1:
            raise ConfigError(
                f"the layers of {proj} are updated by different lines: "
                f"{' and '.join(str(net) for net, _ in list(kinds)[:2])}",
                remedy="convert these layers apart",
            )
        groups.setdefault(next(iter(kinds)), []).append(proj)
    usual = max(groups, key=lambda group: len(groups[group]))
    rules, ranks = [], {}
    for number, (group, projs) in enumerate(sorted(groups.items(), key=lambda item: item[0] == usual)):
        net = _whole(group[0])
        new = {bond: bond if group == usual else f"{bond}_{number + 1}" for bond, _ in group[1]}
        ranks |= {new[bond]: rank for bond, rank in group[1]}
        rules.append(SiteRule(net.rename(new), "*" if group == usual else "|".join(projs)))
    chosen = {}
    for site in sites:
        layer, proj = names[site.module]
        out, inp = site.shape
        chosen[site.module] = Site(places[layer], proj, out, inp, 0, site.module, 0, site.sizes.get("expert", 0))
    base = Factorization(name="converted", lines=tuple(rules), ranks=ranks, scale=scale, source="converted (derived)")
    order = sorted_projs({site.proj for site in chosen.values()})
    chosen = dict(sorted(chosen.items(), key=lambda item: (item[1].layer, order.index(item[1].proj))))
    return replace(base, splits=_splits(base, sites, chosen)), chosen


def _splits(f: Factorization, sites: Sequence[SiteAdapter], chosen: Mapping[str, Site]) -> dict[str, Any]:
    """The splits that give every site the sizes it has: none if the even split does, else one digit held fixed."""
    found: dict[str, Any] = {}
    for k, side in enumerate(("out", "inp")):
        wanted = {site.module: {i: site.sizes[i] for i in site.network.output[k - 2]} for site in sites}
        shapes = [tuple(sizes.values()) for sizes in wanted.values()]
        if all(len(shape) == 1 for shape in shapes):
            continue
        fixed = [
            {side: tuple(size if axis == place else None for axis in range(len(shapes[0])))}
            for place in range(len(shapes[0]))
            for size in {shape[place] for shape in shapes}
        ]
        given = next((splits for splits in ({}, *fixed) if _gives(f, splits, chosen, wanted)), None)
        if given is None:
            raise ConfigError(
                f"the sites split their {side} sides in ways that no one rule gives", remedy="convert them apart"
            )
        found |= given
    return found


def _gives(
    f: Factorization, splits: dict[str, Any], chosen: Mapping[str, Site], wanted: Mapping[str, Mapping[str, int]]
) -> bool:
    """True if splits give the indices of every site the sizes that are wanted."""
    trial = replace(f, splits=splits)
    try:
        sizes = {m: trial.sizes(out=its.out, inp=its.inp, line=trial.rule_for(its)) for m, its in chosen.items()}
        return all(sizes[module][i] == size for module, its in wanted.items() for i, size in its.items())
    except (NetworkError, KeyError):
        return False


def _values(placed: Layout, sites: Mapping[str, SiteAdapter]) -> dict[ParameterSpec, Tensor]:
    values: dict[ParameterSpec, Tensor] = {}
    for site_layout in placed.site_layouts:
        site = sites[site_layout.site.module]
        for label, param in site_layout.parameters.items():
            value = site.factors[label]
            if not torch.equal(values.setdefault(param, value), value):
                raise ConfigError(f"{label} differs between sites that share it", remedy="convert them apart")
    return values


# ---- reading


def read_folder(path: Path, tensors: Mapping[str, Tensor], shapes: Shapes) -> Source:
    """A tnpeft adapter as lines; its updates are contracted from the stored factors."""
    config = TensorNetworkConfig.from_pretrained(str(path))
    f = config.factorization
    refused = {
        "replicas": config.replicas > 1,
        "trained biases": config.bias != "none",
        "trained tokens": config.trainable_token_indices is not None,
        "constant factors": any(a.kind == "constant" for rule in f.lines for a in rule.network.factors),
        "columns of unit norm": bool(f.unit_norm),
        "square slices": f.square,
        "resized embeddings": bool(config.embeddings),
    }
    for what, there in refused.items():
        if there:
            raise ConfigError(
                f"an adapter with {what} is not converted", remedy="use tnpeft.export_lora(model, path) instead"
            )
    stored = StoredFactors(config, {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()})
    if not stored.homes:
        raise ConfigError(
            "no site has a factor of its own, so the file does not tell which modules are adapted",
            remedy="use tnpeft.export_lora(model, path) instead",
        )
    end = f".{OURS}magnitude"
    magnitudes = {name.removesuffix(end): its for name, its in stored.others.items() if name.endswith(end)}
    others = {name: its for name, its in stored.others.items() if not name.endswith(end)}
    for name in others:
        if not any(f".{part}." in f".{name}." for part in config.modules_to_save or ()):
            raise AdapterFileError(f"{name} is not part of an adapter that can be converted", remedy="take it out")
    ranks, scales = _note(path)
    found, updates = [], []
    for module, part in stored.homes:
        site = _site(stored, module, part, shape_of(module, shapes), float(f.scale))
        updates.append(np.asarray(site.dense().numpy()))
        for bond, rank in ranks.get(module, {}).items():
            site = _narrowed(site, bond, rank)
        found.append(replace(site.scaled(scales.get(module, site.scale)), magnitude=magnitudes.get(module)))
    about = {key: getattr(config, key) for key in ABOUT}
    return Source("tnpeft", AdapterLines(tuple(found), about, others), tuple(updates))


def _site(stored: StoredFactors, module: str, part: str, shape: tuple[int, int] | None, scale: float) -> SiteAdapter:
    place = None if part else stored.place(module)
    if place is None:
        raise ConfigError(
            f"{module} is adapted slice by slice ({part})"
            if part
            else f"{module} is none of the layers and projections that the configuration names",
            remedy="adapters on slices of a fused weight are exported with tnpeft.export_lora(model, path)",
        )
    found = stored.site(module, part, *place, dict(zip(("out", "inp"), shape or (), strict=False)))
    if found is None or len(found.factors) < len(found.network.factors):
        raise ConfigError(
            f"the file does not hold every factor of {module}",
            remedy="pass model=, and save the adapter with save_frozen=True, so that its frozen factors are in the "
            "file",
        )
    return SiteAdapter(module, found.network, found.factors, scale)


def _note(path: Path) -> tuple[dict[str, dict[str, int]], dict[str, float]]:
    """The ranks and scales that sites had in the source of an earlier conversion."""
    from safetensors import safe_open

    with safe_open(path / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        text = (file.metadata() or {}).get(_NOTE, "{}")
    try:
        data = json.loads(text)
        ranks = {str(m): {str(b): int(r) for b, r in its.items()} for m, its in data.get("ranks", {}).items()}
        scales = {str(m): float(s) for m, s in data.get("scales", {}).items() if float(s) != 0}
        return ranks, scales
    except (ValueError, AttributeError, TypeError):
        raise AdapterFileError(f"the header entry {_NOTE} is damaged", remedy="copy the adapter again") from None


def _narrowed(site: SiteAdapter, bond: str, rank: int) -> SiteAdapter:
    """The site with a bond cut back to its rank before padding, if what is cut is still zero."""
    bond = next((b for b in site.network.bonds if b == bond or re.fullmatch(rf"{re.escape(bond)}_\d+", b)), bond)
    factors = dict(site.factors)
    for factor in site.network.factors:
        label = site.network.label(factor)
        if bond in factor.indices:
            axis = factor.indices.index(bond)
            size = factors[label].shape[axis]
            if not 0 < rank <= size or factors[label].narrow(axis, rank, size - rank).any():
                return site
            factors[label] = factors[label].narrow(axis, 0, rank).contiguous()
    return replace(site, factors=factors)
