"""The tensors in an adapter's file: which a configuration declares on a model, and whether a file holds those alone.

A file is compared name by name with what PEFT will read into the model: nothing else gets in, nothing is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from tnpeft.adapters.constants import PREFIX
from tnpeft.adapters.experts.module import weights_in
from tnpeft.adapters.layer.bank import BANK, TensorNetworkLayer
from tnpeft.layout import Layout
from tnpeft.networks import AdapterFileError, ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

PEFT_PREFIX = "base_model.model."  # of every name in a file
AGAIN = "copy the adapter again from where it was saved"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_SHOWN = 3  # names that an error lists
_INSIDE = (BANK, f"{PREFIX}factors", f"{PREFIX}magnitude", "base_layer")  # modules that an attachment brings


class Entry(NamedTuple):
    """The shape of a tensor (None where the model does not tell), and whether its numbers are floating-point.

    A file must hold what is ``needed`` for an adapter, and may hold the rest besides.
    """

    shape: tuple[int, ...] | None
    floating: bool = True
    needed: bool = True


Stored = dict[str, Entry]


def entries(tensors: Mapping[str, Any], where: str) -> Stored:
    """Shape and kind of every tensor, once all are known to be finite numbers."""
    found = {}
    for name, tensor in tensors.items():
        known = FLOATS if f".{PREFIX}" in f".{name}" else (*FLOATS, *_WHOLE)
        if not isinstance(tensor, Tensor) or tensor.dtype not in known:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise AdapterFileError(f"{name} in {where} is of type {kind}", remedy=AGAIN)
        if tensor.dtype in FLOATS and not (tensor.float() if known is FLOATS else tensor).isfinite().all():
            raise AdapterFileError(f"{name} in {where} is not finite", remedy=AGAIN)
        found[name] = Entry(tuple(tensor.shape), tensor.dtype in FLOATS)
    return found


def unprefixed(stored: Mapping[str, Entry], where: str, needed: bool = True) -> Stored:
    """The entries by their names in the model, which in a file all stand behind one prefix."""
    bare = [name for name in stored if not name.startswith(PEFT_PREFIX)]
    if bare and (needed or len(bare) < len(stored)):
        raise AdapterFileError(
            f"{where} holds {bare[0]}, whose name does not begin with {PEFT_PREFIX}, and PEFT would not load it",
            remedy="save the adapter with save_pretrained",
        )
    return {name.removeprefix(PEFT_PREFIX): entry for name, entry in stored.items()}


def factor_shapes(
    config: PeftConfig, found: Layout, widths: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Shape of every factor and magnitude that a file of this adapter holds, by its name in the model.

    ``widths`` are the output features of fused weights of experts, of which sites may be parts.
    """
    kinds = ("trainable", "frozen") if config.save_frozen else ("trainable",)
    shapes = {
        f"{param.home or BANK}.{PREFIX}factors.{param.key}": param.shape
        for param in found.parameters
        if param.kind in kinds
    }
    if config.dora:
        sites = [site_layout.site for site_layout in found.site_layouts]
        rows = Counter[str]()  # of a module: the ends of its slices' rows, the last of which counts
        for site in sites:
            rows |= Counter({site.module: site.start + site.out})
        for site in sites:
            out = (widths or {}).get(site.module, rows[site.module]) if site.experts else rows[site.module]
            own = (site.experts, out) if site.experts and not site.listed else (out,)
            shapes |= {f"{path}.{PREFIX}magnitude": own for path in site.paths}
    return shapes


