"""Writing adapters: lines into PEFT's folders, trainers' files and GGUF, each site in a packing that holds it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from tnpeft.adapters.convert.formats import ALPHA, LORA, NESTED, PEFT, TARGETS, Packing
from tnpeft.adapters.convert.lines import AdapterLines, SiteAdapter, grown, pack, parse
from tnpeft.adapters.experts.fused import parameter_place
from tnpeft.adapters.storage.contents import PEFT_PREFIX
from tnpeft.adapters.storage.files import save
from tnpeft.networks import ConfigError
from tnpeft.nn.lowrank import cut_rank, sides


def fitted(site: SiteAdapter, packing: Packing) -> SiteAdapter | None:
    """The site with the packing's names of factors and indices, None if its line is another one."""
    ours, theirs = site.network, packing.site
    if len(ours.terms) != 1 or ours.terms[0].sign < 0 or ours.stack != theirs.stack:
        return None
    if [*map(len, ours.output)] != [*map(len, theirs.output)]:
        return None
    if not len(ours.terms[0].factors) == len(ours.factors) == len(theirs.factors):
        return None
    for order in permutations(ours.factors):
        names = dict(zip(ours.outer, theirs.outer, strict=True))
        factors: dict[str, Tensor] = {}
        for mine, other in zip(order, theirs.factors, strict=True):
            new = [index for index in mine.indices if index not in names]
            rest = [index for index in other.indices if index not in names.values()]
            names |= dict(zip(new, rest, strict=False))
            named = [names.get(index, "") for index in mine.indices]
            if mine.kind != other.kind or {*named} != {*other.indices}:
                break
            value = site.factors[ours.label(mine)]
            factors[theirs.label(other)] = value.permute([named.index(index) for index in other.indices])
        else:
            return replace(site, network=theirs, factors=factors)
    return None


def held(site: SiteAdapter, packings: Sequence[Packing]) -> tuple[Packing, SiteAdapter]:
    """The first packing that holds the site's line; else LoRA through the smallest cut, exactly (of every expert)."""
    for packing in packings:
        if (found := fitted(site, packing)) is not None:
            return packing, found
    net, sizes = site.network, site.sizes
    experts = net.stack == ("expert",)
    target = next((p for p in packings if p.site == (NESTED if experts else LORA).site), None)
    if target is None or net.stack not in ((), ("expert",)):
        raise ConfigError(
            f"the target has no packing for the line of {site.module}",
            line=str(net),
            remedy=f"it holds {' or '.join(str(packing.site) for packing in packings)}",
        )
    if cut_rank(net.select(*net.stack), sizes) >= min(site.shape):
        raise ConfigError(
            f"no low-rank pair holds the update of {site.module} exactly",
            line=str(net),
            remedy="use tnpeft.export_lora(model, path, rank=...), which states its error",
        )
    values = {label: value.double() for label, value in site.factors.items()}
    pairs = [
        sides(net, sizes, values, **dict.fromkeys(net.stack, k)) for k in range(sizes["expert"] if experts else 1)
    ]
    dtype = next(iter(site.factors.values())).dtype
    b, a = (torch.stack(matrices).to(dtype) for matrices in zip(*pairs, strict=True))
    factors = {"B": b, "A": a} if experts else {"B": b[0], "A": a[0]}
    return target, replace(site, network=target.site, factors=factors, rounded=True)


def stored(packing: Packing, site: SiteAdapter) -> dict[str, Tensor]:
    """The site's tensors by the ends of their names; shared ones as this site needs them."""
    arrays = {}
    for name, line in packing.tensors.items():
        label = line.partition("[")[0]
        arrays[name] = pack(site.factors[label], line, packing.site.factor(label).indices)
    return arrays


# ---- PEFT's folders


