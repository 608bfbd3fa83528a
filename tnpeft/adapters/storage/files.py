"""Adapters on disk: what a file of factors holds, whether it fits, swapping one in, and the model card."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tnpeft.adapters.storage.contents import AGAIN, PEFT_PREFIX, Stored, check_contents, contents, entries, unprefixed
from tnpeft.layout import Layout
from tnpeft.networks import AdapterFileError, Factorization

ROOM = "make room or choose a folder that may be written, and save again: what was there before is as it was"
LOADING: ContextVar[bool] = ContextVar("LOADING", default=False)  # of a folder, whose frozen factors were compared
_CARD = "README.md"
_MARK = "## Tensor-network adapter"
_FIXED = ("network", "dora", "bias", "layers", "projections", "save_frozen", "frozen", "trainable_token_indices")
_FIXED += ("stack", "axes", "replicas", "replica_ranks", "replica_scales")


@contextmanager
def loading() -> Iterator[None]:
    """Load an adapter from a folder or repository, the hashes of whose frozen factors are compared."""
    token = LOADING.set(True)
    try:
        yield
    finally:
        LOADING.reset(token)


def fetch(name: str, subfolder: str | None = None, **hub: Any) -> Path:
    """Return the path of the file of factors of a folder or of a repository of the hub.

    Args:
        name: the folder, or the repository: then the file is taken from the cache, or downloaded into it.
        subfolder: the adapter's folder in it.
        hub: options of ``hf_hub_download``, such as ``revision`` and ``cache_dir``.
    """
    folder = Path(name, subfolder or "")
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        try:
            return Path(hf_hub_download(str(name), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder or None, **hub))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            raise AdapterFileError(
                f"{SAFETENSORS_WEIGHTS_NAME} of {str(name)!r} cannot be had from the hub ({type(error).__name__})",
                remedy=f"check the name and the connection; pickles ({WEIGHTS_NAME}) are not read",
            ) from error
    pickled = (folder / WEIGHTS_NAME).is_file()
    remedy = "save it with safe_serialization=True: pickles are not read" if pickled else AGAIN
    return file_in(folder, SAFETENSORS_WEIGHTS_NAME, remedy)


def file_in(folder: str | Path, name: str, remedy: str = "pass a folder that save_pretrained wrote") -> Path:
    """The path of a file of an adapter's folder, once it is known to be there."""
    if not (path := Path(folder, name)).is_file():
        raise AdapterFileError(f"no {name} in {str(folder)!r}", remedy=remedy)
    return path


def stored(path: Path) -> Stored:
    """Shape and kind of every array in an adapter's file, by its name in the model."""
    return unprefixed(entries(read(path), SAFETENSORS_WEIGHTS_NAME), SAFETENSORS_WEIGHTS_NAME)


def read(path: Path) -> dict[str, Any]:
    """The arrays of a file by name."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise AdapterFileError(f"{path.name} is damaged: {error}", remedy=AGAIN) from None


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; tensors may share memory."""
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    save_file(own, path, metadata={"format": "pt", **(metadata or {})})


def hotswap(model: Any, folder: str, adapter: str = "default") -> None:
    """Put the factors of another adapter of the same network in place of the loaded ones, without recompiling.

    Parameters keep their identity: only their values change, so compiled graphs and optimizers stay valid.

    Args:
        model: a model with an adapter of this package.
        folder: a folder that ``save_pretrained`` wrote.
        adapter: name of the adapter whose values change.

    Raises:
        AdapterFileError: the two adapters differ in network, seed of frozen factors, sites, shapes, or what they
            train besides; nothing is changed then.

    >>> hotswap(None, "no/such/folder")
    Traceback (most recent call last):
    tnpeft.networks.errors.AdapterFileError: no adapter_model.safetensors in 'no/such/folder'
    pass a folder that save_pretrained wrote
    """
    from peft import set_peft_model_state_dict

    path = file_in(folder, SAFETENSORS_WEIGHTS_NAME)
    file_in(folder, CONFIG_NAME)
    check_fits(model, adapter, folder)
    prefix = PEFT_PREFIX if not hasattr(model, "get_base_model") else ""  # which transformers' models do without
    values = {name.removeprefix(prefix): value for name, value in read(path).items()}
    with loading():
        set_peft_model_state_dict(model, values, adapter_name=adapter)


