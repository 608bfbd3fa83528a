"""The conversion itself: read, write aside, read back, compare the updates on drawn inputs, and only then keep."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from tnpeft.adapters.convert.folder import read_folder, write_folder
from tnpeft.adapters.convert.gguf import read_gguf, write_gguf
from tnpeft.adapters.convert.lines import AdapterLines, SiteAdapter
from tnpeft.adapters.convert.read import Shapes, load, read_peft, read_trainers_file
from tnpeft.adapters.convert.write import write_image, write_peft
from tnpeft.adapters.storage.contents import AGAIN
from tnpeft.adapters.storage.files import ROOM
from tnpeft.adapters.storage.stored_sites import base_card
from tnpeft.models import cards
from tnpeft.networks import AdapterFileError, ConfigError

_WRITERS: dict[str, Callable[..., bool]] = {
    "tnpeft": write_folder,
    **dict.fromkeys(("peft", "lora", "per_expert", "shared_outer"), write_peft),
    **dict.fromkeys(("kohya", "lycoris"), write_image),
    "gguf": write_gguf,
}
_FILES = {"kohya": ".safetensors", "lycoris": ".safetensors", "gguf": ".gguf"}
_INPUTS = 4  # drawn per site
_SLACK = 64  # of the dtype's rounding, where values were multiplied


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: from what to what, its sites and trainable elements, and the largest relative difference
    between the updates of the two on drawn inputs.

    >>> print(Conversion("peft LoRA", "tnpeft", Path("adapter"), sites=48, parameters=1572864, difference=0.0))
    peft LoRA -> tnpeft: 48 sites, 1,572,864 parameters, largest relative difference 0, in adapter
    """

    source: str
    target: str
    path: Path
    sites: int
    parameters: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.source} -> {self.target}: {self.sites} sites, {self.parameters:,} parameters, "
            f"largest relative difference {self.difference:.2g}, in {self.path}"
        )


def convert(source: str | Path, target: str | Path, to: str = "tnpeft", *, model: Any = None) -> Conversion:
    """Convert an adapter to another packing.

    Read are folders of PEFT (LoRA with patterns, rsLoRA and DoRA, LoHa, LoKr, VeRA, RandLoRA, ``target_parameters``),
    of tnpeft, of experts as 3-D tensors (per expert or with a shared outer side), and kohya's and LyCORIS' files.
    What was written is read back, and its updates are compared with the source's own formula on drawn inputs;
    nothing is left behind unless they agree.

    Args:
        source: a folder with an ``adapter_config.json``, or a ``.safetensors`` file.
        target: the folder, or for kohya, lycoris and gguf the file, to write; it must not exist.
        to: tnpeft, peft (its own method for the line, else LoRA), lora, per_expert, shared_outer, kohya,
            lycoris or gguf.
        model: the base model, its configuration or its name, where shapes or modules' paths do not follow from the
            file: RandLoRA on oblong linears, trainers' names with underscores, GGUF.

    Raises:
        AdapterFileError: the source is damaged, or the conversion changes an update: the largest difference is told.
        ConfigError: the target cannot hold the adapter, or the model is needed.

    >>> convert("no/such/folder", "target")
    Traceback (most recent call last):
    tnpeft.networks.errors.AdapterFileError: 'no/such/folder' is neither a folder nor a file
    pass the adapter's path
    """
    if to not in _WRITERS:
        raise ConfigError(f"to={to!r} is not a target", remedy=f"use one of {', '.join(_WRITERS)}")
    path = Path(target)
    if os.path.exists(path):
        raise ConfigError(f"{str(path)!r} exists", remedy="choose another target, or remove it first")
    lines = _read(Path(source), _shapes(model))
    known = isinstance(model, nn.Module)  # and then nothing is asked of the name that the adapter records
    recorded = None if known else lines.about.get("base_model_name_or_path")
    card: Any = base_card(getattr(model, "config", None) if known else model, recorded)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside:
            new = Path(aside, f"new{_FILES.get(to, '')}")
            if to not in _FILES:
                new.mkdir()
            rounded = _WRITERS[to](lines, new, to, card)
            shapes = {site.module: site.shape for site in lines.sites if not site.network.stack}
            back = read_gguf(new, lines, card) if to == "gguf" else _read(new, shapes).sites
            difference = _compare(lines.sites, back, rounded)
            os.chmod(new, 0o755 if new.is_dir() else 0o644)
            os.replace(new, path)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be written: {error}", remedy=ROOM) from error
    elements = sum(
        site.factors[site.network.label(factor)].numel()
        for site in lines.sites
        for factor in site.network.factors
        if factor.kind == "trainable"
    )
    return Conversion(lines.format, to, path, len(lines.sites), elements, difference)


def _read(path: Path, shapes: Shapes) -> AdapterLines:
    config, tensors = load(path)
    if config.get("peft_type") == "TENSOR_NETWORK":
        lines = read_folder(path, tensors, shapes)
    else:
        lines = read_peft(config, tensors, shapes) if config else read_trainers_file(tensors, shapes)
    for site in lines.sites:
        update: Any = site.update
        if (its := site.magnitude) is not None and its.shape != (wanted := update.shape[:-1]):
            raise AdapterFileError(
                f"the magnitude of {site.module} has the shape {tuple(its.shape)}, not {wanted}", remedy=AGAIN
            )
    return lines


def _compare(sites: Sequence[SiteAdapter], back: Sequence[SiteAdapter], rounded: bool) -> float:
    """The largest relative difference between outputs of the updates on drawn inputs, as read and as read back."""
    rng = np.random.default_rng(0)
    written = {site.module: site for site in back}
    worst = 0.0
    for site in sites:
        update: Any = site.update
        other: Any = written[site.module].update if site.module in written else None
        if other is None or other.shape != update.shape:
            shape = None if other is None else other.shape
            raise AdapterFileError(
                f"{site.module} has an update of shape {update.shape}, in the target of {shape}",
                remedy="this is a fault of the conversion: nothing was written",
            )
        x = rng.standard_normal((update.shape[-1], _INPUTS))
        size = max(float(np.abs(update @ x).max()), float((np.abs(update) @ np.abs(x)).max()) * 1e-3, 1e-300)
        difference = float(np.abs(other @ x - update @ x).max()) / size
        dtype = next(iter(site.factors.values())).dtype
        allowed = _SLACK * torch.finfo(dtype).eps if rounded or site.rounded else 1e-9
        worst = max(worst, difference)
        if not difference <= allowed:
            raise AdapterFileError(
                f"the update of {site.module} would change: the largest relative difference is {difference:.3g}, "
                f"{allowed:.3g} is rounding",
                remedy="nothing was written",
            )
        magnitude = written[site.module].magnitude
        if site.magnitude is not None and (magnitude is None or not torch.equal(magnitude, site.magnitude)):
            raise AdapterFileError(f"the magnitude of {site.module} would change", remedy="nothing was written")
    return worst


# ---- the base model, as far as it is known


def _shapes(model: Any) -> Shapes:
    """Out and inp of the base model's linears by path; of a named model the paths in its base model."""
    if model is None:
        return {}
    if isinstance(model, nn.Module):
        from transformers.pytorch_utils import Conv1D

        from tnpeft.adapters.sites.weight import features

        return {
            name: features(module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
        }
    shapes: dict[str, tuple[int, int]] = {}
    for site in cards.sites(model, "all-linear"):
        if not site.experts:
            out, inp = shapes.get(site.module, (0, site.inp))
            shapes[site.module] = out + site.out, inp
    return shapes