def contents(model: nn.Module, config: PeftConfig, found: Layout) -> Stored:
    """The tensors in a file of the configuration's adapter on this model, as PEFT writes and reads them."""
    widths = {
        f"{name}.{weight.name}": weight.out_features
        for name, module in (model.named_modules() if config.dora else ())
        for weight in weights_in(module)
    }
    whole, declared = _whole_modules(model, config), {*(config.embeddings or ())}
    adapted = {path for site_layout in found.site_layouts for path in site_layout.site.paths}
    its = {name: entry for name, entry in embeddings(model).items() if name in declared}
    its |= _biases(model, config, adapted, whole)
    its |= {name: Entry(shape) for name, shape in factor_shapes(config, found, widths).items()}
    for path, module in whole.items():
        its |= {f"{path}.{name}": _entry(value) for name, value in module.state_dict().items()}
    for path, (shape, tied) in _token_rows(model, config).items():
        its[f"{path}.token_adapter.trainable_tokens_delta"] = Entry(shape, needed=not tied)
    return its


def check_contents(stored: Stored, its: Stored, where: str) -> None:
    """Raise unless the tensors are those that the adapter needs on this model; names are those in the model."""
    factors, others = [], []
    for name, entry in stored.items():
        wanted, factor = its.get(name), f".{PREFIX}" in f".{name}"
        if wanted is None and not factor:
            raise AdapterFileError(
                f"{where} holds {name}, which is not part of the adapter and would change the model",
                remedy="do not load it, or take that array out of it; resized embeddings are declared under "
                "'embeddings' in adapter_config.json",
            )
        if wanted is None:
            factors.append(f"{name} {entry.shape} is not part of it")
        elif entry.floating is not wanted.floating:
            others.append(f"{name} is of type {'float' if entry.floating else 'int'}, and the model's is not")
        elif wanted.shape not in (None, entry.shape) and factor:
            factors.insert(0, f"{name} is {entry.shape}, not {wanted.shape}")
        elif wanted.shape not in (None, entry.shape):
            plain = name.replace(".base_layer.", ".")
            others.append(f"{plain} is stored with shape {entry.shape}, and the model's is {wanted.shape}")
    for name, entry in its.items():
        if entry.needed and name not in stored:
            (factors if f".{PREFIX}" in name else others).append(f"{name} {entry.shape} is missing")
    if factors:
        raise AdapterFileError(
            f"the stored factors are not those of the adapter's network here: {_few(factors)}",
            remedy="check that the adapter was trained on this architecture and that its files belong together",
        )
    if others:
        raise AdapterFileError(
            f"what {where} holds beside the factors does not fit: {_few(others)}",
            remedy="load it onto the model class and size that it was trained on, embeddings resized alike",
        )


def check_modules(model: nn.Module, config: PeftConfig, adapter: str) -> None:
    """Raise if PEFT would wrap a part of an adapter because ``modules_to_save`` or a token's module is called so."""
    tokens = config.trainable_token_indices
    named = [*(config.modules_to_save or ()), *(tokens if isinstance(tokens, Mapping) else ())]
    for name in named:
        if any(part.endswith(name) for part in (*_INSIDE, adapter)):
            raise ConfigError(
                f"modules_to_save names {name!r}, and so ends the name of a part of the adapter",
                remedy="give more of the end of the module's path, or another adapter name",
            )
    for path, module in _whole_modules(model, config).items():
        if any(isinstance(part, TensorNetworkLayer) for part in module.modules()):
            raise ConfigError(
                f"modules_to_save names {path}, of which another adapter adapts a linear",
                remedy="train it in full beside adapters of other modules",
            )


def _few(problems: Collection[str]) -> str:
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join([*problems][:_SHOWN]) + more


def _entry(value: Any, needed: bool = True) -> Entry:
    """The entry of one of the model's own tensors; quantised, sharded and offloaded ones do not tell their shape."""
    if not isinstance(value, Tensor):
        return Entry(None, needed=needed)
    told = value.numel() and value.dtype in (*FLOATS, torch.int64)
    return Entry(tuple(value.shape) if told else None, value.is_floating_point(), needed)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrappers and adapted layers."""
    while isinstance(module, AuxiliaryTrainingWrapper | TensorNetworkLayer):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()  # type: ignore[assignment]
    return module


def _ending(model: nn.Module, names: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that PEFT means by the names, outermost ones only: their paths end with one of them."""
    outer: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if path and any(path.endswith(name) for name in names) and not path.startswith(tuple(outer)):
            outer.append(f"{path}.")
            yield path, module


