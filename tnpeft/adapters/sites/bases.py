"""The linears that adapters are attached to, and their weights before any update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import _ExcludedModule
from torch import Tensor, nn

from tnpeft.adapters.experts.fused import FusedWeight, check_experts, check_floating
from tnpeft.adapters.experts.listed import ListedWeight, is_list, listed_weight, starred
from tnpeft.adapters.experts.module import weights_in
from tnpeft.adapters.experts.weight import ExpertWeight
from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.rollback import outside
from tnpeft.adapters.sites.kinds import kind, wrapped
from tnpeft.adapters.sites.parameter import TensorNetworkParameter
from tnpeft.adapters.sites.raw import RawWeight, raw_weights
from tnpeft.adapters.targets import features
from tnpeft.networks import ConfigError, Factorization, NetworkError, Site


def linear(name: str, module: nn.Module, quantised: dict[str, Any]) -> nn.Module:
    """Return the linear, embedding or convolution that a targeted module is, or that it adapts already.

    Raises:
        NetworkError: it is something else.
    """
    base = module.get_base_layer() if isinstance(module, DenseLinear) else module
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


def weights_of(
    modules: Mapping[str, nn.Module],
    quantised: dict[str, Any],
    meant: Callable[[str], Any],
    axes: Mapping[str, str] | None = None,
    listed: Mapping[str, ListedWeight] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The targeted modules and, by the same paths, what they adapt: linears, and in place of experts fused weights.

    Args:
        modules: targeted modules by path, without those in lists of experts.
        quantised: PEFT's options for finding a back end.
        meant: PEFT's answer for the path of a weight: true if it is a target itself, an ``_ExcludedModule`` if it
            is excluded.
        axes: the declared axes of raw Parameters, by the ends of their paths.
        listed: what :func:`take_listed` has taken, which is among what is returned.

    Raises:
        NetworkError: a module is something else, or axes are missing, or are of nothing.
    """
    found: dict[str, Any] = {**(listed or {})}
    bases: dict[str, Any] = {**(listed or {})}
    axes, unused = axes or {}, {*(axes or {})}
    for name, module in modules.items():
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
            found, bases = found | raws, bases | raws
            continue
        check_experts(name, module)
        weights = weights_in(module)
        for weight in weights:
            answer = meant(path := f"{name}.{weight.name}")
            if answer or (meant(name) and not isinstance(answer, _ExcludedModule)):
                found[path] = bases[path] = weight
        if not weights:
            found[name], bases[name] = module, linear(name, module, quantised)
    if unused:
        raise ConfigError(
            f"axes names {min(unused)!r}, and no targeted Parameter is called so",
            remedy="name Parameters that modules read themselves, as in target_modules",
        )
    return found, bases


def _named(owner: str, raw: RawWeight, meant: Callable[[str], Any]) -> bool:
    answers = [meant(f"{owner}.{its}".lstrip(".")) for its in (raw.name, raw.child)]
    return any(answers) and not any(isinstance(answer, _ExcludedModule) for answer in answers)


def take_listed(
    model: nn.Module,
    modules: dict[str, nn.Module],
    quantised: dict[str, Any],
    meant: Callable[[str], Any],
    f: Factorization,
) -> dict[str, ListedWeight]:
    """Take the lists of experts out of the targeted modules, and give the weights that their linears are.

    If a line has the index ``expert``, so are targeted linears inside such lists.

    Raises:
        NetworkError: the experts of a list differ, or hold no linears.
    """
    by_expert = any("expert" in rule.network.indices for rule in f.lines)
    targeted = [name for name, module in modules.items() if is_list(name, module)]
    for name in targeted:
        del modules[name]
    groups: dict[str, dict[str, nn.Module]] = {}
    for path, module in outside(model) if targeted or by_expert else ():
        inside = any(path.startswith(f"{name}.") for name in targeted)
        base = module.get_base_layer() if isinstance(module, DenseLinear) else module
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


def site_weight(modules: dict[str, Any], quantised: dict[str, Any], site: Site) -> Tensor:
    """The base weight of a site, fp32 ``[out, inp]``, of experts ``[expert, out, inp]``."""
    module = modules[site.module]
    if isinstance(module, FusedWeight | ExpertWeight):
        weight = ExpertWeight(module, FactorBank()) if isinstance(module, FusedWeight) else module
        return weight.site_matrices(site)
    if isinstance(module, ListedWeight):
        one = replace(site, module="", experts=0)
        return torch.stack([site_weight({"": linear}, quantised, one) for linear in module.linears])
    if not isinstance(module, DenseLinear | RawWeight):
        module = wrapped(module, FactorBank(), quantised)
    rows = slice(site.start, site.start + site.out) if "/out:" in site.proj else slice(None)
    cols = slice(site.start, site.start + site.inp) if "/inp:" in site.proj else slice(None)
    return (module.matrix() if isinstance(module, RawWeight) else module.base_matrix())[..., rows, cols]
