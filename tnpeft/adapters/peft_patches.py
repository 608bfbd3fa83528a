"""Patches of PEFT's own classes, set when the tuner registers, where PEFT has no other place for it.

Each is one attribute of one class or module; every other kind of adapter meets what was there before, and a
configuration that is not JSON, of whatever kind it was, an error that names the file.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, peft_model
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as _KINDS
from peft.tuners.lora import conversion
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, save_and_load
from safetensors import safe_open
from torch import Tensor
from transformers.integrations.peft import PeftAdapterMixin

from tnpeft.adapters.config import TensorNetworkConfig
from tnpeft.adapters.config_validation import check_depth, shown
from tnpeft.adapters.constants import PREFIX, TENSOR_NETWORK
from tnpeft.adapters.layer.bank import AdaptedLayer
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.rollback import layers, or_as_before, parked
from tnpeft.adapters.storage.contents import AGAIN, PEFT_PREFIX, embeddings, entries, unprefixed
from tnpeft.adapters.storage.files import LOADING, check_fits, describe, fetch, loading, stored, written
from tnpeft.networks import AdapterFileError, TnpeftError

_Method = Callable[..., Any]
_PATCHES: list[tuple[Any, str, Any]] = [
    # The conversion asks every tuner layer for a dense update. The bank has to be one, for all else that PEFT does
    # to tuner layers, and has no update; the conversion's own name for them is the one place to tell the two apart.
    (conversion, "BaseTunerLayer", AdaptedLayer),
    (peft_model, "BaseTunerLayer", AdaptedLayer),  # for its reports
]
_MODELS = (PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values())
_HEADS = {  # that PEFT adds to what is saved only once the adapter is attached
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING["TOKEN_CLS"]: ("classifier", "score"),
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING["QUESTION_ANS"]: ("qa_outputs",),
}
_HELD = re.compile(rf".*\.(?:{PREFIX}\w+|modules_to_save|trainable_tokens_(?:delta|original))\.([^.]+)(?:\.|$)")


def hook() -> None:
    """Set them. Doing it again changes nothing."""
    for owner, name, value in _PATCHES:
        setattr(owner, name, value)


def _patch(owner: Any, name: str) -> Callable[[_Method], _Method]:
    """Let a function take the place of a method or function, which it is given first."""
    found = inspect.getattr_static(owner, name)
    original = found.__func__ if isinstance(found, classmethod) else found

    def register(function: _Method) -> _Method:
        @wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        _PATCHES.append((owner, name, classmethod(patched) if isinstance(found, classmethod) else patched))
        return function

    return register


# ---- all or nothing


def _holds(model: Any, adapter: str) -> bool:
    """True if a model has an adapter of this package under a name."""
    configs = getattr(model, "peft_config", None)
    return isinstance(configs, dict) and isinstance(configs.get(adapter), TensorNetworkConfig)


@contextmanager
def _whole(model: Any, adapter: str | None, config: Any = None, reads: bool = True) -> Iterator[None]:
    """Add or load an adapter of this package, or leave the model as it was; other kinds are left as they are."""
    name = adapter or "default"
    there = _holds(model, name)

    def ours() -> bool:
        return there or isinstance(config, TensorNetworkConfig) or _holds(model, name)

    others = nullcontext() if reads else parked(model)  # which stay as they are
    with or_as_before(model, None if reads else (), name if there else None, undone=ours), others:
        yield


@_patch(PeftModel, "add_adapter")
def _add(original: _Method, self: PeftModel, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    with _whole(self, adapter_name, peft_config, reads=False):
        original(self, adapter_name, peft_config, *args, **kwargs)


@_patch(PeftAdapterMixin, "add_adapter")
def _add_to_base(original: _Method, model: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
    with _whole(model, adapter_name, adapter_config, reads=False):
        original(model, adapter_config, adapter_name)


def _made(original: _Method, self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    """Make one of PEFT's models, or leave the base model as it was."""
    if not isinstance(peft_config, TensorNetworkConfig):
        original(self, model, peft_config, *args, **kwargs)
        return
    with or_as_before(model):
        try:
            original(self, model, peft_config.copied(_HEADS.get(type(self), ())), *args, **kwargs)
        finally:
            peft_config.forget_model()