def write_peft(lines: AdapterLines, folder: Path, to: str, card: Any = None) -> bool:
    """Write the lines as a folder that PEFT reads (``per_expert`` and ``shared_outer``: that servers read).

    It is true if that rounds them.
    """
    pairs = [held(site, TARGETS[to]) for site in lines.sites]
    methods = {next((k for k, packings in PEFT.items() if packing in packings), "LORA") for packing, _ in pairs}
    if len(methods) > 1 and to == "peft":  # lines of one site each that only LoRA holds together
        pairs, methods = [held(site, TARGETS["lora"]) for site in lines.sites], {"LORA"}
    [kind] = methods
    if kind != "LORA" and any(site.magnitude is not None for _, site in pairs):
        raise ConfigError(f"{kind} holds no DoRA magnitude", remedy='convert it to="tnpeft", or a LoRA')
    tensors: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for packing, site in pairs:
        arrays = stored(packing, site)
        for name, line in packing.shared.items():
            value = arrays.pop(name).reshape([prod(site.sizes[i] for i in group) for group in parse(line)[1]])
            whole[name] = _widest(name, whole.get(name, value), value)
        path = site.module
        if packing is NESTED:  # parameters of one owner are wrapped one inside the other
            path = parameter_place(path, [other.module for other in lines.sites])
        tensors |= {f"{PEFT_PREFIX}{path}.{name}": value for name, value in arrays.items()}
        if site.magnitude is not None:
            tensors[f"{PEFT_PREFIX}{site.module}.lora_magnitude_vector"] = site.magnitude
    if kind == "RANDLORA":
        whole = _as_peft_sizes(whole, [site.shape for _, site in pairs])
    tensors |= {f"base_model.{name}": value for name, value in whole.items()}
    tensors |= {f"{PEFT_PREFIX}{name}": value for name, value in lines.others.items()}
    config = _config(kind, pairs, lines.about)
    config.target_modules = sorted(config.target_modules)  # not a set, so that equal adapters have equal files
    config.save_pretrained(str(folder))
    save(tensors, folder / SAFETENSORS_WEIGHTS_NAME)
    return any(site.rounded for _, site in pairs)


def _widest(name: str, before: Tensor, value: Tensor) -> Tensor:
    """The larger of two cuts of one shared tensor, or what both are cuts of."""
    common = tuple(slice(0, min(a, b)) for a, b in zip(before.shape, value.shape, strict=True))
    if not torch.equal(before[common], value[common]):
        raise ConfigError(
            f"{name} is one tensor for all sites in PEFT, and these sites have different ones",
            remedy='convert it to="lora"',
        )
    larger = grown(before, [max(a, b) for a, b in zip(before.shape, value.shape, strict=True)])
    larger[tuple(slice(0, n) for n in value.shape)] = value
    return larger


