"""The single files of image trainers: kohya's and LyCORIS' names, alpha as a tensor at every site."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from tnpeft.adapters.convert import formats
from tnpeft.adapters.convert.formats import Packing
from tnpeft.adapters.convert.lines import AdapterLines, sizes_of
from tnpeft.adapters.convert.read import Source, grouped, packing_for, packing_of, unpacked
from tnpeft.networks import AdapterFileError, ConfigError

_IMAGE = re.compile(r"(?:lora|lycoris)_\w+\.[\w.]+")


def read_trainers_file(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> Source:
    """The lines of a trainer's file; its names become paths where the model's linears are known."""
    if not all(_IMAGE.fullmatch(name) for name in tensors):
        wrong = next(name for name in tensors if not _IMAGE.fullmatch(name))
        raise AdapterFileError(
            f"{wrong} is not a name of the trainers whose files are read (lora_*, lycoris_*)",
            remedy="pass a folder with an adapter_config.json for PEFT's adapters",
        )
    packings = (*formats.KOHYA, *formats.LYCORIS)
    sites, _, _ = grouped(tensors, packings, ("alpha",), ())
    resolve = _resolver(shapes)
    found, updates = [], []
    for name, stored in sites.items():
        alpha = stored.pop("alpha", None)
        packing = packing_for(name, stored, packings, False)
        rank = _rank(packing, stored)
        scale = 1.0 if alpha is None or rank is None else float(alpha.double().reshape(-1)[0]) / rank
        site, update = unpacked(packing, resolve(name), stored, {}, {}, scale)
        found.append(site)
        updates.append(update)
    method = "+".join(dict.fromkeys(packing_of(site, packings).method for site in found))
    return Source(f"LyCORIS {method}", AdapterLines(tuple(found)), tuple(updates))


def _rank(packing: Packing, stored: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; None where both matrices of LoKr are whole: LyCORIS then takes no alpha."""
    sizes = sizes_of(stored, {name: packing.tensors[name] for name in stored}, {})
    return sizes.get("r", sizes.get("q"))


def _resolver(shapes: Mapping[str, tuple[int, int]]) -> Callable[[str], str]:
    """From a trainer's name to the module's path: the longest path that it ends with, written with underscores."""
    paths = {path.replace(".", "_"): path for path in shapes}

    def resolve(name: str) -> str:
        if not paths:
            return name
        ends = [flat for flat in paths if f"_{name}".endswith(f"_{flat}")]
        if not ends:
            raise ConfigError(
                f"the model has no linear that {name} could mean", remedy="pass the model it was made for"
            )
        return paths[max(ends, key=len)]

    return resolve
