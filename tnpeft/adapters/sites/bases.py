"""What adapters are attached to: the kinds of layers and weights, which of them targets mean, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from tnpeft.adapters.experts.fused import FusedWeight, check_experts, check_floating
from tnpeft.adapters.experts.listed import ListedWeight, is_list, listed_weight, starred
from tnpeft.adapters.experts.module import experts_at, weights_in
from tnpeft.adapters.experts.weight import ExpertWeight
from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.rollback import outside
from tnpeft.adapters.sites.convolution import CONVOLUTIONS, TensorNetworkConvolution, check_convolution
from tnpeft.adapters.sites.embedding import TensorNetworkEmbedding, check_embedding
from tnpeft.adapters.sites.owners import fused, keep_unfused
from tnpeft.adapters.sites.parameter import TensorNetworkParameter, adapted_parameter, check_parameter, read_through
from tnpeft.adapters.sites.raw import RawWeight, raw_weights
from tnpeft.adapters.sites.tied import join_tied
from tnpeft.adapters.targets import features
from tnpeft.networks import ConfigError, Factorization, NetworkError, Site

_NEAR = 0.02  # of the length of an output: rounding in half precision


def kind(module: nn.Module, quantised: dict[str, Any]) -> type[DenseLinear] | None:
    """The class that adapts a layer, None if there is none."""
    backend = resolve_quantization_backend(module, **quantised)
    if isinstance(module, nn.Linear | Conv1D) or getattr(backend, "layer_type", "") == "linear":
        return TensorNetworkLinear
    if backend is not None:
        return None
    if isinstance(module, nn.Embedding):
        return TensorNetworkEmbedding
    return TensorNetworkConvolution if isinstance(module, CONVOLUTIONS) else None


def base_of(module: nn.Module) -> nn.Module:
    """The layer that a module is, or that it adapts."""
    return module.get_base_layer() if isinstance(module, DenseLinear) else module


def targets_of(
    model: nn.Module, modules: Mapping[str, nn.Module], config: Any, meant: Callable[[str], Any]
) -> dict[str, Any]:
    """What targeted modules adapt, by path: layers, and in place of modules that hold several weights these.

    ``meant`` is PEFT's answer for the path of a weight: true if it is a target itself, an ``_ExcludedModule`` if it
    is excluded.
    """
    left, quantised = dict(modules), get_quantization_kwargs(model)
    bases: dict[str, Any] = dict(_take_listed(model, left, meant, config.factorization))
    axes = config.axes or {}
    unused = {*axes}
    for name, module in left.items():
        if isinstance(module, TensorNetworkParameter):
            module, name = module.get_base_layer(), name.rpartition(".")[0]
        check_floating(name, module)
        raws = {}
        for raw in (raw for raw in raw_weights(module) if _named(name, raw, meant)):
            path = f"{name}.{raw.name}".lstrip(".")
            mine = [own for own in axes if f".{path}".endswith(f".{own}")]
            raws[f"{name}.{raw.child}".lstrip(".")] = raw.with_axes(path, axes[mine[0]] if mine else None)
            unused -= {*mine}
        if raws:
            bases |= raws
            continue
        check_experts(name, module)
        weights = weights_in(module)
        for weight in weights:
            answer = meant(path := f"{name}.{weight.name}")
            if answer or (meant(name) and not isinstance(answer, _ExcludedModule)):
                bases[path] = weight
        if not weights:
            bases[name] = _layer(name, base_of(module), quantised)
    if unused:
        raise ConfigError(
            f"axes names {min(unused)!r}, and no targeted Parameter is called so",
            remedy="name Parameters that modules read themselves, as in target_modules",
        )
    join_tied(model, bases, meant, config.loaded)
    return bases


def _layer(name: str, base: nn.Module, quantised: dict[str, Any]) -> nn.Module:
    """The module, once it is known to be a linear, an embedding or a convolution."""
    if isinstance(base, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        raise NetworkError(
            f"{name} is a {type(base).__name__}, and transposed convolutions are not adapted",
            remedy="leave it out of target_modules, or name it in exclude_modules; modules_to_save trains it in full",
        )
    if kind(base, quantised) is None:
        raise NetworkError(
            f"{name} is a {type(base).__name__}, not a linear, an embedding or a convolution",
            remedy="target its in_proj, which holds the weights of query, key and value"
            if isinstance(base, nn.MultiheadAttention)
            else "target nn.Linear, Conv1D, quantised linears, nn.Embedding or nn.Conv1d to nn.Conv3d; "
            "exclude_modules leaves others out",
        )
    return base


def _named(owner: str, raw: RawWeight, meant: Callable[[str], Any]) -> bool:
    answers = [meant(f"{owner}.{its}".lstrip(".")) for its in (raw.name, raw.child)]
    return any(answers) and not any(isinstance(answer, _ExcludedModule) for answer in answers)


def _take_listed(
    model: nn.Module,
    modules: dict[str, nn.Module],
    meant: Callable[[str], Any],
    f: Factorization,
) -> dict[str, ListedWeight]:
    """Take the lists of experts out of the targeted modules, and give the weights that their linears are.

    If a line has the index ``expert``, so are targeted linears inside such lists.
    """
    quantised = get_quantization_kwargs(model)
    by_expert = any("expert" in rule.network.indices for rule in f.lines)
    targeted = [name for name, module in modules.items() if is_list(name, module)]
    for name in targeted:
        del modules[name]
    groups: dict[str, dict[str, nn.Module]] = {}
    for path, module in outside(model) if targeted or by_expert else ():
        inside = any(path.startswith(f"{name}.") for name in targeted)
        base = base_of(module)
        if not (inside or (by_expert and path in modules)) or kind(base, quantised) is not TensorNetworkLinear:
            continue
        if (star := starred(model, path)) and not isinstance(meant(path), _ExcludedModule):
            groups.setdefault(star, {})[path] = base
            modules.pop(path, None)
    for name in targeted:
        if not any(star.startswith(f"{name}.") for star in groups):
            raise NetworkError(f"the experts of {name} hold no linears", remedy="leave it out of target_modules")
    return {
        star: listed_weight(star, own, {path: features(base) for path, base in own.items()})
        for star, own in groups.items()
    }


@contextmanager
def excluded_weights(held: Mapping[str, Sequence[str]], meant: Callable[[str], Any]) -> Iterator[None]:
    """Keep PEFT, which sees modules only, from saying that nothing is excluded where a weight of one is."""
    paths = (f"{name}.{weight}" for name, weights in held.items() for weight in weights)
    with warnings.catch_warnings():
        if any(isinstance(meant(path), _ExcludedModule) for path in paths):
            warnings.filterwarnings("ignore", "You have passed exclude_modules")
        yield


def site_weight(model: nn.Module, bases: Mapping[str, Any], site: Site) -> Tensor:
    """The base weight of a site, fp32 ``[out, inp]``, of experts ``[expert, out, inp]``."""
    base = bases[site.module]
    if isinstance(base, FusedWeight):
        return ExpertWeight(base, FactorBank()).base_matrix()[:, *base.region(site)]
    if isinstance(base, RawWeight):
        matrix = adapted_parameter(base, FactorBank()).base_matrix()
    else:
        layers = map(model.get_submodule, site.paths if site.listed else site.paths[:1])
        matrices = [_adapted(model, layer, FactorBank()).base_matrix() for layer in layers]
        matrix = torch.stack(matrices) if site.listed else matrices[0]
    rows = slice(site.start, site.start + site.out) if "/out:" in site.proj else slice(None)
    cols = slice(site.start, site.start + site.inp) if "/inp:" in site.proj else slice(None)
    return matrix[..., rows, cols]


def _adapted(model: nn.Module, layer: nn.Module, bank: FactorBank) -> DenseLinear:
    """The layer if it is adapted, else another that adapts it."""
    if isinstance(layer, DenseLinear):
        return layer
    quantised = get_quantization_kwargs(model)
    cls = kind(layer, quantised)
    assert cls is not None  # it was checked when it was targeted
    return cls(layer, bank, **quantised)


def adapted_layer(model: nn.Module, path: str, base: Any, bank: FactorBank) -> DenseLinear:
    """The adapted layer or weight at a path of the model; it takes the place of its base if there is none."""
    owner, _, name = path.rpartition(".")
    if isinstance(base, RawWeight):
        read_through(base, layer := adapted_parameter(base, bank))
        return layer
    if isinstance(base, FusedWeight):
        return experts_at(model, owner, bank).get_submodule(name)  # type: ignore[return-value]
    parent = model.get_submodule(owner)
    target = getattr(parent, name)
    found = _adapted(model, target, bank)
    if found is not target:
        if fused(parent):
            found.register_forward_pre_hook(keep_unfused)
        setattr(parent, name, found.train(target.training))
    return found


# ---- what a kind refuses


def check_kind(name: str, module: Any, config: Any, quantised: dict[str, Any]) -> None:
    """Raise if the layer, a base layer of a kind, is one that an adapter of the configuration cannot adapt."""
    weight = getattr(module, "weight", None)
    if is_lazy(weight) or 0 in features(module):
        raise NetworkError(
            f"{name} has no weight yet, or an empty one", remedy="call the model once, or leave it out"
        )
    if isinstance(module, RawWeight):
        check_parameter(name, config)
    elif isinstance(module, nn.Embedding):
        check_embedding(name, module, config.dora)
    elif isinstance(module, CONVOLUTIONS):
        check_convolution(name, module)
    for linear in module.linears if isinstance(module, ListedWeight) else (module,):
        if isinstance(linear, nn.Linear | Conv1D) and resolve_quantization_backend(linear, **quantised) is None:
            _check_linear(name, linear)


@torch.no_grad()
def _check_linear(name: str, module: Any) -> None:
    """Raise if a linear whose class has a forward of its own computes something else than a linear, on one row."""
    forward, (out, inp), weight = type(module).forward, features(module), module.weight
    read = weight.is_floating_point() and not weight.is_meta and weight.numel() == out * inp  # whole, and here
    if forward in (nn.Linear.forward, Conv1D.forward) or not read:
        return
    x = torch.linspace(-1, 1, inp).to(weight)[None]
    wanted = x @ (weight if isinstance(module, Conv1D) else weight.T) + (0 if module.bias is None else module.bias)
    try:
        same = bool((forward(module, x) - wanted).norm() <= _NEAR * wanted.norm())
    except (TypeError, ValueError, RuntimeError, AttributeError):
        same = False
    if not same:
        raise NetworkError(
            f"{name} is a {type(module).__name__}, which does more than a linear",
            remedy="leave it out of target_modules, or name it in exclude_modules",
        )
