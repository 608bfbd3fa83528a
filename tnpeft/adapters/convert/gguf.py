"""GGUF: a LoRA in the names and the order of rows that llama.cpp reads, through the ``gguf`` package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tnpeft.adapters.convert.formats import TARGETS
from tnpeft.adapters.convert.lines import AdapterLines, SiteAdapter
from tnpeft.adapters.convert.write import held, plain
from tnpeft.models import Card
from tnpeft.networks import AdapterFileError, ConfigError

_ARCHITECTURES = {"mistral": "llama", "ministral": "llama", "mixtral": "llama", "bert": "bert", "gpt2": "gpt2"}
_ROTATED = ("llama",)  # architectures whose q and k rows llama.cpp stores half by half


def write_gguf(lines: AdapterLines, path: Path, to: str, card: Card | None) -> bool:
    """Write the lines as a GGUF LoRA; true, as it holds single precision."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF files need the package gguf", remedy="pip install gguf") from None
    if card is None:
        raise ConfigError("a GGUF file names the architecture", remedy="pass model=, the base model or its name")
    plain(lines, "a GGUF file")
    sites = [held(site, TARGETS["lora"])[1] for site in lines.sites]
    arch, names = _names([site.module for site in sites], card)
    alpha = Counter(site.scale * site.sizes["r"] for site in sites).most_common(1)[0][0]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(np.float32(alpha)))
    for site, (name, heads) in zip(sites, names, strict=True):
        site = site.scaled(float(np.float32(alpha)) / site.sizes["r"])
        for end, value in (("a", site.factors["A"]), ("b", _turned(site.factors["B"], heads))):
            writer.add_tensor(f"{name}.weight.lora_{end}", np.ascontiguousarray(value.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return True


def read_gguf(path: Path, lines: AdapterLines, card: Card) -> list[SiteAdapter]:
    """The sites of the lines with the updates that a GGUF file holds, rows as in the model."""
    import gguf

    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    found = []
    names = _names([site.module for site in lines.sites], card)[1]
    for site, (name, heads) in zip(lines.sites, names, strict=True):
        if f"{name}.weight.lora_a" not in tensors:
            raise AdapterFileError(f"{name}.weight.lora_a is missing")
        a, b = (tensors[f"{name}.weight.lora_{end}"] for end in "ab")
        found.append(replace(site, update=alpha / a.shape[0] * (_turned(b, heads, back=True) @ a)))
    return found


def _names(modules: Sequence[str], card: Card) -> tuple[str, list[tuple[str, int]]]:
    """The architecture, and of every module llama.cpp's name and the heads by which it turns the rows, 0 for none."""
    import gguf

    arch = _ARCHITECTURES.get(card.architecture, card.architecture.replace("_", "-"))
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    key = known.get(arch, known.get(arch.replace("-", "")))
    if key is None:
        raise ConfigError(
            f"llama.cpp has no architecture {arch!r}", remedy="it serves LoRAs of those that gguf names"
        )
    names = gguf.get_tensor_name_map(key, card.layers)
    found = []
    for module in modules:
        name = names.get_name(module, try_suffixes=(".weight",)) or names.get_name(f"model.{module}")
        if name is None:
            raise ConfigError(f"llama.cpp has no name for {module} in {arch}", remedy="leave it out")
        sizes = {"attn_q": "heads", "attn_k": "kv_heads"} if arch in _ROTATED else {}
        size = sizes.get(name.rpartition(".")[2])
        found.append((name, card.sizes[size] if size else 0))
    return arch, found


def _turned(b: Any, heads: int, back: bool = False) -> Any:
    """The rows of q and k as llama.cpp orders them, within a head pairs instead of halves; or ``back`` from that."""
    if not heads:
        return b
    half = len(b) // heads // 2
    return b.reshape(heads, *((half, 2) if back else (2, half)), -1).swapaxes(1, 2).reshape(b.shape)
