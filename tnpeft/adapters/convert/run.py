"""The conversion itself: read, write aside, read back, compare the updates on drawn inputs, and only then keep."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tnpeft.adapters.convert.folder import read_folder, write_folder
from tnpeft.adapters.convert.formats import Array
from tnpeft.adapters.convert.gguf import read_updates, write_gguf
from tnpeft.adapters.convert.lines import AdapterLines
from tnpeft.adapters.convert.read import Source, load, read_peft, read_trainers_file
from tnpeft.adapters.convert.write import write_image, write_peft
from tnpeft.adapters.storage.files import ROOM
from tnpeft.models import Card, cards
from tnpeft.networks import AdapterFileError, ConfigError, NetworkError

_WRITERS: Mapping[str, Callable[..., bool]] = {
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
    found = _read(Path(source), _shapes(model))
    card = _card(model, found.lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside:
            new = Path(aside, f"file{_FILES[to]}" if to in _FILES else "folder")
            lines = _write(found.lines, new, to, card)
            back = _updates(new, to, lines, card)
            difference = _compare(found, lines, back)
            os.chmod(new, 0o755 if new.is_dir() else 0o644)
            os.replace(new, path)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be written: {error}", remedy=ROOM) from error
    return Conversion(found.format, to, path, len(lines.sites), _elements(lines), difference)


def _read(path: Path, shapes: Mapping[str, tuple[int, int]]) -> Source:
    config, tensors = load(path)
    if config.get("peft_type") == "TENSOR_NETWORK":
        return read_folder(path, tensors, shapes)
    return read_peft(config, tensors, shapes) if config else read_trainers_file(tensors, shapes)


def _write(lines: AdapterLines, new: Path, to: str, card: Card | None) -> AdapterLines:
    """Write a target; sites whose values it rounds are marked in the lines that come back."""
    if to not in _FILES:
        new.mkdir()
    rounded = _WRITERS[to](lines, new, to, card)
    return replace(lines, sites=tuple(replace(site, rounded=True) for site in lines.sites)) if rounded else lines


def _updates(new: Path, to: str, lines: AdapterLines, card: Card | None) -> Mapping[str, tuple[Array, Tensor | None]]:
    """The updates and magnitudes that were written, by module."""
    if to == "gguf":
        assert card is not None
        written = read_updates(new, lines, card)
        return {site.module: (update, None) for site, update in zip(lines.sites, written, strict=True)}
    back = _read(new, {site.module: site.shape for site in lines.sites if not site.network.stack})
    return {s.module: (update, s.magnitude) for s, update in zip(back.lines.sites, back.updates, strict=True)}


def _compare(found: Source, lines: AdapterLines, back: Mapping[str, tuple[Array, Tensor | None]]) -> float:
    """The largest relative difference between the outputs of the updates on drawn inputs."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for site, written, update in zip(found.lines.sites, lines.sites, found.updates, strict=True):
        other, magnitude = back.get(site.module, (None, None))
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
        allowed = _SLACK * torch.finfo(dtype).eps if written.rounded else 1e-9
        worst = max(worst, difference)
        if not difference <= allowed:
            raise AdapterFileError(
                f"the update of {site.module} would change: the largest relative difference is {difference:.3g}, "
                f"{allowed:.3g} is rounding",
                remedy="nothing was written",
            )
        if site.magnitude is not None and (magnitude is None or not torch.equal(magnitude, site.magnitude)):
            raise AdapterFileError(f"the magnitude of {site.module} would change", remedy="nothing was written")
    return worst


def _elements(lines: AdapterLines) -> int:
    """The number of elements of all trainable factors."""
    return sum(
        site.factors[site.network.label(factor)].numel()
        for site in lines.sites
        for factor in site.network.factors
        if factor.kind == "trainable"
    )


# ---- the base model, as far as it is known


def _shapes(model: Any) -> dict[str, tuple[int, int]]:
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


def _card(model: Any, lines: AdapterLines) -> Card | None:
    """The card of the base model: the one given, else of the name in the adapter if that is known here."""
    if isinstance(model, nn.Module):
        model = getattr(model, "config", None)
        if model is None:
            return None
    name = model if model is not None else lines.about.get("base_model_name_or_path")
    if name is None or (model is None and not cards.at_hand(str(name))):
        return None
    try:
        return cards.card(name)
    except NetworkError:
        if model is None:
            return None
        raise
