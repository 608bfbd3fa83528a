"""Reading adapters: which format a folder or file has, its sites as lines, and their updates by its own formula."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from tnpeft.adapters.config_validation import fits
from tnpeft.adapters.convert import formats
from tnpeft.adapters.convert.formats import ALPHA, LORA, NESTED, Packing
from tnpeft.adapters.convert.lines import AdapterLines, Array, SiteAdapter, parse, sizes_of, unpack
from tnpeft.adapters.storage.contents import AGAIN, entries
from tnpeft.adapters.storage.files import file_in, read
from tnpeft.networks import AdapterFileError, ConfigError

Shapes = Mapping[str, tuple[int, int]]  # out and inp of the base model's linears by path, as far as they are known

_MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
ABOUT = ("base_model_name_or_path", "task_type", "revision", "modules_to_save")  # what a configuration tells besides
# What changes the base weight or the update in ways that the factors alone do not tell.
_REFUSED: Mapping[str, tuple[Any, ...]] = {  # options, and their values that are converted
    **dict.fromkeys(("lora_bias", "use_qalora"), (False, None)),
    **dict.fromkeys(("layer_replication", "arrow_config", "kasa_config", "velora_config"), (None,)),
    **dict.fromkeys(("monteclora_config", "use_bdlora", "alora_invocation_tokens"), (None,)),
}
_MOVED = re.compile(r"(pissa|olora|corda|loftq|lora_ga)", re.IGNORECASE)
_IMAGE = re.compile(r"(?:lora|lycoris)_\w+\.[\w.]+")


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


def read_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes) -> AdapterLines:
    """The lines of one of PEFT's folders, by its configuration and its tensors."""
    kind = config["peft_type"]
    if kind not in formats.PEFT:
        raise ConfigError(
            f"the method {kind} is not among those that are converted", remedy=f"they are {', '.join(formats.PEFT)}"
        )
    _check(config)
    packings = formats.PEFT[kind]
    if kind == "LORA":
        packings = (*packings, *formats.SHARED_OUTER, formats.PER_EXPERT)
    sites, shared, others = _grouped(
        {name.removeprefix("base_model.").removeprefix("model."): tensor for name, tensor in tensors.items()},
        packings,
        _MAGNITUDE if kind == "LORA" else (),
        config.get("modules_to_save") or (),
    )
    for name in others:
        if "token_adapter" in name:
            raise ConfigError(f"{name} holds trained tokens", remedy="convert an adapter without them")
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise AdapterFileError(f"target_parameters is {targets!r}", remedy=AGAIN)
    magnitudes = {m: next((its.pop(name) for name in _MAGNITUDE if name in its), None) for m, its in sites.items()}
    packed = {module: _packing(module, stored, packings) for module, stored in sites.items()}
    found, methods = [], dict[str, None]()
    for module, packing in packed.items():
        if packing.method == "RandLoRA":
            packing = packings[_is_wide(module, shared, shapes)]
        if packing is LORA and targets and re.search(r"(^|\.)(experts|base_layer)$", module):  # no target itself
            packing = NESTED
        path = _parameter(module, targets, sites) if packing is NESTED else module
        rank, scale = _rank_and_scale(config, path)
        factors, _, update = _unpacked(path, packing, sites[module], shared, shapes, rank)
        found.append(SiteAdapter(path, packing.site, factors, scale, magnitudes[module], update=scale * update))
        methods[packing.method] = None
    about = {key: config.get(key) for key in ABOUT} | {"fan_in_fan_out": bool(config.get("fan_in_fan_out", False))}
    return AdapterLines(found, about, others, f"PEFT {'+'.join(methods)}")


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

    def pattern(name: str, usual: str) -> Any:
        given = config.get(name) or {}
        try:
            return given.get(get_pattern_key(list(given), module), config.get(usual))
        except (AttributeError, TypeError, re.error) as error:
            raise AdapterFileError(f"{name} is not a mapping of patterns: {error}", remedy=AGAIN) from None

    if config["peft_type"] not in ALPHA:
        return None, 1.0
    rank, alpha = pattern("rank_pattern", "r"), pattern("alpha_pattern", ALPHA[config["peft_type"]])
    if not fits(rank, int) or rank < 1 or not fits(alpha, float):
        raise AdapterFileError(f"{module} has the rank {rank!r} and alpha {alpha!r}", remedy=AGAIN)
    return rank, alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _is_wide(module: str, shared: Mapping[str, Tensor], shapes: Shapes) -> bool:
    """True if RandLoRA's vectors sit on the module's output side, the shorter one, which its file does not tell."""
    if (shape := shape_of(module, shapes)) is not None:
        return shape[0] < shape[1]
    sides = {shared[name].shape[axis] for name, axis in (("randlora_A", -1), ("randlora_B", 0)) if name in shared}
    if len(sides) > 1:
        raise ConfigError(
            f"the file does not tell the shape of {module}", remedy="pass model=, the base model or its name"
        )
    return False


