"""Measured steps: the change of every site's output per unit rate of each factor, beside the predicted one."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnpeft._files import save_figure
from tnpeft._text import Printed, Table
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.networks import Site
from tnpeft.optim.observed import adapted_weights, gradients, observe
from tnpeft.scaling.gain import squares_on


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
class CoordinateCheck(Printed):
    """The rows of :func:`coordinate_check`; prints as a table."""

    rows: tuple[CoordinateRow, ...]

    def _parts(self) -> tuple[Table]:
        cells = (
            (f"{r.layer} {r.proj}", r.factor, f"{r.measured:.3g}", f"{r.predicted:.3g}", f"{r.ratio:.2f}")
            for r in self.rows
        )
        return (Table(("site", "factor", "measured", "predicted", "ratio"), tuple(cells), "<>", rule=True),)

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
        save_figure(figure, Path(path))


def coordinate_check(model: nn.Module, batch: Any, adapter: str = "default") -> CoordinateCheck:
    """Return the measured change of every site's output for a signed step of each factor, beside the predicted one.

    The measured one is the RMS, over tokens and features, of the derivative of the output along the signs of the
    factor's gradient on the batch; the predicted one is the factor's gain at the start times the RMS length of the
    inputs, as if signs were independent. Measured over predicted is the alignment of gradient and inputs, between
    about 1 and the root of the number of columns. The loss is the model's own, or else the mean square of the
    outputs. The model is left as it was.

    Args:
        model: a model with an adapter, not merged.
        batch: what the model is called with: a mapping of keywords, a tuple, or one tensor; or a function of the
            model that returns a loss.
        adapter: the adapter's name.

    Raises:
        NetworkError: the model has no such adapter, it is merged or inactive, or the batch reaches no site.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> [(row.factor, row.measured > 0) for row in coordinate_check(model, torch.randn(3, 4)).rows]
    [('B', True), ('A', False)]
    """
    squares = squares_on(bank_of(model, adapter).layouts[adapter], base_sizes(model, adapter))
    return CoordinateCheck(
        tuple(
            CoordinateRow(
                site.layer,
                site.proj,
                label,
                seen.change(label),
                sqrt(float(squares[site].get(label, 0.0))) * seen.length,
            )
            for site, seen in observe(model, batch, adapter).items()
            for label in seen.changes
        )
    )


def measured_rates(model: nn.Module, batch: Any, adapter: str, step: float) -> dict[Site, dict[str, float]]:
    """Return rates at which each factor's signed step moves the outputs by its share of ``step`` times their RMS.

    Factors that do not move yet are measured after one such step of those that do; the model is left as it was.
    """
    bank = bank_of(model, adapter)
    held = arrays(model, bank, adapter, kinds=("trainable",))
    first = observe(model, batch, adapter)
    rates: dict[Site, dict[str, float]] = {}
    for site, seen in first.items():
        moving = [label for label in seen.changes if seen.change(label) > 0]
        rates[site] = {k: step * seen.output / (len(seen.changes) * seen.change(k)) for k in moving}
    kept = {param: array.detach().clone() for param, array in held.items()}
    grads = gradients(model, batch, held)
    try:
        with torch.no_grad():
            for site_layout in bank.layouts[adapter].site_layouts:
                for label, rate in rates.get(site_layout.site, {}).items():
                    param = site_layout.parameters[label]
                    if (grad := grads.get(param)) is not None and not kept[param].any():
                        held[param].copy_(-rate * grad.sign())
        second = observe(model, batch, adapter)
    finally:
        with torch.no_grad():
            for param, value in kept.items():
                held[param].copy_(value)
    for site, seen in second.items():
        for label in seen.changes:
            if (change := seen.change(label)) > 0:
                wanted = step * first[site].output if site in first else step * seen.output
                rates.setdefault(site, {}).setdefault(label, wanted / (len(seen.changes) * change))
    return rates


def base_sizes(model: nn.Module, adapter: str) -> dict[Site, float]:
    """Return the RMS of an entry of every site's base weight."""
    squares: dict[Site, list[float]] = {}
    for layer in adapted_weights(model):
        for item in layer.updates.get(adapter, ()):
            square = layer.site_matrix(item).detach().float().square()
            squares.setdefault(item.site_layout.site, []).append(float(square.mean()))
    return {site: sqrt(sum(every) / len(every)) for site, every in squares.items()}
