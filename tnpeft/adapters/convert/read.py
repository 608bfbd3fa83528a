"""Reading adapters: which format a folder or file has, its sites as lines, and their updates by its own formula."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from tnpeft.adapters.convert import formats
from tnpeft.adapters.convert.formats import Array, Packing
from tnpeft.adapters.convert.lines import AdapterLines, SiteAdapter, parse, sizes_of, unpack
from tnpeft.adapters.storage.contents import AGAIN, PEFT_PREFIX, entries
from tnpeft.adapters.storage.files import file_in, read
from tnpeft.networks import AdapterFileError, ConfigError

MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
# What changes the base weight or the update in ways that the factors alone do not tell.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None,),
    "alora_invocation_tokens": (None,),
}
_MOVED = re.compile(r"(pissa|olora|corda|loftq|lora_ga)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """An adapter as it was read: its format, its lines, and each site's update by the format's own formula."""

    format: str
    lines: AdapterLines
    updates: tuple[Array, ...]


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration (empty for a single file) and the tensors of an adapter."""
    if path.is_dir():
        return _config(file_in(path, CONFIG_NAME, AGAIN)), _tensors(file_in(path, SAFETENSORS_WEIGHTS_NAME, AGAIN))
    if not path.is_file():
        raise AdapterFileError(f"{str(path)!r} is neither a folder nor a file", remedy="pass the adapter's path")
    return {}, _tensors(path)


def _config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path.name} cannot be read: {error}", remedy=AGAIN) from None
    if not isinstance(data, dict) or not isinstance(data.get("peft_type"), str):
        raise AdapterFileError(f"{path.name} names no peft_type", remedy=AGAIN)
    return data


def _tensors(path: Path) -> dict[str, Tensor]:
    tensors = read(path)
    for name, entry in entries(tensors, path.name).items():
        if not entry.floating or not tensors[name].numel():
            raise AdapterFileError(f"{name} in {path.name} holds no floating-point numbers", remedy=AGAIN)
    if not tensors:
        raise AdapterFileError(f"{path.name} holds no tensors", remedy=AGAIN)
    return tensors


# ---- PEFT's folders


def read_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]
) -> Source:
    """The lines of one of PEFT's folders.

    Args:
        config: its configuration.
        tensors: its tensors.
        shapes: out and inp of the base model's linears by path, as far as known.
    """
    kind = config["peft_type"]
    if kind not in formats.PEFT:
        raise ConfigError(
            f"the method {kind} is not among those that are converted", remedy=f"they are {', '.join(formats.PEFT)}"
        )
    _check(config)
    packings = formats.PEFT[kind]
    if kind == "LORA":
        packings = (*packings, *formats.SHARED_OUTER, formats.PER_EXPERT)
    sites, shared, others = grouped(
        {name.removeprefix("base_model.").removeprefix("model."): tensor for name, tensor in tensors.items()},
        packings,
        MAGNITUDE if kind == "LORA" else (),
        config.get("modules_to_save") or (),
    )
    _tokens = [name for name in others if "token_adapter" in name]
    if _tokens:
        raise ConfigError(f"{_tokens[0]} holds trained tokens", remedy="convert an adapter without them")
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise AdapterFileError(f"target_parameters is {targets!r}", remedy=AGAIN)
    found, updates = [], []
    for module, stored in sites.items():
        magnitude = next((stored.pop(name) for name in MAGNITUDE if name in stored), None)
        packing = packing_for(module, stored, packings, bool(targets))
        packing = _short_side(packing, packings, module, shared, shapes)
        path = _parameter(module, targets, sites) if packing.method == "LoRA over target_parameters" else module
        rank, scale = _rank_and_scale(config, path)
        site, update = unpacked(packing, path, stored, shared, shapes, scale, magnitude, rank)
        found.append(site)
        updates.append(update)
    about = {key: config.get(key) for key in ("base_model_name_or_path", "task_type", "revision", "modules_to_save")}
    about |= {"fan_in_fan_out": bool(config.get("fan_in_fan_out", False))}
    kept = {name: tensors[full] for full in tensors if (name := full.removeprefix(PEFT_PREFIX)) in others}
    method = "+".join(dict.fromkeys(packing_of(site, packings).method for site in found))
    return Source(f"PEFT {method}", AdapterLines(tuple(found), about, kept), tuple(updates))


def packing_of(site: SiteAdapter, packings: Iterable[Packing]) -> Packing:
    return next(packing for packing in packings if packing.site == site.network)


