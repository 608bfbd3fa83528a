"""What adapters are attached to: the kinds of layers and weights, which of them targets mean, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnpeft.adapters.experts.fused import check_matrices
from tnpeft.adapters.experts.listed import is_list, listed_weight, starred
from tnpeft.adapters.experts.module import experts_at, weights_in
from tnpeft.adapters.experts.weight import ExpertWeight
from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.rollback import outside
from tnpeft.adapters.sites.convolution import TensorNetworkConvolution
from tnpeft.adapters.sites.embedding import TensorNetworkEmbedding, check_embedding, only_scaled
from tnpeft.adapters.sites.owners import fused, keep_unfused
from tnpeft.adapters.sites.parameter import TensorNetworkParameter, check_parameter, read_through
from tnpeft.adapters.sites.tied import join_tied
from tnpeft.adapters.sites.weight import CONVOLUTIONS, Weight, features
from tnpeft.networks import ConfigError, Factorization, NetworkError, Site

_NEAR = 0.02  # of the length of an output: rounding in half precision


@torch.no_grad()
def _is_linear(module: Any) -> bool:
    """True if a module computes a linear, on one row, or if its weight is not whole, or not here."""
    (out, inp), weight = features(module), module.weight
    if not weight.is_floating_point() or weight.is_meta or weight.numel() != out * inp:
        return True
    x = torch.linspace(-1, 1, inp).to(weight)[None]
    wanted = x @ (weight if isinstance(module, Conv1D) else weight.T) + (0 if module.bias is None else module.bias)
    try:
        return bool((type(module).forward(module, x) - wanted).norm() <= _NEAR * wanted.norm())
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False


class _Kind(NamedTuple):
    """A class of layers, the class that adapts them, and which classes of their own that have another forward fit.

    ``does`` is what the layers do, in words.
    """

    layer: type[nn.Module]
    adapter: type[DenseLinear]
    does: str
    fits: Callable[[Any], bool]


_KINDS = (
    _Kind(nn.Linear, TensorNetworkLinear, "a linear", _is_linear),
    _Kind(Conv1D, TensorNetworkLinear, "a linear", _is_linear),
    _Kind(nn.Embedding, TensorNetworkEmbedding, "look up rows", only_scaled),
    *(_Kind(cls, TensorNetworkConvolution, "convolve", lambda module: False) for cls in CONVOLUTIONS),
)


def _known(module: nn.Module) -> _Kind | None:
    return next((its for its in _KINDS if isinstance(module, its.layer)), None)


def kind(module: nn.Module, quantised: dict[str, Any]) -> type[DenseLinear] | None:
    """The class that adapts a layer, None if there is none."""
    backend = resolve_quantization_backend(module, **quantised)
    found = None if (known := _known(module)) is None else known.adapter
    if backend is None or found is TensorNetworkLinear:
        return found
    return TensorNetworkLinear if getattr(backend, "layer_type", "") == "linear" else None


def base_of(module: nn.Module) -> nn.Module:
    """The layer that a module is, or that it adapts."""
    return module.get_base_layer() if isinstance(module, DenseLinear) else module


def targets_of(
    model: nn.Module, modules: Mapping[str, nn.Module], config: Any, meant: Callable[[str], Any]
) -> dict[str, Weight]:
    """What targeted modules adapt, by path: the weights of layers, and Parameters that modules read themselves.

    ``meant`` is PEFT's answer for the path of a weight: true if it is a target itself, an ``_ExcludedModule`` if it
    is excluded.
    """
    left, quantised, axes = dict(modules), get_quantization_kwargs(model), config.axes or {}
    found = _take_listed(model, left, meant, config.factorization)
    unused = {*axes}
    for name, module in left.items():
        if isinstance(module, TensorNetworkParameter):
            module, name = module.get_base_layer(), name.rpartition(".")[0]
        weights = weights_in(module)
        held = [weight for weight in weights if _named(name, weight, meant)]
        check_matrices(name, module, held)
        for weight in held:
            path = f"{name}.{weight.name}".lstrip(".")
            if not weight.grouped:
                weight = weight.with_axes(path, axes)
                unused -= {end for end in axes if f".{path}".endswith(f".{end}")}
            found[f"{name}.{weight.child}".lstrip(".")] = weight
        if not held and not any(weight.grouped for weight in weights):
            found[name] = _layer(name, base_of(module), quantised)
    if unused:
        raise ConfigError(
            f"axes names {min(unused)!r}, and no targeted Parameter is called so",
            remedy="name Parameters that modules read themselves, as in target_modules",
        )
    join_tied(model, found, meant, config.loaded)
    return found


def _layer(name: str, base: nn.Module, quantised: dict[str, Any]) -> Weight:
    """The weight of a module, once it is known to be a linear, an embedding or a convolution."""
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
    return Weight.of(base)


def _named(owner: str, weight: Weight, meant: Callable[[str], Any]) -> bool:
    """True if a weight is a target, by its names or, grouped with others, by its owner's, and not excluded."""
    answers = [meant(f"{owner}.{its}".lstrip(".")) for its in {weight.name, weight.child}]
    if any(isinstance(answer, _ExcludedModule) for answer in answers):
        return False
    return any(answers) or (weight.grouped and bool(meant(owner)))


