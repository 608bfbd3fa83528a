"""Measured steps: the change of every site's output per unit rate of each factor, beside the predicted one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft._text import Table, block
from tnpeft.adapters.experts.weight import ExpertWeight
from tnpeft.adapters.layer.binding import Update
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.layout import ParameterSpec
from tnpeft.networks import NetworkError, Site
from tnpeft.nn.dense import dense
from tnpeft.nn.executor.groups import Groups
from tnpeft.scaling.gain import squares_on

_TOKENS = 1024  # rows of activations that are measured at a site


_Seen = tuple[Tensor, Groups | None, dict[str, float]]  # inputs, their experts, changes by factor


@dataclass(frozen=True)
class CoordinateRow:
    """One factor at one site: RMS changes of the site's output per unit rate, at the model's present factors."""

    layer: int
    proj: str
    factor: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Measured over predicted; 0 where the factor does not move yet."""
        return self.measured / self.predicted if self.predicted else 0.0


@dataclass(frozen=True)
class CoordinateCheck:
    """The rows of :func:`coordinate_check`; prints as a table."""

    rows: tuple[CoordinateRow, ...]

    def __str__(self) -> str:
        return self._table().text(rule=True)

    def _repr_html_(self) -> str:
        return block(self._table())

    def _table(self) -> Table:
        cells = (
            (f"{r.layer} {r.proj}", r.factor, f"{r.measured:.3g}", f"{r.predicted:.3g}", f"{r.ratio:.2f}")
            for r in self.rows
        )
        return Table(("site", "factor", "measured", "predicted", "ratio"), tuple(cells), "<>")

    def plot(self, path: str | Path) -> None:
        """Write a picture of measured against predicted changes, one mark for each factor of a site."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        for factor in dict.fromkeys(row.factor for row in self.rows):
            points = [
                (r.predicted, r.measured) for r in self.rows if r.factor == factor and r.predicted and r.measured
            ]
            if points:
                axes.loglog(*zip(*points, strict=True), "o", label=factor)
        axes.axline((1, 1), (10, 10), color="grey", linewidth=0.8)
        axes.set(xlabel="predicted change per unit rate", ylabel="measured change per unit rate")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        figure.savefig(path)


def coordinate_check(model: nn.Module, batch: Any, adapter: str = "default") -> CoordinateCheck:
    """Return the measured change of every site's output for a signed step of each factor, beside the predicted one.

    The measured one is the RMS, over tokens and features, of the derivative of the output along the signs of the
    factor's gradient on the batch; the predicted one is the factor's gain at the start times the RMS length of the
    inputs, as if signs were independent. Measured over predicted is the alignment of gradient and inputs, between
    about 1 and the root of the number of columns. The loss is the model's own, or else the mean square of the
    outputs. The model is left as it was.

    Args:
        model: a model with an adapter, not merged.
        batch: what the model is called with: a mapping of keywords, a tuple, or one tensor.
        adapter: the adapter's name.

    Raises:
        NetworkError: the model has no such adapter, it is merged or inactive, or the batch reaches no site.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> [(row.factor, row.measured > 0) for row in coordinate_check(model, torch.randn(3, 4)).rows]
    [('B', True), ('A', False)]
    """
    seen = _observe(model, batch, adapter)
    squares = squares_on(bank_of(model, adapter).layouts[adapter], base_sizes(model, adapter))
    rows = []
    for site, (x, _, changes) in seen.items():
        length = sqrt(float(x.square().sum(-1).mean()))
        for label, measured in changes.items():
            predicted = sqrt(float(squares[site].get(label, 0.0))) * length
            rows.append(CoordinateRow(site.layer, site.proj, label, measured, predicted))
    return CoordinateCheck(tuple(rows))


def measured_rates(model: nn.Module, batch: Any, adapter: str, step: float) -> dict[Site, dict[str, float]]:
    """Return rates at which each factor's signed step moves the outputs by its share of ``step`` times their RMS.

    Factors that do not move yet are measured after one such step of those that do; the model is left as it was.
    """
    bank = bank_of(model, adapter)
    held = arrays(model, bank, adapter, kinds=("trainable",))
    outputs = {
        item.site_layout.site: (module, item) for module in sites(model) for item in module.updates.get(adapter, ())
    }
    first = _observe(model, batch, adapter)
    wanted = {}
    for site, (x, groups, _) in first.items():
        module, item = outputs[site]
        weight = module.site_matrix(item).detach().to(x.dtype).mT
        output = x @ weight if groups is None else groups.matmul(x, weight)
        wanted[site] = step * float(output.square().mean().sqrt())
    rates: dict[Site, dict[str, float]] = {}
    for site, (_, _, changes) in first.items():
        rates[site] = {k: wanted[site] / (len(changes) * c) for k, c in changes.items() if c > 0}
    kept = {param: array.detach().clone() for param, array in held.items()}
    grads = _gradients(model, batch, held)
    try:
        with torch.no_grad():
            for site_layout in bank.layouts[adapter].site_layouts:
                for label, rate in rates.get(site_layout.site, {}).items():
                    param = site_layout.parameters[label]
                    if (grad := grads.get(param)) is not None and not kept[param].any():
                        held[param].copy_(-rate * grad.sign())
        second = _observe(model, batch, adapter)
    finally:
        with torch.no_grad():
            for param, value in kept.items():
                held[param].copy_(value)
    for site, (_, _, changes) in second.items():
        for label, change in changes.items():
            if change > 0:
                rates[site].setdefault(label, wanted[site] / (len(changes) * change))
    return rates


def _observe(model: nn.Module, batch: Any, adapter: str) -> dict[Site, _Seen]:
    """The inputs of every site, their experts, and the RMS change of its output along the signs of each gradient."""
    bank = bank_of(model, adapter)
    if bank.merged:
        raise NetworkError("a merged adapter cannot be measured", remedy="call unmerge_adapter() first")
    layout = bank.layouts[adapter]
    inputs: dict[nn.Module, tuple[Tensor, Groups | None]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, ExpertWeight):
            inputs.setdefault(module, module.seen(_TOKENS, *args))
        else:
            inputs.setdefault(module, (args[0].detach().reshape(-1, args[0].shape[-1])[:_TOKENS], None))

    linears = [module for module in sites(model) if isinstance(module, TensorNetworkLinear | ExpertWeight)]
    hooks = [module.register_forward_pre_hook(keep) for module in linears]
    try:
        grads = _gradients(model, batch, arrays(model, bank, adapter, kinds=("trainable",)))
    finally:
        for hook in hooks:
            hook.remove()
    held = arrays(model, bank, adapter)
    found: dict[Site, _Seen] = {}
    for module in sites(model):
        for item in module.updates.get(adapter, ()) if module in inputs else ():
            rows, groups = inputs[module]
            x = module.site_input(item, rows.double())
            changes = {
                label: _change(item, held, x, groups, label, grads[param])
                for label, param in item.site_layout.parameters.items()
                if param in grads
            }
            found[item.site_layout.site] = x, groups, changes
    if not any(change > 0 for _, _, changes in found.values() for change in changes.values()):
        raise NetworkError(
            f"the batch moves no factor of {adapter!r} at any of {len(layout.site_layouts)} sites",
            remedy="activate the adapter, and pass a batch that reaches its sites",
        )
    return found


def _change(
    item: Update, held: Mapping[ParameterSpec, Tensor], x: Tensor, groups: Groups | None, label: str, grad: Tensor
) -> float:
    """The RMS change of a site's output along the signs of a gradient."""
    place = item.site_layout
    net = place.network.apply("activations", "row")
    columns = [place.sizes[index] for index in place.network.cols]
    rows = x.reshape(len(x), *columns)
    values = {name: held[param].detach().double() for name, param in place.parameters.items()}
    norms = {op.key: op.norm for op in item.operands if op.norm}

    def output(moved: Tensor) -> Tensor:
        now = {**values, label: moved}
        for name, param in place.parameters.items():
            if axes := norms.get(param.key):
                now[name] = now[name] / torch.linalg.vector_norm(now[name], dim=axes, keepdim=True)
        result: Tensor = dense(net, {**now, "activations": rows})
        if groups is not None and net.stack:  # of every expert for every row: keep each row's own
            result = result[groups.ids, torch.arange(len(rows), device=rows.device)]
        return result

    _, change = torch.func.jvp(output, (values[label],), (grad.sign().double(),))
    return item.scale * sqrt(float(change.square().mean()))


