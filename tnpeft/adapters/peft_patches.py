"""What is set on PEFT's own classes when the tuner registers, where they leave no other place for it.

Each is one attribute of one class; every other kind of adapter meets what was there before, and a configuration that
is no JSON, of whatever kind it was, an error that names the file.
"""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from peft import PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.tuners.lora import conversion
from torch import Tensor
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.hub import PushToHubMixin

from tnpeft.adapters.bank import ConvertedLayer
from tnpeft.adapters.config import TensorNetworkConfig
from tnpeft.adapters.files import AGAIN, checked_shapes, describe
from tnpeft.networks import NetworkError

_read = PeftConfigMixin.from_pretrained.__func__
_json = PeftConfigMixin.from_json_file.__func__
_load = PeftAdapterMixin.load_adapter
_upload = PushToHubMixin._upload_modified_files


def hook() -> None:
    """Set them. Doing it again changes nothing.

    >>> hook()
    """
    # The conversion asks every tuner layer for a dense update. The bank has to be one, for all else that PEFT does
    # to tuner layers, and has no update; the conversion's own name for them is the one place to tell the two apart.
    conversion.BaseTunerLayer = ConvertedLayer  # type: ignore[misc, assignment]
    PeftConfig.from_pretrained = classmethod(_from_pretrained)
    PeftConfig.from_json_file = classmethod(_from_json_file)
    PeftModel._upload_modified_files = _upload_with_card
    PeftAdapterMixin.load_adapter = _load_checked


def _from_json_file(cls: type[PeftConfig], path: str, **kwargs: Any) -> dict[str, Any]:
    try:
        found = _json(cls, path, **kwargs)
        problem = "" if isinstance(found, dict) else f"it holds a {type(found).__name__}"
    except (ValueError, TypeError, RecursionError) as error:  # of the parser, or of PEFT, which expects a table
        problem = str(error)
    if problem:
        raise NetworkError(f"{path} is no configuration of an adapter: {problem}", remedy=AGAIN)
    return found  # type: ignore[no-any-return]


def _from_pretrained(cls: type[PeftConfig], path: Any, subfolder: str | None = None, **kwargs: Any) -> PeftConfig:
    """Read a configuration as its own class does: transformers asks the common one, and it would check no file."""
    config: PeftConfig = _read(cls, path, subfolder, **kwargs)
    if isinstance(config, TensorNetworkConfig) and not issubclass(cls, TensorNetworkConfig):
        return type(config).from_pretrained(path, subfolder, **kwargs)
    return config


@wraps(_load)
def _load_checked(
    model: Any,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Check a state dict as a file is checked: transformers attaches an adapter before it looks at either."""
    found = peft_config
    if adapter_state_dict is not None and peft_config is None and peft_model_id is not None:
        found = PeftConfig.from_pretrained(peft_model_id, **(kwargs.get("adapter_kwargs") or {}))
    if adapter_state_dict is None or not isinstance(found, TensorNetworkConfig):
        return _load(model, peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)
    before = found.stored
    found.stored = checked_shapes(adapter_state_dict, found.beside, "adapter_state_dict")
    try:
        return _load(model, peft_model_id, adapter_name, found, adapter_state_dict, *args, **kwargs)
    finally:
        found.stored = before


def _upload_with_card(model: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Upload a folder once its model card says again what PEFT and the adapters had written into it."""
    adapters = {
        "" if name == "default" else name: config.factorization
        for name, config in model.peft_config.items()
        if isinstance(config, TensorNetworkConfig)
    }
    if adapters and os.path.isfile(os.path.join(working_dir, "README.md")):
        model.create_or_update_model_card(working_dir)
        describe(working_dir, adapters)
    return _upload(model, working_dir, *args, **kwargs)