def _check(config: Mapping[str, Any]) -> None:
    for key, allowed in _REFUSED.items():
        if config.get(key) not in allowed:
            raise ConfigError(f"{key}={config[key]!r} is not converted", remedy="convert an adapter without it")
    if config.get("bias", "none") != "none":
        raise ConfigError("an adapter with trained biases is not converted", remedy="train it with bias='none'")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _MOVED.search(start):
        raise ConfigError(
            f"init_lora_weights={start!r} moved the base weights, so the factors are not the whole update",
            remedy="save it with path_initial_model_for_weight_conversion first",
        )


def _rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int | None, float]:
    """The rank and the effective scale of a module by PEFT's rules."""
    from peft.utils.other import get_pattern_key

    def pattern(name: str, usual: Any) -> Any:
        given = config.get(name) or {}
        try:
            value = given.get(get_pattern_key(list(given), module), usual)
        except (AttributeError, TypeError, re.error) as error:
            raise AdapterFileError(f"{name} is not a mapping of patterns: {error}", remedy=AGAIN) from None
        return value

    kind = config["peft_type"]
    if kind == "VERA":
        return None, 1.0
    rank = pattern("rank_pattern", config.get("r"))
    usual = {"LORA": "lora_alpha", "RANDLORA": "randlora_alpha"}.get(kind, "alpha")
    alpha = pattern("alpha_pattern", config.get(usual))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not isinstance(alpha, int | float):
        raise AdapterFileError(f"{module} has the rank {rank!r} and alpha {alpha!r}", remedy=AGAIN)
    return rank, alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def grouped(
    tensors: Mapping[str, Tensor], packings: Iterable[Packing], extra: Iterable[str], kept: Iterable[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], set[str]]:
    """The tensors by module and end of their name, those shared by all modules, and the names of all others."""
    packings = tuple(packings)
    ends = sorted({*extra, *(name for packing in packings for name in packing.tensors)}, key=len, reverse=True)
    common = {name for packing in packings for name in packing.shared}
    sites: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    others: set[str] = set()
    for name, tensor in tensors.items():
        end = next((end for end in ends if name == end or name.endswith(f".{end}")), None)
        if end in common:
            before = shared.setdefault(end, tensor)
            if not torch.equal(before, tensor):
                raise AdapterFileError(f"{name} differs from the other copies of {end}", remedy=AGAIN)
        elif end is not None and name != end:
            sites.setdefault(name.removesuffix(f".{end}"), {})[end] = tensor
        elif any(f".{part}." in f".{name}." for part in kept):
            others.add(name)
        else:
            raise AdapterFileError(f"{name} is not part of an adapter that can be converted", remedy="take it out")
    if not sites:
        raise AdapterFileError("no site of the adapter is in its file", remedy=AGAIN)
    return sites, shared, others


def packing_for(module: str, stored: Mapping[str, Tensor], packings: Iterable[Packing], experts: bool) -> Packing:
    """The packing of one module; over ``target_parameters`` only where the module is not a target itself."""
    found = [packing for packing in packings if packing.fits(stored)]
    if len(found) > 1 and found[0].method == "LoRA":
        over = experts and not _is_linear(module)
        found = [found[1] if over else found[0]]
    if not found:
        what = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in stored.items())
        raise AdapterFileError(
            f"{module} holds {what}, which is not a known packing of a linear or of experts",
            remedy="convolutions and embeddings are not converted; else " + AGAIN,
        )
    return found[0]


def _short_side(
    packing: Packing,
    packings: tuple[Packing, ...],
    module: str,
    shared: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
) -> Packing:
    """RandLoRA's line for the module: its vectors sit on the shorter side, which its own tensors do not name."""
    if packing.method != "RandLoRA" or (shape := shape_of(module, shapes)) is None:
        if packing.method == "RandLoRA" and {"randlora_A", "randlora_B"} <= set(shared):
            short, long = shared["randlora_A"].shape[-1], shared["randlora_B"].shape[0]
            if short != long:
                raise ConfigError(
                    f"the file does not tell the shape of {module}", remedy="pass model=, the base model or its name"
                )
        return packing
    return packings[0] if shape[0] >= shape[1] else packings[1]


def _is_linear(module: str) -> bool:
    return not re.search(r"(^|\.)(experts|base_layer)$", module)