def _whole_modules(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    """The modules that are trained and saved in full, by path."""
    found = _ending(model, config.modules_to_save or ())
    return {path: m.original_module if isinstance(m, ModulesToSaveWrapper) else m for path, m in found}  # type: ignore[misc]


def _token_rows(model: nn.Module, config: PeftConfig) -> dict[str, tuple[tuple[int, int], bool]]:
    """Shape of the trained rows of every embedding, by path, and whether it is tied to the input, which has them."""
    tokens = config.trainable_token_indices
    if tokens is None:
        return {}
    source = _embedding(model, "get_input_embeddings")
    if isinstance(tokens, Mapping):
        found = {name: [path for path, _ in _ending(model, [name])] for name in tokens}
    else:
        tokens, found = {"input embeddings": tokens}, {"input embeddings": [] if source is None else [source]}
    for name, paths in found.items():
        if not paths:
            raise ConfigError(
                f"trainable_token_indices: the model has no {name}",
                remedy="name the embedding: {'embed_tokens': [...]}",
            )
    first = None if source is None else getattr(_unwrapped(model.get_submodule(source)), "weight", None)
    shapes: dict[str, tuple[tuple[int, int], bool]] = {}
    for path, rows in ((path, tokens[name]) for name, paths in found.items() for path in paths):
        module = _unwrapped(model.get_submodule(path))
        if not isinstance(module, nn.Embedding | nn.Linear) or module.weight.ndim != 2:
            raise ConfigError(
                f"trainable_token_indices names {path}, a {type(module).__name__}, not an embedding",
                remedy="name the embedding: {'embed_tokens': [...]}",
            )
        count, width = module.weight.shape
        if not rows or max(rows) >= count:
            raise ConfigError(
                f"trainable_token_indices names {f'token {max(rows)}' if rows else 'no token'} of {path}",
                remedy=f"it has the tokens 0 to {count - 1}; resize the embeddings first if there are to be more",
            )
        shapes[path] = (len(rows), width), path != source and module.weight is first
    return shapes


def _biases(model: nn.Module, config: PeftConfig, adapted: Collection[str], whole: Collection[str]) -> Stored:
    """The biases that are trained; those inside PEFT's copies of whole modules may stand in the file twice."""
    found: Stored = {}
    for name, value in model.state_dict().items() if config.bias != "none" else ():
        owner, _, leaf = name.rpartition(".")
        if leaf != "bias" or f".{PREFIX}" in name:
            continue
        own = owner.removesuffix(".base_layer")
        name = f"{own}.base_layer.bias" if own in adapted else name
        inside = next((path for path in whole if f"{owner}.".startswith(f"{path}.")), None)
        if inside is not None:
            rest = name.removeprefix(f"{inside}.").removeprefix("original_module.")
            copies = (f"{inside}.original_module.{rest}", f"{inside}.modules_to_save.{rest}")
            found |= dict.fromkeys(copies, _entry(value, needed=False))
        elif config.bias == "all" or own in adapted or isinstance(model.get_submodule(own), TensorNetworkLayer):
            found[name] = _entry(value)
    return found


def embeddings(model: nn.Module) -> Stored:
    """Return the weights of the model's embeddings, under each name that PEFT may give them in a file."""
    found: Stored = {}
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        path = _embedding(model, ask)
        if path is None:
            continue
        for name, value in _unwrapped(model.get_submodule(path)).state_dict().items():
            inside = ("", "base_layer.", "original_module.", "modules_to_save.", "token_adapter.base_layer.")
            found |= dict.fromkeys((f"{path}.{part}{name}" for part in inside), _entry(value, needed=False))
    return found


def _embedding(model: nn.Module, ask: str) -> str | None:
    """The path of the model's embedding, None if it has none."""
    try:
        module = getattr(model, ask)() if hasattr(model, ask) else None
    except (NotImplementedError, AttributeError):  # of models without text
        return None
    return next((path for path, its in model.named_modules() if path and its is module), None)
