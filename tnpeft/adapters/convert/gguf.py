"""GGUF: a LoRA in the names and the order of rows that llama.cpp reads, through the ``gguf`` package."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from torch import Tensor

from tnpeft.adapters.convert.formats import TARGETS, Array
from tnpeft.adapters.convert.lines import AdapterLines, SiteAdapter
from tnpeft.adapters.convert.write import held, plain
from tnpeft.models import Card
from tnpeft.networks import AdapterFileError, ConfigError

_NAMES = {"mistral": "llama", "ministral": "llama", "mixtral": "llama", "bert": "bert", "gpt2": "gpt2"}
_ROTATED = ("llama",)  # architectures whose q and k rows llama.cpp stores half by half


def write_gguf(lines: AdapterLines, path: Path, card: Card | None) -> bool:
    """Write the lines as a GGUF LoRA; true, as it holds single precision."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF files need the package gguf", remedy="pip install gguf") from None
    if card is None:
        raise ConfigError("a GGUF file names the architecture", remedy="pass model=, the base model or its name")
    plain(lines, "a GGUF file")
    arch = _architecture(card)
    names = gguf.get_tensor_name_map(_key(arch), card.layers)
    sites = [held(site, TARGETS["lora"])[1] for site in lines.sites]
    alpha = Counter(site.scale * site.sizes["r"] for site in sites).most_common(1)[0][0]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(np.float32(alpha)))
    for site in sites:
        name = names.get_name(site.module, try_suffixes=(".weight",)) or names.get_name(f"model.{site.module}")
        if name is None:
            raise ConfigError(f"llama.cpp has no name for {site.module} in {arch}", remedy="leave it out")
        site = site.scaled(float(np.float32(alpha)) / site.sizes["r"])
        b = _rotated(site.factors["B"], site, card, arch, name)
        for end, value in (("a", site.factors["A"]), ("b", b)):
            writer.add_tensor(f"{name}.weight.lora_{end}", np.ascontiguousarray(value.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return True


def read_updates(path: Path, lines: AdapterLines, card: Card) -> list[Array]:
    """The updates in a GGUF file, in the order of the lines and with the rows of the model."""
    import gguf

    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    arch = _architecture(card)
    names = gguf.get_tensor_name_map(_key(arch), card.layers)
    found = []
    for site in lines.sites:
        name = names.get_name(site.module, try_suffixes=(".weight",)) or names.get_name(f"model.{site.module}")
        if f"{name}.weight.lora_a" not in tensors:
            raise AdapterFileError(f"{name}.weight.lora_a is missing")
        a, b = (tensors[f"{name}.weight.lora_{end}"] for end in "ab")
        heads = _heads(site, card, arch, str(name))
        if heads:  # the inverse: [heads, dim, half] back to [heads, half, dim]
            b = b.reshape(heads, b.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(b.shape)
        found.append(alpha / a.shape[0] * (b @ a))
    return found


def _architecture(card: Card) -> str:
    return _NAMES.get(card.architecture, card.architecture.replace("_", "-"))


def _key(arch: str):  # type: ignore[no-untyped-def]
    import gguf

    for key, name in gguf.MODEL_ARCH_NAMES.items():
        if name == arch or name == arch.replace("-", ""):
            return key
    raise ConfigError(f"llama.cpp has no architecture {arch!r}", remedy="it serves LoRAs of those that gguf names")


def _heads(site: SiteAdapter, card: Card, arch: str, name: str) -> int:
    if arch not in _ROTATED or not name.endswith(("attn_q", "attn_k")):
        return 0
    return card.sizes["heads"] if name.endswith("attn_q") else card.sizes["kv_heads"]


def _rotated(b: Tensor, site: SiteAdapter, card: Card, arch: str, name: str) -> Tensor:
    """The rows of q and k as llama.cpp orders them: within a head, pairs instead of halves."""
    heads = _heads(site, card, arch, name)
    if not heads:
        return b
    return b.reshape(heads, 2, b.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(b.shape)
