"""tnpeft's own adapter folders: from lines to the files that PeftModel.from_pretrained reads, and back."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from tnpeft.adapters.config import TensorNetworkConfig
from tnpeft.adapters.constants import PREFIX as OURS
from tnpeft.adapters.convert.formats import TARGETS
from tnpeft.adapters.convert.lines import AdapterLines, SiteAdapter, grown
from tnpeft.adapters.convert.read import ABOUT, Shapes, shape_of
from tnpeft.adapters.layer.bank import BANK
from tnpeft.adapters.placement import frozen_hashes
from tnpeft.adapters.storage.contents import PEFT_PREFIX, factor_shapes
from tnpeft.adapters.storage.files import save
from tnpeft.adapters.storage.stored_sites import StoredFactors
from tnpeft.adapters.targets import names_by_path, natural, on_card
from tnpeft.layout import Layout, ParameterSpec, layout, sorted_projs
from tnpeft.models import Card
from tnpeft.networks import AdapterFileError, ConfigError, Factorization, Network, NetworkError, Site, SiteRule
from tnpeft.nn.dense import dense

_NOTE = "tnpeft_converted"  # entry of the file's header: axes of every array, ranks and scales as in the source


# ---- writing


def write_folder(lines: AdapterLines, folder: Path, to: str, card: Card | None) -> bool:
    """Write the lines as a tnpeft adapter; true if that rounds them, as scales that differ go into factors."""
    names = _names([site.module for site in lines.sites], card)
    scale = Counter(site.scale for site in lines.sites).most_common(1)[0][0]
    places = {name: k for k, name in enumerate(sorted({layer for layer, _ in names.values()}, key=natural))}
    chosen = {}
    for site in lines.sites:
        layer, proj = names[site.module]
        out, inp = site.shape
        chosen[site.module] = Site(places[layer], proj, out, inp, 0, site.module, 0, site.sizes.get("expert", 0))
    sites = [site.scaled(scale) for site in lines.sites]
    f = _factorization(sites, chosen, scale)
    order = sorted_projs({proj for _, proj in names.values()})
    placed = layout(f, sorted(chosen.values(), key=lambda site: (site.layer, order.index(site.proj))))
    values, padded = _values(placed, {site.module: site for site in sites})
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


def _factorization(sites: Sequence[SiteAdapter], chosen: Mapping[str, Site], scale: float) -> Factorization:
    """The lines of all projections; a bond is as large as the largest of a projection's layers has it."""
    kinds: dict[str, dict[Network, Counter[str]]] = {}
    for site in sites:
        ranks = kinds.setdefault(chosen[site.module].proj, {}).setdefault(site.network, Counter())
        ranks |= Counter({bond: site.sizes[bond] for bond in site.network.bonds})
    groups: dict[tuple[Network, tuple[tuple[str, int], ...]], list[str]] = {}  # projections by line and ranks
    for proj, its in kinds.items():
        if len(its) > 1:
            raise ConfigError(
                f"the layers of {proj} are updated by different lines: {' and '.join(map(str, list(its)[:2]))}",
                remedy="convert these layers apart",
            )
        [(net, ranks)] = its.items()
        groups.setdefault((net, tuple(sorted(ranks.items()))), []).append(proj)
    usual = max(groups, key=lambda group: len(groups[group]))
    rules, sizes = [], {}
    for number, (group, projs) in enumerate(sorted(groups.items(), key=lambda item: item[0] == usual)):
        net = next((p.network for packings in TARGETS.values() for p in packings if p.site == group[0]), None)
        if net is None:
            raise ConfigError("the line belongs to no format", line=str(group[0]), remedy='convert it to="lora"')
        new = {bond: bond if group == usual else f"{bond}_{number + 1}" for bond, _ in group[1]}
        sizes |= {new[bond]: rank for bond, rank in group[1]}
        rules.append(SiteRule(net.rename(new), "*" if group == usual else "|".join(projs)))
    f = Factorization(name="converted", lines=tuple(rules), ranks=sizes, scale=scale, source="converted (derived)")
    return replace(f, splits=_splits(f, sites, chosen))


def _splits(f: Factorization, sites: Sequence[SiteAdapter], chosen: Mapping[str, Site]) -> dict[str, Any]:
    """The splits that give every site the sizes it has: none if the even split does, else one digit held fixed."""
    found: dict[str, Any] = {}
    for k, side in enumerate(("out", "inp")):
        wanted = {site.module: {i: site.sizes[i] for i in site.network.output[k - 2]} for site in sites}
        shapes = [tuple(sizes.values()) for sizes in wanted.values()]
        parts = range(len(shapes[0]))
        if all(len(shape) == 1 for shape in shapes):
            continue
        fixed = [
            {side: tuple(size if part == place else None for part in parts)}
            for place in parts
            for size in {shape[place] for shape in shapes}
        ]
        given = next((splits for splits in ({}, *fixed) if _gives(replace(f, splits=splits), chosen, wanted)), None)
        if given is None:
            raise ConfigError(
                f"the sites split their {side} sides in ways that no one rule gives", remedy="convert them apart"
            )
        found |= given
    return found


def _gives(f: Factorization, chosen: Mapping[str, Site], wanted: Mapping[str, Mapping[str, int]]) -> bool:
    """True if the indices of every site have the sizes that are wanted."""
    try:
        sizes = {m: f.sizes(out=its.out, inp=its.inp, line=f.rule_for(its)) for m, its in chosen.items()}
        return all(sizes[module][i] == size for module, its in wanted.items() for i, size in its.items())
    except (NetworkError, KeyError):
        return False


def _values(
    placed: Layout, sites: Mapping[str, SiteAdapter]
) -> tuple[dict[ParameterSpec, Tensor], dict[str, dict[str, int]]]:
    """The arrays, smaller ones filled with zeros, and the ranks of the sites that have such."""
    values: dict[ParameterSpec, Tensor] = {}
    padded = {}
    for site_layout in placed.site_layouts:
        site = sites[site_layout.site.module]
        for label, param in site_layout.parameters.items():
            value = grown(site.factors[label], param.shape)
            if value.shape != site.factors[label].shape:
                padded[site.module] = {bond: site.sizes[bond] for bond in site.network.bonds}
            if not torch.equal(values.setdefault(param, value), value):
                raise ConfigError(f"{label} differs between sites that share it", remedy="convert them apart")
    return values, padded


# ---- reading


def read_folder(path: Path, tensors: Mapping[str, Tensor], shapes: Shapes) -> AdapterLines:
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
    found = []
    for module, part in stored.homes:
        site = _site(stored, module, part, shape_of(module, shapes), float(f.scale))
        for bond, rank in ranks.get(module, {}).items():
            site = _narrowed(site, bond, rank)
        found.append(replace(site.scaled(scales.get(module, site.scale)), magnitude=magnitudes.get(module)))
    return AdapterLines(found, {key: getattr(config, key) for key in ABOUT}, others, "tnpeft")


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
    update = dense(found.network, {label: value.double() for label, value in found.factors.items()})
    return SiteAdapter(module, found.network, found.factors, scale, update=scale * update.numpy())


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
        if bond in factor.indices:
            label = site.network.label(factor)
            kept, padding = factors[label].tensor_split([rank], factor.indices.index(bond))
            if rank < 1 or padding.any():
                return site
            factors[label] = kept.contiguous()
    return replace(site, factors=factors)
