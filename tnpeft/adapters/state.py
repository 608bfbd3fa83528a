"""The factors of an adapted model as they were declared: read, set, and grouped for an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnpeft.adapters.layer.bank import FactorBank, TensorNetworkLayer, find_bank
from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.sites.selection import updates
from tnpeft.layout import Layout, ParameterSpec
from tnpeft.networks import NetworkError, Site


def bank_of(model: nn.Module, adapter: str = "default") -> FactorBank:
    """The bank of the model, once it is known to hold the adapter."""
    bank = find_bank(model)
    if bank is None:
        raise NetworkError(
            "the model has no tensor-network adapter",
            remedy="attach one with peft.get_peft_model(model, tnpeft.TensorNetworkConfig(...))",
        )
    if adapter not in bank.layouts:
        raise NetworkError(f"unknown adapter {adapter!r}", remedy=f"the adapters are {', '.join(bank.layouts)}")
    return bank


def factors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's factors by name, stacked as declared: ``[layer, proj, ...]``. Copies; raw where unit_norm is set.

    Frozen and constant factors are among them, so that ``tnpeft.dense(network, factors)`` rebuilds the update. A
    factor that has several shapes, or that exists at some (layer, projection) pairs only, gives one entry for
    each of its arrays, ``"A#8x64"`` or ``"B@0@q_proj"``.

    Raises:
        NetworkError: the model has no such adapter.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> {name: tuple(value.shape) for name, value in factors(model).items()}
    {'B': (1, 1, 8, 2), 'A': (1, 1, 2, 4)}
    """
    bank = bank_of(model, adapter)
    return stacked(bank.layouts[adapter], arrays(model, bank, adapter))


def stacked(layout: Layout, held: Mapping[ParameterSpec, Tensor]) -> dict[str, Tensor]:
    """Copies of the arrays of a layout's pieces, as :func:`factors` gives them."""
    return {its.name: its.join([held[param].detach() for param in its.pieces]).clone() for its in stacks(layout)}