def _as_peft_sizes(whole: Mapping[str, Tensor], shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """RandLoRA's bases as large as PEFT makes them for these linears; what no linear uses is zero."""
    short, long = sorted((max(out for out, _ in shapes), max(inp for _, inp in shapes)))
    rank = len(whole["randlora_A"])
    sizes = {"randlora_A": (rank, 1, short), "randlora_B": (long, -(-short // rank), rank)}
    return {name: grown(whole[name], shape) for name, shape in sizes.items()}


def _config(kind: str, pairs: Sequence[tuple[Packing, SiteAdapter]], about: Mapping[str, Any]) -> Any:
    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    experts = {site.module for packing, site in pairs if packing is NESTED}
    ranks = {site.module: _rank(packing, site) for packing, site in pairs}
    alphas = {site.module: _alpha(site.scale, ranks[site.module]) for _, site in pairs}
    rank, alpha = (Counter(its.values()).most_common(1)[0][0] for its in (ranks, alphas))
    own = {"target_modules": sorted(ranks.keys() - experts), "r": rank, "inference_mode": True}
    own |= {key: value for key, value in about.items() if value and key in cls.__dataclass_fields__}
    if kind in ALPHA:
        own[ALPHA[kind]] = alpha
    if kind == "VERA" and (len({*ranks.values()}) > 1 or any(site.scale != 1 for _, site in pairs)):
        raise ConfigError("VeRA has one rank and no scale in PEFT", remedy='convert it to="lora"')
    if kind == "RANDLORA" and (len({*ranks.values()}) > 1 or len({*alphas.values()}) > 1):
        raise ConfigError("RandLoRA has one rank and one alpha in PEFT", remedy='convert it to="tnpeft"')
    if kind in ("VERA", "RANDLORA"):
        own["save_projection"] = True
    else:
        own["rank_pattern"] = {re.escape(module): its for module, its in ranks.items() if its != rank}
        own["alpha_pattern"] = {re.escape(module): its for module, its in alphas.items() if its != alpha}
    if kind == "LORA":
        own["use_dora"] = any(site.magnitude is not None for _, site in pairs)
        own["target_parameters"] = sorted(experts, reverse=True) or None
    if kind == "LOKR":
        own["decompose_factor"], own["decompose_both"] = _lokr([site for _, site in pairs], ranks)
    try:
        return cls(**own)
    except (TypeError, ValueError) as error:  # of what the source told besides
        raise ConfigError(str(error)) from None


def _rank(packing: Packing, site: SiteAdapter) -> int:
    sizes = site.sizes
    bond = next((name for name in ("r", "a", "q") if name in site.network.bonds), None)
    if "s" in sizes and sizes["s"] != sizes["r"]:
        raise ConfigError(f"the pairs of {site.module} have different ranks, LoHa has one", remedy='use to="lora"')
    if bond is None:  # a LoKr of whole matrices: PEFT keeps the second whole from half its side on
        return max(sizes["o2"], sizes["i2"])
    if packing.method == "LoKr" and "q" in sizes and sizes.get("r", sizes["q"]) != sizes["q"]:
        raise ConfigError(f"the matrices of {site.module} have different ranks, LoKr has one", remedy='use to="lora"')
    return sizes[bond]


def _alpha(scale: float, rank: int) -> float:
    """The alpha that gives the scale, a whole number where one does."""
    alpha = scale * rank
    whole = round(alpha)
    return whole if whole / rank == scale else alpha


def _lokr(sites: Sequence[SiteAdapter], ranks: Mapping[str, int]) -> tuple[int, bool]:
    """The options with which PEFT makes LoKr's matrices of exactly these shapes."""
    from peft.tuners.lokr.layer import factorization

    both = any("q" in site.sizes for site in sites)
    for factor in (-1, *range(2, 129)):
        for site in sites:
            z, (rows, cols), r = site.sizes, site.shape, ranks[site.module]
            made = (*factorization(rows, factor), *factorization(cols, factor))
            cut = both and r < max(z["o1"], z["i1"]) / 2, r < max(z["o2"], z["i2"]) / 2
            if made != (z["o1"], z["o2"], z["i1"], z["i2"]) or cut != ("q" in z, "r" in z):
                break
        else:
            return factor, both
    raise ConfigError("PEFT makes no LoKr of these shapes and ranks", remedy='convert it to="lycoris" or to="tnpeft"')


# ---- single files


def write_image(lines: AdapterLines, path: Path, to: str, card: Any = None) -> bool:
    """Write the lines as one file in the names of kohya's and LyCORIS' trainers; true if that rounds them."""
    plain(lines, "a trainer's file")
    tensors: dict[str, Tensor] = {}
    rounded = False
    for site in lines.sites:
        packing, fit = held(site, TARGETS[to])
        rank = fit.sizes.get("r", fit.sizes.get("q"))
        if rank is None:
            fit = fit.scaled(1.0)
        rounded |= fit.rounded
        name = site.module
        if not re.fullmatch(r"(lora|lycoris)_\w+", name):
            name = f"{'lycoris' if to == 'lycoris' else 'lora_unet'}_{name.replace('.', '_')}"
        arrays = stored(packing, fit)
        if rank is not None:
            arrays["alpha"] = torch.tensor(float(_alpha(fit.scale, rank)), dtype=torch.float64)
            if float(arrays["alpha"].float()) == float(arrays["alpha"]):
                arrays["alpha"] = arrays["alpha"].float()
        tensors |= {f"{name}.{end}": value for end, value in arrays.items()}
    save(tensors, path, {"ss_network_module": "tnpeft"})
    return rounded


def plain(lines: AdapterLines, what: str) -> None:
    """Raise if the adapter has more than factors."""
    if any(site.magnitude is not None for site in lines.sites):
        raise ConfigError(f"{what} holds no DoRA magnitude", remedy='use tnpeft.export_lora, or to="peft"')
    if lines.others:
        raise ConfigError(
            f"{what} holds no modules trained in full ({next(iter(lines.others))})", remedy='use to="peft"'
        )
