"""Groups for an optimizer: every factor at its rate, given or by rule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from tnpeft.adapters.layer.bank import find_bank
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.layout import Layout, ParameterSpec
from tnpeft.networks import NetworkError, Site
from tnpeft.optim.coordinate import base_sizes, measured_rates
from tnpeft.optim.observed import adapted_weights
from tnpeft.planning import plan as best_plan
from tnpeft.scaling.gain import starts_on
from tnpeft.scaling.rates import by_gain, by_structure, stored


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    adapter: str | None = None,
    *,
    relative_step: float | None = None,
    rule: str = "gain",
    batch: Any = None,
    **common: Any,
) -> list[dict[str, Any]]:
    """Return groups for a torch optimizer: every trainable parameter once, factors at their own learning rate.

    With ``relative_step`` rates follow a rule of :func:`tnpeft.learning_rates`: by ``"gain"`` the first step moves
    an entry of a site's update by that share of the RMS of the site's base weight. A factor of several sites learns
    at the mean of the rates that its sites ask for. Magnitudes of DoRA move by that share of their RMS, and what is
    not a factor, such as a new head, learns at ``lr``, or at ``relative_step`` where that is not given.
    ``rule="measured"`` takes gradients on ``batch``: a factor's rate is such that its signed step
    moves the outputs of its sites by ``relative_step`` of the base outputs' RMS, shared among the trained factors.

    Args:
        model: a model with adapters.
        lr: learning rate of everything that has no multiplier; without it and ``relative_step`` the ``relative_step``
            of the adapter's configuration is used.
        adapter: the adapter whose factors are meant, None for all that are trainable.
        relative_step: the size of a step relative to the base weight's.
        rule: gain, structure or measured.
        batch: for ``rule="measured"`` what the model is called with, or a function of the model that returns a loss.
        common: further options of every group, such as ``weight_decay``.

    Raises:
        NetworkError: neither rate nor step is known, the rule is unknown or lacks its batch, the adapter is unknown,
            or a base weight is zero, so that no step is relative to it.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", lr_multiplier={"B": 16}, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> [(group["name"], group["lr"]) for group in parameter_groups(model, lr=0.001)]
    [('B', 0.016), ('A', 0.001)]
    """
    for option, value in (("lr", lr), ("relative_step", relative_step)):
        if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise NetworkError(f"{option} is {value!r}", remedy=f"pass {option}= a finite number from 0 on")
    rates: dict[int, tuple[str, float]] = {}
    bank = find_bank(model) if adapter is None else bank_of(model, adapter)
    for its in [] if bank is None else [name for name in bank.layouts if adapter in (None, name)]:
        step = relative_step
        if step is None and lr is None:
            step = getattr(getattr(model, "peft_config", {}).get(its), "relative_step", None)
        rates |= _rates(model, its, lr, step, rule, batch)
    configs = getattr(model, "peft_config", {}).values()
    steps = [step for config in configs if (step := getattr(config, "relative_step", None)) is not None]
    rest = next((rate for rate in (lr, relative_step, *steps) if rate is not None), None)
    if rest is None:
        raise NetworkError("no learning rate is given", remedy="pass lr=, or relative_step= such as 1e-2")
    grouped: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and (adapter is None or id(parameter) in rates):
            grouped.setdefault(rates.get(id(parameter), ("rest", rest)), []).append(parameter)
    return [{"params": found, "lr": rate, "name": name, **common} for (name, rate), found in grouped.items()]


def _rates(
    model: nn.Module, adapter: str, lr: float | None, step: float | None, rule: str, batch: Any
) -> dict[int, tuple[str, float]]:
    """The group's name and the rate of each trained array of an adapter, by the array's id.

    By rule it is the mean of the rates that the array's sites ask for.
    """
    bank = bank_of(model, adapter)
    layout, found = bank.layouts[adapter], dict[int, tuple[str, float]]()
    places = {place.site: place for place in layout.site_layouts}
    asked: dict[ParameterSpec, list[float]] = {}
    for site, rates in ({} if step is None else site_rates(model, layout, adapter, step, rule, batch)).items():
        for label, rate in rates.items():
            asked.setdefault(places[site].parameters[label], []).append(rate)
    for param, array in arrays(model, bank, adapter, kinds=("trainable",)).items():
        given = lr if step is None else sum(asked[param]) / len(asked[param])
        if given is not None:
            found[id(array)] = param.label, given * layout.factorization.lr_multiplier.get(param.label, 1.0)
    for linear in adapted_weights(model):
        if step is not None and adapter in linear.tnpeft_magnitude:
            magnitude = linear.tnpeft_magnitude[adapter]
            found[id(magnitude)] = "magnitude", step * float(magnitude.detach().float().square().mean().sqrt())
    return found


def site_rates(
    model: nn.Module, layout: Layout, adapter: str, step: float, rule: str, batch: Any
) -> dict[Site, dict[str, float]]:
    """Return for every site the rate that the rule gives to each trained factor there."""
    rates: dict[Site, dict[str, float]] = {}
    if rule == "measured":
        if batch is None:
            raise NetworkError('rule="measured" steps on a batch', remedy="pass batch=")
        return measured_rates(model, batch, adapter, step)
    if rule == "structure":
        for place in layout.site_layouts:
            net, sizes = place.network, dict(place.sizes)
            rates[place.site] = by_structure(net, sizes, best_plan(net, sizes, tokens=1, minimize="macs"), step)
        return rates
    if rule != "gain":
        raise NetworkError(f"rule={rule!r} is unknown", remedy="use gain, structure or measured")
    bases = base_sizes(model, adapter)
    for site, rms in bases.items():
        if not 0 < rms < math.inf:
            raise NetworkError(
                f"the base weight of {site.module} has the RMS {rms}, to which no step is relative",
                remedy="pass lr= instead of relative_step=, or leave that module out of target_modules",
            )
    found = starts_on(layout, bases)
    for place in layout.site_layouts:
        (entries, squares), base = found[place.site], bases[place.site]
        raw = stored(place.line.network, entries)
        rates[place.site] = by_gain(layout.factorization, raw, squares, step * base, step)
    return rates