def check_fits(model: Any, adapter: str, folder: Any, **hub: Any) -> None:
    """Raise unless the adapter in a folder or repository is like the attached one, so that it may take its place."""
    from peft import PeftConfig

    from tnpeft.adapters.state import bank_of

    base = bank_of(model, adapter)
    own, what = model.peft_config[adapter], f"the adapter in {str(folder)!r}"
    new: Any = PeftConfig.from_pretrained(folder, **hub)
    if not isinstance(new, type(own)):
        raise AdapterFileError(f"{what} is a {new.peft_type}", remedy="load it under another name")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    new = translated(inner, new)
    for name in _FIXED:
        if _value(own, name) != _value(new, name):
            raise AdapterFileError(
                f"{what} has another {name} than {adapter!r}",
                remedy="load it with load_adapter, under another name",
            )
    if new.stored is not None:
        check_contents(new.stored, contents(inner, own, base.layouts[adapter]), what)


def check_state(model: Any, config: Any, adapter: str, layout: Layout, state: Mapping[str, Any]) -> None:
    """Raise unless a state dict that is about to be loaded into an attached adapter holds that adapter and no more.

    Warns where frozen factors stay as they are here: of those in the adapter that it was taken from it knows nothing.
    """
    from tnpeft.adapters.state import bank_of

    where = "the state dict"
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if adapter in bank_of(inner, adapter).merged_adapters:
        raise AdapterFileError(
            f"{adapter!r} is merged, and the weights would go on without what is loaded",
            remedy="call unmerge_adapter() first",
        )
    held = unprefixed(entries(state, where), where, needed=inner is not model)
    copies = re.compile(rf"\.modules_to_save\.{re.escape(adapter)}\.|(trainable_tokens_delta)\.{re.escape(adapter)}$")
    held = {copies.sub(lambda found: found[1] or ".", name): its for name, its in held.items()}
    check_contents(held, contents(inner, config, layout), where)
    frozen = sorted({param.label for param in layout.parameters if param.kind == "frozen"})
    if frozen and not config.save_frozen and not LOADING.get():
        warnings.warn(
            f"the state dict holds no frozen factors: {', '.join(frozen)} stay as seed {config.seed} and the start "
            "values here make them; save_frozen=True puts them into it",
            stacklevel=2,
        )


def _value(config: Any, name: str) -> Any:
    """The value of a field, of the network what its outputs depend on."""
    if name != "network":
        return getattr(config, name)
    return replace(config.factorization, name="", source="", lr_multiplier={})


def translated(model: Any, config: Any) -> Any:
    """The configuration with paths as they are in a model that transformers has rearranged since it was saved."""
    rules = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    if not rules or config.layers is None:
        return config

    def today(path: str) -> str:
        return next((new for old, to in rules.items() if (new := re.sub(old, to, path)) != path), path)

    found = copy.copy(config)
    found.layers = {today(path): place for path, place in config.layers.items()}
    found.stored = config.stored and {today(name): entry for name, entry in config.stored.items()}
    return found


def describe(folder: str, adapters: Mapping[str, Factorization]) -> None:
    """Write into a folder's model card what its adapters are, and that tnpeft has to be imported to load them.

    Args:
        folder: where the card lies; without one, nothing is written.
        adapters: the networks by subfolder, ``""`` for the folder itself.
    """
    card = Path(folder) / _CARD
    if not card.is_file():
        return
    parts = [_MARK]
    for subfolder, f in adapters.items():
        lines = "\n".join(str(line.network) + ("" if line.sites == "*" else f"  # {line.sites}") for line in f.lines)
        ranks = ", ".join(f"{bond} = {rank}" for bond, rank in f.ranks.items())
        where = f"In `{subfolder}`, family" if subfolder else "Family"
        parts.append(f"{where} `{f.name}`, ranks {ranks or 'none'}, scale {f.scale:g}:\n\n```\n{lines}\n```")
    more = "" if "" in adapters else f', subfolder="{next(iter(adapters))}"'
    parts.append(
        "Import tnpeft before loading it:\n\n```python\nimport peft, tnpeft\n\n"
        f"model = peft.PeftModel.from_pretrained(base_model, path{more})\n```\n"
    )
    before, _, after = card.read_text(encoding="utf-8").partition(_MARK)
    kept = re.search(r"^#+ .*", after, re.MULTILINE | re.DOTALL)  # from the next heading on
    text = f"{before.rstrip()}\n\n" + "\n\n".join(parts) + (f"\n{kept[0]}" if kept else "")
    card.write_text(text, encoding="utf-8")


@contextmanager
def written(folder: Any) -> Iterator[str]:
    """A folder to write files to, which end up in ``folder`` once all are written; if any cannot be, none does."""
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as name:
            if (target / _CARD).is_file():  # it is added to
                shutil.copyfile(target / _CARD, Path(name, _CARD))
            yield name
            for part in sorted(Path(name).rglob("*"), reverse=True):
                if part.is_file():
                    there = target / part.relative_to(name)
                    there.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(part, there)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{target} cannot be written: {error}", remedy=ROOM) from error