def _with_copy(original: _Method, self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    """Write the head of a model into a copy of a configuration, not into the given one."""
    own = peft_config.copied() if isinstance(peft_config, TensorNetworkConfig) else peft_config
    original(self, adapter_name, own, *args, **kwargs)


for _cls in _MODELS:
    _patch(_cls, "__init__")(_made)
    if _cls is not PeftModel and "add_adapter" in _cls.__dict__:
        _patch(_cls, "add_adapter")(_with_copy)


# ---- reading


@_patch(PeftConfig, "from_json_file")
def _from_json_file(original: _Method, cls: type[PeftConfig], path: str, **kwargs: Any) -> dict[str, Any]:
    try:
        found = original(cls, path, **kwargs)
        problem = "" if isinstance(found, dict) else f"it holds a {type(found).__name__}"
    except (ValueError, TypeError, RecursionError) as error:  # of the parser, or of PEFT, which expects a table
        problem = str(error)
    if problem:
        raise AdapterFileError(f"{path} is not an adapter configuration: {problem}", remedy=AGAIN)
    check_depth(found, path)
    kind, ours = found.get("peft_type"), found.keys() >= {"network", "projections", "frozen"}
    unnamed = "peft_type" not in found and not LOADING.get()  # what is not loaded may leave it out
    if kind != TENSOR_NETWORK if ours else not (unnamed or (isinstance(kind, str) and kind in _KINDS)):
        raise AdapterFileError(f"{path} says peft_type={shown(kind)}, an unknown kind of adapter", remedy=AGAIN)
    return found  # type: ignore[no-any-return]


@_patch(PeftConfig, "from_pretrained")
def _from_pretrained(
    original: _Method, cls: type[PeftConfig], path: Any, subfolder: str | None = None, **kwargs: Any
) -> PeftConfig:
    """Read a configuration as its own class does: transformers asks the common one, and it would check no file."""
    with _configured(path, subfolder):
        config: PeftConfig = original(cls, path, subfolder, **kwargs)
    if isinstance(config, TensorNetworkConfig) and not issubclass(cls, TensorNetworkConfig):
        return type(config).from_pretrained(path, subfolder, **kwargs)
    return config


@contextmanager
def _configured(name: Any, subfolder: str | None = None) -> Iterator[None]:
    """Say of a folder without a configuration that this is what it lacks."""
    try:
        yield
    except ValueError as error:
        folder = Path(str(name), subfolder or "")
        if isinstance(error, TnpeftError) or not folder.is_dir() or (folder / CONFIG_NAME).exists():
            raise
        raise AdapterFileError(f"no {CONFIG_NAME} in {str(folder)!r}", remedy=AGAIN) from error


def _with_stored(config: Any, name: Any, options: dict[str, Any]) -> Any:
    """A configuration given beside a folder does not keep the folder's file from being checked."""
    if not isinstance(config, TensorNetworkConfig) or config.stored is not None:
        return config
    config = copy.copy(config)
    config.stored = stored(fetch(str(name), **PeftConfig._split_kwargs(options)[0]))
    return config


@_patch(PeftModel, "from_pretrained")
def _model_from_pretrained(
    original: _Method,
    cls: type[PeftModel],
    model: Any,
    model_id: Any,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load an adapter onto a base model, or leave that as it was."""
    with or_as_before(model, undone=lambda: _holds(model, adapter_name)):
        config = _with_stored(config, model_id, kwargs)
        with loading(), _configured(model_id, kwargs.get("subfolder")):
            return original(cls, model, model_id, adapter_name, is_trainable, config, *args, **kwargs)


@_patch(PeftModel, "load_adapter")
def _load_over(
    original: _Method, self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Load an adapter; over one of that name only if the two are alike, as nothing but the factors is replaced."""
    with _whole(self, adapter_name), loading(), _configured(model_id, kwargs.get("subfolder")):
        if isinstance(self.peft_config.get(adapter_name), TensorNetworkConfig):
            check_fits(self, adapter_name, model_id, **self._split_kwargs(kwargs)[0])
        if any(isinstance(config, TensorNetworkConfig) for config in self.peft_config.values()):
            moved = getattr(self.get_base_model(), "_checkpoint_conversion_mapping", None)  # as PEFT does at first
            kwargs |= {} if kwargs.get("key_mapping") or not moved else {"key_mapping": moved}
        return original(self, model_id, adapter_name, *args, **kwargs)


@_patch(PeftAdapterMixin, "load_adapter")
def _load_checked(
    original: _Method,
    model: Any,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Check a state dict as a file is checked: transformers attaches an adapter before it looks at either."""
    hub = kwargs.get("adapter_kwargs") or {}
    with _whole(model, adapter_name):
        if adapter_state_dict is None:
            peft_config = _with_stored(peft_config, peft_model_id, hub)
            with loading(), _configured(peft_model_id, hub.get("subfolder")):
                return original(model, peft_model_id, adapter_name, peft_config, None, *args, **kwargs)
        if peft_config is None and peft_model_id is not None:
            peft_config = PeftConfig.from_pretrained(peft_model_id, **hub)
        if isinstance(peft_config, TensorNetworkConfig):
            where, peft_config = "adapter_state_dict", copy.copy(peft_config)
            peft_config.stored = unprefixed(entries(adapter_state_dict, where), where, needed=False)
            peft_config.loaded = peft_config.layers is not None and peft_config.projections is not None
        return original(model, peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)


# ---- writing


@_patch(save_and_load, "_filter_state_dict_for_adapter_name")
def _filter_exact(original: _Method, state_dict: dict[str, Tensor], unwanted_adapter_names: list[str]) -> Any:
    """Leave out the arrays of other adapters; a path of the model may hold an adapter's name as well."""
    if not any(f".{PREFIX}" in key for key in state_dict):
        return original(state_dict, unwanted_adapter_names)
    other = {*unwanted_adapter_names}
    return {k: v for k, v in state_dict.items() if (found := _HELD.match(k)) is None or found[1] not in other}


@contextmanager
def _unmerged(model: Any) -> Iterator[None]:
    """Write adapters, and with them whole modules as they were before merging."""
    with ExitStack() as stack:
        for layer in layers(model):
            if isinstance(layer, DenseLinear):
                stack.enter_context(layer.saved_apart())
        yield


@_patch(PeftAdapterMixin, "get_adapter_state_dict")
def _state_unmerged(original: _Method, model: Any, *args: Any, **kwargs: Any) -> Any:
    with _unmerged(model):
        return original(model, *args, **kwargs)


@_patch(PeftModel, "save_pretrained")
def _save_whole(
    original: _Method,
    self: PeftModel,
    save_directory: Any,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save adapters: all files are written beside the folder's first and then moved, so none is ever half there."""
    names = self.peft_config if selected_adapters is None else selected_adapters
    ours = any(isinstance(self.peft_config.get(name), TensorNetworkConfig) for name in names)
    if ours and not safe_serialization:
        raise AdapterFileError(
            "safe_serialization=False would write a pickle, and pickles are not read", remedy="leave it out"
        )
    if ours and save_embedding_layers == "auto" and not _may_be_resized(self):
        save_embedding_layers = False  # PEFT would write those that are targets, which only factors have changed
    options = safe_serialization, selected_adapters, save_embedding_layers, is_main_process, *args
    with written(save_directory) if ours and is_main_process else nullcontext(save_directory) as folder:
        with _unmerged(self):
            original(self, folder, *options, **kwargs)
        if ours and is_main_process:
            _declare_embeddings(self, Path(folder))


def _may_be_resized(model: PeftModel) -> bool:
    """False if the base model was built from a configuration, or has as many tokens as where it was loaded from."""
    config = getattr(model.get_base_model(), "config", None)
    name = getattr(config, "_name_or_path", "")
    if not name or not hasattr(config, "vocab_size"):
        return False
    try:
        return bool(type(config).from_pretrained(name).vocab_size != config.vocab_size)
    except (OSError, ValueError):
        return True  # it cannot be found: PEFT decides


def _declare_embeddings(model: PeftModel, folder: Path) -> None:
    """Name in each written configuration the embeddings that its file holds: loading takes in no others."""
    known = embeddings(model.get_base_model())
    for file in folder.rglob(SAFETENSORS_WEIGHTS_NAME):
        path = file.with_name(CONFIG_NAME)
        table = json.loads(path.read_text(encoding="utf-8"))
        with safe_open(file, "pt") as stored_file:
            held = sorted({name.removeprefix(PEFT_PREFIX) for name in stored_file.keys()} & {*known})  # noqa: SIM118
        if held and table.get("peft_type") == TENSOR_NETWORK:
            path.write_text(json.dumps({**table, "embeddings": held}, indent=2, sort_keys=True), encoding="utf-8")


@_patch(PeftModel, "_upload_modified_files")
def _upload_with_card(original: _Method, model: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Upload a folder once its model card says again what PEFT and the adapters had written into it."""
    adapters = {
        "" if name == "default" else name: config.factorization
        for name, config in model.peft_config.items()
        if isinstance(config, TensorNetworkConfig)
    }
    if adapters and os.path.isfile(os.path.join(working_dir, "README.md")):
        model.create_or_update_model_card(working_dir)
        describe(working_dir, adapters)
    return original(model, working_dir, *args, **kwargs)