def _take_listed(
    model: nn.Module,
    modules: dict[str, nn.Module],
    meant: Callable[[str], Any],
    f: Factorization,
) -> dict[str, Weight]:
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
    return {star: listed_weight(star, own) for star, own in groups.items()}


def site_weight(model: nn.Module, weights: Mapping[str, Weight], site: Site) -> Tensor:
    """The base weight of a site, fp32 ``[out, inp]``, of experts ``[expert, out, inp]``."""
    weight = weights[site.module]
    paths = site.paths if site.listed else site.paths[:1]
    matrices = [_adapting(model, path, weight, FactorBank()).base_matrix() for path in paths]
    matrix = torch.stack(matrices) if site.listed else matrices[0]
    return matrix[..., *weight.region(site)]


def _adapting(model: nn.Module, path: str, weight: Weight, bank: FactorBank) -> DenseLinear:
    """What adapts a weight at one of its paths; if there is nothing yet, what could, in no place of the model."""
    if weight.held:
        owner = model.get_submodule(path.rpartition(".")[0]) if weight.grouped else weight.module
        found = owner._modules.get(weight.child)
        cls: Any = ExpertWeight if weight.grouped else TensorNetworkParameter
        return found if isinstance(found, cls) else cls(weight, bank)
    layer, quantised = model.get_submodule(path), get_quantization_kwargs(model)
    if isinstance(layer, DenseLinear):
        return layer
    cls = kind(layer, quantised)  # there is one: it was checked when it was targeted
    return cls(layer, bank, **quantised)  # type: ignore[no-any-return]


def adapted_layer(model: nn.Module, path: str, weight: Weight, bank: FactorBank) -> DenseLinear:
    """What adapts a weight at one of its paths in the model; it takes the weight's place if there is nothing yet."""
    owner, _, name = path.rpartition(".")
    if weight.grouped:
        return experts_at(model, owner, bank).get_submodule(name)  # type: ignore[return-value]
    found = _adapting(model, path, weight, bank)
    if weight.held:
        read_through(weight, found)
        return found
    parent = model.get_submodule(owner)
    target = getattr(parent, name)
    if found is not target:
        if fused(parent):
            found.register_forward_pre_hook(keep_unfused)
        setattr(parent, name, found.train(target.training))
    return found


# ---- what a kind refuses


def check_kind(name: str, weight: Weight, config: Any, quantised: dict[str, Any]) -> None:
    """Raise if the weight is one that an adapter of the configuration cannot adapt."""
    module = weight.module
    if 0 in (weight.out_features, weight.in_features):
        raise NetworkError(
            f"{name} has no weight yet, or an empty one", remedy="call the model once, or leave it out"
        )
    if weight.held and not weight.grouped:
        check_parameter(name, config)
    elif isinstance(module, nn.Embedding):
        check_embedding(name, module, config.dora)
    for layer in () if weight.held else weight.linears or (module,):
        known = _known(layer)
        if known is None or resolve_quantization_backend(layer, **quantised) is not None:
            continue
        if type(layer).forward is not known.layer.forward and not known.fits(layer):
            raise NetworkError(
                f"{name} is a {type(layer).__name__}, which does more than {known.does}",
                remedy="leave it out of target_modules, or name it in exclude_modules",
            )
