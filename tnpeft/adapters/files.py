"""Adapters on disk: what a file of factors holds, whether it fits, swapping one in, and the model card."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from tnpeft.networks import Factorization, NetworkError
from tnpeft.registration import PREFIX

_MARK = "## Tensor-network adapter"
_SHOWN = 3  # names that an error lists
_AGAIN = "copy the adapter's folder again from where it was saved"


def stored_shapes(folder: str, others: Collection[str] = ()) -> dict[str, tuple[int, ...]] | None:
    """Shape of every array in the adapter's file, by name; None if there is no such folder here.

    Args:
        folder: where the adapter lies.
        others: parts of names of arrays that may be in the file beside the factors.

    Raises:
        NetworkError: the file is missing or damaged, or holds something that is neither a finite factor nor meant.

    >>> stored_shapes("no/such/folder") is None
    True
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.parent.is_dir():
        return None
    if not path.is_file():
        pickled = (path.parent / WEIGHTS_NAME).is_file()
        remedy = "save it with safe_serialization=True: pickles are not read" if pickled else _AGAIN
        raise NetworkError(f"there is no {SAFETENSORS_WEIGHTS_NAME} in {folder!r}", remedy=remedy)
    try:
        with safe_open(path, framework="pt") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise NetworkError(f"{SAFETENSORS_WEIGHTS_NAME} is damaged: {error}", remedy=_AGAIN) from None
    for name, array in arrays.items():
        if f".{PREFIX}" not in name and not any(part in name for part in others):
            raise NetworkError(
                f"{SAFETENSORS_WEIGHTS_NAME} holds {name}, which is no part of an adapter and would change the model",
                remedy="do not load this file, or take the array out of it",
            )
        if not array.is_floating_point() or not array.isfinite().all():
            problem = "not finite" if array.is_floating_point() else f"of type {array.dtype}"
            raise NetworkError(f"{name} in {SAFETENSORS_WEIGHTS_NAME} is {problem}", remedy=_AGAIN)
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
        NetworkError: the two adapters differ in network, seed of frozen factors, sites or shapes; nothing is
            changed then.

    >>> hotswap(None, "no/such/folder")
    Traceback (most recent call last):
    tnpeft.networks.errors.NetworkError: there is no adapter_model.safetensors in 'no/such/folder'
    pass a folder that save_pretrained wrote
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from tnpeft.adapters.access import bank_of

    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise NetworkError(
            f"there is no {SAFETENSORS_WEIGHTS_NAME} in {folder!r}", remedy="pass a folder that save_pretrained wrote"
        )
    own = model.peft_config[adapter]
    new = type(own).from_pretrained(folder)
    fixed = ("network", "dora", "layers", "projections", "save_frozen", "frozen", "replicas")
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
    with torch.no_grad():
        for name, parameter in state.items():
            if name in values:
                parameter.copy_(values[name])


def describe(folder: str, f: Factorization) -> None:
    """Add to the folder's model card what the adapter is and that tnpeft has to be imported to load it.

    >>> describe("no/such/folder", Factorization.of("A[out inp] -> out inp"))
    """
    card = Path(folder) / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    lines = "\n".join(str(line.network) + ("" if line.sites == "*" else f"  # {line.sites}") for line in f.lines)
    ranks = ", ".join(f"{bond} = {rank}" for bond, rank in f.ranks.items())
    section = (
        f"{_MARK}\n\nFamily `{f.name}`, ranks {ranks or 'none'}, scale {f.scale:g}:\n\n```\n{lines}\n```\n\n"
        "Import tnpeft before loading it:\n\n```python\nimport peft, tnpeft\n\n"
        "model = peft.PeftModel.from_pretrained(base_model, path)\n```\n"
    )
    card.write_text(text.partition(_MARK)[0].rstrip() + "\n\n" + section, encoding="utf-8")