def _parameter(module: str, targets: list[str], sites: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The path of the parameter that a nested wrapper adapts.

    PEFT nests the wrappers in the order in which the module registered its parameters, which the file does not tell
    and an earlier adapter may have turned round: of gate, up and down the shapes decide.
    """
    owner = re.sub(r"(\.base_layer)+$", "", module)
    nested = [name for k in range(len(module)) if (name := owner + ".base_layer" * k) in sites]
    own = [name for name in targets if f".{owner}".endswith(f".{name.rpartition('.')[0]}")]
    names = sorted((name.rpartition(".")[2] for name in own), key="down_proj".__eq__)
    if len(names) != len(nested):
        raise ConfigError(
            f"{owner} holds {len(nested)} adapted parameters and target_parameters names {len(names)} of it",
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
    inside = (len(module) - len(owner)) // len(".base_layer")
    return f"{owner}.{names[len(nested) - 1 - inside]}"


# ---- the single files of image trainers: kohya's and LyCORIS' names, alpha as a tensor at every site


def read_trainers_file(tensors: Mapping[str, Tensor], shapes: Shapes) -> AdapterLines:
    """The lines of a trainer's file; its names become paths where the model's linears are known."""
    if wrong := next((name for name in tensors if not _IMAGE.fullmatch(name)), ""):
        raise AdapterFileError(
            f"{wrong} is not a name of the trainers whose files are read (lora_*, lycoris_*)",
            remedy="pass a folder with an adapter_config.json for PEFT's adapters",
        )
    packings = (*formats.KOHYA, *formats.LYCORIS)
    sites, _, _ = _grouped(tensors, packings, ("alpha",), ())
    found, methods = [], dict[str, None]()
    for name, stored in sites.items():
        alpha = stored.pop("alpha", None)
        packing = _packing(name, stored, packings)
        factors, sizes, update = _unpacked(name, packing, stored, {}, {})
        rank = sizes.get("r", sizes.get("q"))  # where both matrices of LoKr are whole, LyCORIS takes no alpha
        scale = 1.0 if alpha is None or rank is None else float(alpha.double().reshape(-1)[0]) / rank
        found.append(SiteAdapter(_path(name, shapes), packing.site, factors, scale, update=scale * update))
        methods[packing.method] = None
    return AdapterLines(found, format=f"LyCORIS {'+'.join(methods)}")


def _path(name: str, shapes: Shapes) -> str:
    """The module's path by a trainer's name: the longest that it ends with, written with underscores."""
    ends = [path for path in shapes if f"_{name}".endswith(f"_{path.replace('.', '_')}")]
    if shapes and not ends:
        raise ConfigError(f"the model has no linear that {name} could mean", remedy="pass the model it was made for")
    return max(ends, key=len, default=name)


# ---- sites and their packings


def _grouped(
    tensors: Mapping[str, Tensor], packings: Sequence[Packing], extra: Iterable[str], kept: Iterable[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """The tensors by module and end of their name, those shared by all modules, and all others."""
    ends = sorted({*extra, *(name for packing in packings for name in packing.tensors)}, key=len, reverse=True)
    common = {name for packing in packings for name in packing.shared}
    sites: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        end = next((end for end in ends if name == end or name.endswith(f".{end}")), None)
        if end in common:
            if not torch.equal(shared.setdefault(end, tensor), tensor):
                raise AdapterFileError(f"{name} differs from the other copies of {end}", remedy=AGAIN)
        elif end is not None and name != end:
            sites.setdefault(name.removesuffix(f".{end}"), {})[end] = tensor
        elif any(f".{part}." in f".{name}." for part in kept):
            others[name] = tensor
        else:
            raise AdapterFileError(f"{name} is not part of an adapter that can be converted", remedy="take it out")
    if not sites:
        raise AdapterFileError("no site of the adapter is in its file", remedy=AGAIN)
    return sites, shared, others


def _packing(module: str, stored: Mapping[str, Tensor], packings: Iterable[Packing]) -> Packing:
    """The packing of one module."""
    found = next((packing for packing in packings if packing.fits(stored)), None)
    if found is None:
        what = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in stored.items())
        raise AdapterFileError(
            f"{module} holds {what}, which is not a known packing of a linear or of experts",
            remedy="convolutions and embeddings are not converted; else " + AGAIN,
        )
    return found


def _unpacked(
    module: str,
    packing: Packing,
    tensors: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    shapes: Shapes,
    rank: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, int], Array]:
    """The factors of a site, its sizes, and its update at scale 1 by the project's own formula.

    ``rank`` is that of the configuration, None where it has none.
    """
    known: dict[str, int] = {"r": rank} if rank is not None and packing is NESTED else {}
    if packing.shared and (shape := shape_of(module, shapes)) is not None:
        known |= {"out": shape[0], "inp": shape[1]}
    sizes = sizes_of(tensors, packing.tensors, known)
    if rank is not None and sizes.get("r", rank) != rank and packing.method != "LoKr":
        raise AdapterFileError(f"{module} has the rank {sizes['r']} in its file, {rank} in its configuration")
    raw = dict(tensors)
    for name, axes in packing.shared.items():
        if name not in shared:
            raise ConfigError(f"{name} is not in the file", remedy="save the adapter with save_projection=True")
        whole, groups = shared[name], parse(axes)[1]
        if whole.ndim != len(groups):
            raise AdapterFileError(f"{name} has the shape {tuple(whole.shape)}, not that of {axes}", remedy=AGAIN)
        told = {group[0]: n for group, n in zip(groups, whole.shape, strict=True) if group and group[0] not in sizes}
        sides = {*told.values(), *(sizes[side] for side in ("out", "inp") if side in sizes)}
        if told and packing.method == "RandLoRA" and len(sides) > 1:
            raise ConfigError(
                f"the shape of {module} does not follow from its file",
                remedy="pass model=, the base model or its name",
            )
        sizes |= told  # a side that the site's own tensors do not tell is all of the shared one
        cut = [sizes[group[0]] if group else 1 for group in groups]
        if any(size > n for size, n in zip(cut, whole.shape, strict=True)):
            raise AdapterFileError(f"{name} has the shape {tuple(whole.shape)}, too small for {module}")
        raw[name] = whole[tuple(map(slice, cut))].contiguous()
    factors = {}
    for name, line in packing.tensors.items():
        label = parse(line)[0]
        factors[label] = unpack(raw[name], line, packing.site.factor(label).indices, sizes)
    arrays = {name: tensor.double().numpy() for name, tensor in raw.items()}
    arrays["experts"] = np.array(sizes.get("expert", 1))
    return factors, sizes, packing.update(arrays)


def shape_of(module: str, shapes: Shapes) -> tuple[int, int] | None:
    """Out and inp of a module, by the end of its path; None if it is not among the shapes."""
    return next((s for path, s in shapes.items() if f".{module}".endswith(f".{path}")), None)
