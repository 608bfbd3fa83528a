"""Adapters on disk: what a file of factors holds, whether it fits, swapping one in, and the model card."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from tnpeft.networks import Factorization, NetworkError
from tnpeft.registration import PREFIX

_MARK = "## Tensor-network adapter"
_SHOWN = 3  # names that an error lists
AGAIN = "copy the adapter's folder again from where it was saved"


def fetch(name: str, subfolder: str | None = None, **hub: Any) -> Path:
    """Where the file of factors lies that belongs to a folder or to a repository of the hub.

    Args:
        name: the folder, or the repository: then the file is taken from the cache, or downloaded into it.
        subfolder: the adapter's folder in it.
        hub: options of ``hf_hub_download``, such as ``revision`` and ``cache_dir``.

    Raises:
        NetworkError: there is none, or it cannot be had.

    >>> fetch("/", local_files_only=True)
    Traceback (most recent call last):
    tnpeft.networks.errors.NetworkError: there is no adapter_model.safetensors in '/'
    copy the adapter's folder again from where it was saved
    """
    folder = Path(name, subfolder or "")
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        try:
            return Path(hf_hub_download(str(name), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder or None, **hub))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            raise NetworkError(
                f"{SAFETENSORS_WEIGHTS_NAME} of {str(name)!r} cannot be had from the hub ({type(error).__name__})",
                remedy=f"check the name and the connection; pickles ({WEIGHTS_NAME}) are not read",
            ) from error
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        pickled = (folder / WEIGHTS_NAME).is_file()
        remedy = "save it with safe_serialization=True: pickles are not read" if pickled else AGAIN
        raise NetworkError(f"there is no {SAFETENSORS_WEIGHTS_NAME} in {str(folder)!r}", remedy=remedy)
    return folder / SAFETENSORS_WEIGHTS_NAME


def stored_shapes(path: Path, others: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Shape of every array in an adapter's file, by name.

    Args:
        path: the file.
        others: parts of names of arrays that may be in the file beside the factors.

    Raises:
        NetworkError: the file is damaged, or holds something that is neither a finite factor nor meant.

    >>> stored_shapes(Path("no/such/file"))
    Traceback (most recent call last):
    tnpeft.networks.errors.NetworkError: adapter_model.safetensors is damaged: No such file or directory: no/such/file
    copy the adapter's folder again from where it was saved
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise NetworkError(f"{SAFETENSORS_WEIGHTS_NAME} is damaged: {error}", remedy=AGAIN) from None
    return checked_shapes(arrays, others, SAFETENSORS_WEIGHTS_NAME)


def checked_shapes(arrays: Mapping[str, Any], others: Collection[str], where: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an adapter, by name, once all are known to be finite and meant.

    Args:
        arrays: the tensors by name.
        others: parts of names of tensors that may be among them beside the factors.
        where: what holds them, for the message.

    Raises:
        NetworkError: one is neither a finite factor nor meant.

    >>> checked_shapes({"fc1.weight": None}, (), "the file")
    Traceback (most recent call last):
    tnpeft.networks.errors.NetworkError: the file holds fc1.weight, which is no part of an adapter and would change...
    """
    for name, array in arrays.items():
        if f".{PREFIX}" not in name and not any(part in name for part in others):
            raise NetworkError(
                f"{where} holds {name}, which is no part of an adapter and would change the model",
                remedy="do not load it, or take that array out of it",
            )
        if not array.is_floating_point() or not array.isfinite().all():
            problem = "not finite" if array.is_floating_point() else f"of type {array.dtype}"
            raise NetworkError(f"{name} in {where} is {problem}", remedy=AGAIN)
    return {name: tuple(array.shape) for name, array in arrays.items()}


def check_shapes(stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the file holds exactly the arrays that the network needs on this model.

    Names are compared from the module's path on; ``modules_to_save`` and biases are none of ours.

    Raises:
        NetworkError: an array is missing, left over, or of another shape.

    >>> check_shapes({"base_model.model.q.tnpeft_factors.B": (4, 2)}, {"q.tnpeft_factors.B": (4, 2)})
    """
    found = {name.removeprefix("base_model.model."): shape for name, shape in stored.items() if f".{PREFIX}" in name}
    missing = [f"{name} {shape} is missing" for name, shape in expected.items() if name not in found]
    left = [f"{name} {shape} is not part of it" for name, shape in found.items() if name not in expected]
    wrong = [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [*wrong, *missing, *left]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise NetworkError(
            f"the stored factors are not those of the adapter's network here: {'; '.join(problems[:_SHOWN])}{more}",
            remedy="check that the adapter was trained on this architecture and that its files belong together",
        )


def hotswap(model: Any, folder: str, adapter: str = "default") -> None:
    """Put the factors of another adapter of the same network in place of the loaded ones, without recompiling.

    Parameters keep their identity: only their values change, so compiled graphs and optimizers stay valid.

    Args:
        model: a model with an adapter of this package.
        folder: a folder that ``save_pretrained`` wrote.
        adapter: name of the adapter whose values change.

    Raises:
        NetworkError: the two adapters differ in network, seed of frozen factors, sites, shapes, or what they train
            besides; nothing is changed then.

    >>> hotswap(None, "no/such/folder")
    Traceback (most recent call last):
    tnpeft.networks.errors.NetworkError: there is no adapter_model.safetensors in 'no/such/folder'
    pass a folder that save_pretrained wrote
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from tnpeft.adapters.state import bank_of

    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise NetworkError(
            f"there is no {SAFETENSORS_WEIGHTS_NAME} in {folder!r}", remedy="pass a folder that save_pretrained wrote"
        )
    own = model.peft_config[adapter]
    new = type(own).from_pretrained(folder)
    if not isinstance(new, type(own)):
        raise NetworkError(f"the adapter in {folder!r} is a {new.peft_type}", remedy="swap in one of this package")
    fixed = ("network", "dora", "bias", "layers", "projections", "save_frozen", "frozen")
    fixed += ("replicas", "replica_ranks", "replica_scales")
    for name in fixed:
        if getattr(own, name) != getattr(new, name):
            raise NetworkError(
                f"the adapter in {folder!r} has another {name} than {adapter!r}",
                remedy="load it with load_adapter instead of swapping it in",
            )
    if bank_of(model, adapter).merged:
        raise NetworkError("a merged adapter cannot be swapped", remedy="call unmerge_adapter() first")
    values = load_file(path)
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    check_shapes(
        {name: tuple(value.shape) for name, value in values.items()},
        {n.removeprefix("base_model.model."): tuple(v.shape) for n, v in state.items() if f".{PREFIX}" in n},
    )
    for name, array in state.items():
        if name not in values or values[name].shape != array.shape:
            raise NetworkError(
                f"the adapter in {folder!r} has no {name} of shape {tuple(array.shape)}",
                remedy="load it with load_adapter instead of swapping it in",
            )
    with torch.no_grad():
        for name, array in state.items():
            array.copy_(values[name])


def describe(folder: str, adapters: Mapping[str, Factorization]) -> None:
    """Write into a folder's model card what its adapters are, and that tnpeft has to be imported to load them.

    Args:
        folder: where the card lies; without one, nothing is written.
        adapters: the networks by subfolder, ``""`` for the folder itself.

    >>> describe("no/such/folder", {"": Factorization.of("A[out inp] -> out inp")})
    """
    card = Path(folder) / "README.md"
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