def _gradients(model: nn.Module, batch: Any, held: Mapping[ParameterSpec, Tensor]) -> dict[ParameterSpec, Tensor]:
    """The gradients of the model's loss on a batch, without a trace in the model."""
    trained = {param: array for param, array in held.items() if array.requires_grad}
    with _evaluating(model), torch.enable_grad():
        if isinstance(batch, Mapping):
            out = model(**batch)
        else:
            out = model(*batch) if isinstance(batch, tuple | list) else model(batch)
        loss = getattr(out, "loss", None)
        if loss is None:
            value = out if isinstance(out, Tensor) else next(v for v in _tensors(out) if v.is_floating_point())
            loss = value.float().square().mean()
        if not loss.requires_grad:
            return {param: torch.zeros_like(array) for param, array in trained.items()}
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        param: torch.zeros_like(array) if grad is None else grad
        for (param, array), grad in zip(trained.items(), grads, strict=True)
    }


def _tensors(out: Any) -> Iterator[Tensor]:
    values = out.values() if isinstance(out, Mapping) else out
    return (value for value in values if isinstance(value, Tensor))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            if module.training != training:
                module.training = training


def base_sizes(model: nn.Module, adapter: str) -> dict[Site, float]:
    """Return the RMS of an entry of every site's base weight."""
    found: dict[Site, float] = {}
    for linear in sites(model):
        for item in linear.updates.get(adapter, ()):
            square = linear.site_matrix(item).detach().float().square()
            found[item.site_layout.site] = sqrt(float(square.mean()))
    return found


def sites(model: nn.Module) -> Iterator[DenseLinear]:
    """Return the adapted weights of a model."""
    return (module for module in model.modules() if isinstance(module, DenseLinear))
