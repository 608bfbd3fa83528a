"""The factors of an adapted model as they were declared: read, set, and grouped for an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
    return {
        name: _stacked([held[param].detach() for param in pieces], pieces, layout, grid).clone()
        for name, pieces, grid in entries(layout)
    }


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
    layout = bank.layouts[adapter]
    named = {name: (pieces, grid) for name, pieces, grid in entries(layout)}
    if not isinstance(values, Mapping):
        raise NetworkError(f"the factors are {str(values)[:60]!r}", remedy="pass them by name, such as {'B': tensor}")
    held = arrays(model, bank, adapter)
    changes: list[tuple[Tensor, Tensor]] = []
    for name, value in values.items():
        if name not in named:
            raise NetworkError(f"the adapter has no factor {name!r}", remedy=f"its factors are {', '.join(named)}")
        pieces, grid = named[name]
        value = torch.as_tensor(value)
        own = [held[param] for param in pieces]
        shape = tuple(_stacked(own, pieces, layout, grid).shape)
        if tuple(value.shape) != shape or not torch.isfinite(value).all():
            found = f"has the shape {tuple(value.shape)}" if tuple(value.shape) != shape else "is not finite"
            raise NetworkError(
                f"the value of factor {name!r} {found}", remedy=f"pass finite numbers of shape {shape}"
            )
        new = _unstacked(value, pieces, layout, grid)
        fixed = pieces[0].kind != "trainable"
        if fixed and any(not torch.equal(a.cpu(), b.to(a.dtype).cpu()) for a, b in zip(own, new, strict=True)):
            raise NetworkError(f"factor {name!r} is {pieces[0].kind}", remedy="leave it out, or give it another seed")
        changes += [] if fixed else list(zip(own, new, strict=True))
    with torch.no_grad():
        for array, value in changes:
            array.copy_(value)


def refresh(model: nn.Module) -> None:
    """Forget what was computed from the factors in inference; needed only after edits through ``.data``.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"])
    >>> refresh(peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config))
    """
    for update in updates(model) if find_bank(model) is not None else ():
        update.kept.clear()


# ---- pieces and their arrays

_Grid = tuple[bool, bool]  # whether the stack has a layer and a proj axis


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


def entries(layout: Layout) -> Iterator[tuple[str, list[ParameterSpec], _Grid]]:
    """Names of :func:`factors`, their pieces in the stack's order, and whether it has a layer and a proj axis."""
    labels: dict[str, dict[tuple[int, ...], list[ParameterSpec]]] = {}
    for param in layout.parameters:
        labels.setdefault(param.label, {}).setdefault(param.shape, []).append(param)
    for label, shapes in labels.items():
        for shape, pieces in shapes.items():
            name = label if len(shapes) == 1 else f"{label}#{'x'.join(map(str, shape))}"
            first = pieces[0]
            grid = first.layer is not None, first.proj is not None
            pieces = sorted(
                pieces,
                key=lambda param: (
                    -1 if param.layer is None else param.layer,
                    -1 if param.proj is None else layout.projs.index(param.proj),
                ),
            )
            layers, projs = {param.layer for param in pieces}, {param.proj for param in pieces}
            same = all(((param.layer is not None), (param.proj is not None)) == grid for param in pieces)
            if same and len(pieces) == len(layers) * len(projs):
                yield name, pieces, grid
            else:
                for param in pieces:
                    where = [str(place) for place in (param.layer, param.proj) if place is not None]
                    yield "@".join([label, *where]), [param], (False, False)


def _order(param: ParameterSpec, layout: Layout, grid: _Grid) -> list[int]:
    """Return the permutation of the axes of a ``[layer, proj, ...]`` stack to the declared order."""
    declared = next(
        factor.indices
        for net in (line.network for line in layout.factorization.lines)
        for factor in net.factors
        if net.label(factor) == param.label and {*factor.indices} - {"layer", "proj"} == {*param.indices}
    )
    axes = [name for name, there in zip(("layer", "proj"), grid, strict=True) if there] + [*param.indices]
    return [axes.index(index) for index in declared if index in axes]


def _stacked(arrays: list[Tensor], pieces: list[ParameterSpec], layout: Layout, grid: _Grid) -> Tensor:
    sizes = [len({param.layer for param in pieces})] * grid[0] + [len({param.proj for param in pieces})] * grid[1]
    stack = torch.stack(arrays).reshape([*sizes, *pieces[0].shape])
    return stack.permute(_order(pieces[0], layout, grid))


def _unstacked(value: Tensor, pieces: list[ParameterSpec], layout: Layout, grid: _Grid) -> list[Tensor]:
    order = _order(pieces[0], layout, grid)
    stack = value.permute([order.index(axis) for axis in range(len(order))])
    return list(stack.reshape(len(pieces), *pieces[0].shape))