def _parameter(module: str, targets: list[str], sites: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The path of the parameter that a nested wrapper adapts.

    PEFT nests the wrappers in the order in which the module registered its parameters, which the file does not tell
    and an earlier adapter may have turned round: of gate, up and down the shapes decide.
    """
    owner = re.sub(r"(\.base_layer)+$", "", module)
    inside = (len(module) - len(owner)) // len(".base_layer")
    nested = [owner + ".base_layer" * k for k in range(len(module)) if owner + ".base_layer" * k in sites]
    count = len(nested)
    own = [name for name in targets if f".{owner}".endswith(f".{name.rpartition('.')[0]}")]
    names = sorted((name.rpartition(".")[2] for name in own), key=lambda name: (name == "down_proj", own))
    if len(names) != count:
        raise ConfigError(
            f"{owner} holds {count} adapted parameters and target_parameters names {len(names)} of it",
            remedy="name every adapted parameter by its path's end in target_parameters",
        )
    if names == ["gate_up_proj", "down_proj"]:
        outer, inner = ((sites[m]["lora_B.weight"].shape[0], sites[m]["lora_A.weight"].shape[1]) for m in nested)
        fit = [g[0] == 2 * d[1] and g[1] == d[0] for g, d in ((inner, outer), (outer, inner))]
        if fit == [False, False]:
            raise AdapterFileError(
                f"the shapes {inner} and {outer} in {owner} are not those of gate_up_proj and down_proj",
                remedy=AGAIN,
            )
        names = names if fit[0] else names[::-1]
    return f"{owner}.{names[count - 1 - inside]}"


def unpacked(
    packing: Packing,
    module: str,
    stored: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    scale: float,
    magnitude: Tensor | None = None,
    rank: int | None = None,
) -> tuple[SiteAdapter, Array]:
    """The site's line and its update by the project's own formula, scaled."""
    net = packing.site
    known: dict[str, int] = {}
    if rank is not None and packing.method == "LoRA over target_parameters":
        known["r"] = rank
    if packing.shared:
        shape = shape_of(module, shapes)
        known |= {} if shape is None else {"out": shape[0], "inp": shape[1]}
    lines = {name: packing.tensors[name] for name in stored}
    sizes = sizes_of(stored, lines, known)
    if rank is not None and "r" in sizes and sizes["r"] != rank and packing.method != "LoKr":
        raise AdapterFileError(f"{module} has the rank {sizes['r']} in its file, {rank} in its configuration")
    cut = {}
    for name, axes in packing.shared.items():
        if name not in shared:
            raise ConfigError(f"{name} is not in the file", remedy="save the adapter with save_projection=True")
        whole = shared[name]
        groups = parse(axes)[1]
        if whole.ndim != len(groups):
            raise AdapterFileError(f"{name} has the shape {tuple(whole.shape)}, not that of {axes}", remedy=AGAIN)
        for axis, group in enumerate(groups):
            if group and group[0] not in sizes:
                sizes[group[0]] = _open_size(packing, module, whole.shape[axis], sizes)
            size = sizes[group[0]] if group else 1
            if size > whole.shape[axis]:
                raise AdapterFileError(f"{name} has the shape {tuple(whole.shape)}, too small for {module}")
            whole = whole.narrow(axis, 0, size)
        cut[name] = whole.contiguous()
    raw = {**stored, **cut}
    factors = {}
    for name, line in packing.tensors.items():
        label = parse(line)[0]
        declared = net.factor(label).indices
        factors[label] = unpack(raw[name], line, declared, sizes)
    site = SiteAdapter(module, net, factors, scale, magnitude)
    arrays: dict[str, Array] = {name: tensor.double().numpy() for name, tensor in raw.items()}
    arrays |= {"experts": np.array(sizes.get("expert", 1)), "tall": np.array(int("gam" in factors))}
    return site, scale * np.asarray(packing.update(arrays))


def shape_of(module: str, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Out and inp of a module, by the end of its path; None if it is not among the shapes."""
    return next((s for path, s in shapes.items() if f".{module}".endswith(f".{path}")), None)


def _open_size(packing: Packing, module: str, whole: int, sizes: Mapping[str, int]) -> int:
    """The side that a site's own tensors do not tell: all of the shared tensor, where that can be meant."""
    if packing.method == "RandLoRA" and any(sizes.get(side) not in (None, whole) for side in ("out", "inp")):
        raise ConfigError(
            f"the shape of {module} does not follow from its file", remedy="pass model=, the base model or its name"
        )
    return whole