def set_factors(model: nn.Module, values: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Put factors into the adapter: the inverse of :func:`factors`, for all of them or some.

    Raises:
        NetworkError: a name or a shape is not the adapter's, a value is not finite, the adapter is merged, or a
            frozen factor would change; nothing is changed then.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> set_factors(model, {"B": torch.ones(1, 1, 8, 2)})
    >>> bool((factors(model)["B"] == 1).all())
    True
    """
    bank = bank_of(model, adapter)
    if bank.merged:
        raise NetworkError("a merged adapter cannot be changed", remedy="call unmerge_adapter() first")
    named = {its.name: its for its in stacks(bank.layouts[adapter])}
    if not isinstance(values, Mapping):
        raise NetworkError(f"the factors are {str(values)[:60]!r}", remedy="pass them by name, such as {'B': tensor}")
    held = arrays(model, bank, adapter)
    changes: list[tuple[Tensor, Tensor]] = []
    for name, value in values.items():
        if name not in named:
            raise NetworkError(f"the adapter has no factor {name!r}", remedy=f"its factors are {', '.join(named)}")
        its, value = named[name], torch.as_tensor(value)
        own = [held[param] for param in its.pieces]
        shape = tuple(its.join(own).shape)
        if tuple(value.shape) != shape or not torch.isfinite(value).all():
            found = f"has the shape {tuple(value.shape)}" if tuple(value.shape) != shape else "is not finite"
            raise NetworkError(
                f"the value of factor {name!r} {found}", remedy=f"pass finite numbers of shape {shape}"
            )
        new, kind = its.split(value), its.pieces[0].kind
        fixed = kind != "trainable"
        if fixed and not all(_same(a, b) for a, b in zip(own, new, strict=True)):
            raise NetworkError(f"factor {name!r} is {kind}", remedy="leave it out, or give it another seed")
        changes += [] if fixed else list(zip(own, new, strict=True))
    with torch.no_grad():
        for array, value in changes:
            array.copy_(value)


def _same(own: Tensor, other: Tensor) -> bool:
    """True if another array has the same numbers, which it may have in fewer bits."""
    dtype = other.dtype if other.is_floating_point() and other.itemsize < own.itemsize else own.dtype
    return torch.equal(own.to(dtype).cpu(), other.to(dtype).cpu())


def refresh(model: nn.Module) -> None:
    """Forget what was computed from the factors in inference; needed only after edits through ``.data``.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"])
    >>> refresh(peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config))
    """
    for update in updates(model) if find_bank(model) is not None else ():
        update.kept.clear()


# ---- pieces and their arrays


def arrays(
    model: nn.Module, bank: FactorBank, adapter: str, kinds: tuple[str, ...] = ("trainable", "frozen", "constant")
) -> dict[ParameterSpec, Tensor]:
    """The array of every param, as it stands in the model."""
    linears: dict[Site, list[tuple[DenseLinear, SiteUpdate]]] = {}
    for module in model.modules():
        for item in module.updates.get(adapter, ()) if isinstance(module, DenseLinear) else ():
            linears.setdefault(item.site_layout.site, []).append((module, item))
    found: dict[ParameterSpec, Tensor] = {}
    for site_layout in bank.layouts[adapter].site_layouts:
        linear, item = (its := linears[site_layout.site])[0]
        for label, param in site_layout.parameters.items():
            if param.kind not in kinds or param in found:
                continue
            owner: TensorNetworkLayer = linear if param.home else bank
            if label in item.constants:
                every = [linear.constant(item, label) for linear, item in its]  # of experts in a list one in each
                listed = "expert" in item.fixed and "expert" in param.indices
                found[param] = torch.stack(every, param.indices.index("expert")) if listed else every[0]
            else:
                found[param] = owner.tnpeft_factors[adapter].get(param.key)
    return found


@dataclass(frozen=True)
class Stack:
    """An entry of :func:`factors`: the pieces, in order, of a ``[layer, proj, ...]`` tensor with its axes permuted.

    ``sizes`` are those of ``layer`` and ``proj`` where it has them, ``order`` the axes as they were declared.
    """

    name: str
    pieces: Sequence[ParameterSpec]
    sizes: Mapping[str, int]
    order: Sequence[int]

    def join(self, arrays: Sequence[Tensor]) -> Tensor:
        """The tensor of the pieces' arrays."""
        stack = torch.stack([*arrays]).reshape([*self.sizes.values(), *self.pieces[0].shape])
        return stack.permute([*self.order])

    def split(self, value: Tensor) -> list[Tensor]:
        """The arrays of a tensor: the inverse of :meth:`join`."""
        stack = value.permute([self.order.index(axis) for axis in range(len(self.order))])
        return list(stack.reshape(len(self.pieces), *self.pieces[0].shape))


def stacks(layout: Layout) -> Iterator[Stack]:
    """The entries of :func:`factors`; pieces that do not form a grid of layers and projections are one each."""
    labels: dict[str, dict[tuple[int, ...], list[ParameterSpec]]] = {}
    for param in layout.parameters:
        labels.setdefault(param.label, {}).setdefault(param.shape, []).append(param)
    places = {proj: k for k, proj in enumerate((None, *layout.projs))}
    for label, shapes in labels.items():
        for shape, pieces in shapes.items():
            name = label if len(shapes) == 1 else f"{label}#{'x'.join(map(str, shape))}"
            pieces.sort(key=lambda param: (-1 if param.layer is None else param.layer, places[param.proj]))
            found = {"layer": {param.layer for param in pieces}, "proj": {param.proj for param in pieces}}
            mixed = any(None in values and len(values) > 1 for values in found.values())
            if not mixed and len(pieces) == len(found["layer"]) * len(found["proj"]):
                sizes = {axis: len(values) for axis, values in found.items() if None not in values}
                yield Stack(name, pieces, sizes, _order(layout, pieces[0], sizes))
            else:
                for param in pieces:
                    where = [str(place) for place in (param.layer, param.proj) if place is not None]
                    yield Stack("@".join([label, *where]), [param], {}, _order(layout, param, {}))


def _order(layout: Layout, param: ParameterSpec, sizes: Mapping[str, int]) -> list[int]:
    declared = next(
        factor.indices
        for net in (line.network for line in layout.factorization.lines)
        for factor in net.factors
        if net.label(factor) == param.label and {*factor.indices} - {"layer", "proj"} == {*param.indices}
    )
    axes = [*sizes, *param.indices]
    return [axes.index(index) for index in declared if index in axes]
