"""Learning rates by rule: one relative step for every line, one rate for every factor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from sys import float_info
from typing import Any, Literal, Protocol

from tnpeft.networks import Factorization, Network, NetworkError
from tnpeft.networks.sizes import Size, Sizes, integers, product
from tnpeft.scaling.gain import AnyNetwork, entries_of, open_sizes, resolve
from tnpeft.scaling.moments import Entry, first_step

Rule = Literal["gain", "structure", "measured"]

KAPPA = 4.0
"""Relative change, per relative step, that the trained factors other than the zero one make together.

Such a factor moves by ``KAPPA * relative_step / (trained factors - 1)`` of its RMS in a step. Fitted on LoRA once: at
one tuned rate for both factors (rank 2, width 64, Kaiming A) A moves that much faster, relative to itself, than the
update does relative to the base weight: ``rms_base * 3 * inp / sqrt(r)`` is 3.8 to 5.7 over the sites of the digits
backbone.
"""


class Steps(Protocol):
    """Anything with the steps of a contraction, such as :class:`tnpeft.planning.Plan`."""

    @property
    def steps(self) -> tuple[Any, ...]: ...


def learning_rates(
    f: AnyNetwork,
    sizes: Sizes | None = None,
    /,
    *,
    relative_step: float,
    rms_base: float = 1.0,
    rule: Rule = "gain",
    plan: Steps | None = None,
    **more: Size,
) -> dict[str, float]:
    """Return the learning rate of each trained factor by a rule.

    ``rule="gain"``: the zero factor's first step moves an entry of the update by ``relative_step`` of the RMS of the
    base weight, ``relative_step * rms_base / gain``; every other trained factor moves by ``KAPPA * relative_step /
    (trained factors - 1)`` of its own RMS. Where no factor is zero, rates are proportional to each factor's RMS and
    the update moves as said. Rescaling a bond rescales the rates with the factors.

    ``rule="structure"`` (arXiv 2406.06248): ``relative_step * columns / d_in / (trained factors)``, where ``d_in``
    is the number of entries that the factor's step of ``plan`` sums for each that it emits, 1 at least.

    ``rule="measured"`` needs activations: pass a batch to :func:`tnpeft.parameter_groups`.

    Args:
        f: a factorization, a network or line, or the name of a family.
        sizes: the sizes of all indices.
        relative_step: the size of a step relative to the base weight's.
        rms_base: the RMS of an entry of the base weight.
        rule: gain or structure.
        plan: for ``rule="structure"`` the plan of one site, with its activations.
        more: sizes by name.

    Raises:
        NetworkError: a size is missing, the step is not positive, the update cannot move, or the rule lacks its plan.

    >>> sizes = {"out": 64, "r": 4, "inp": 64}
    >>> learning_rates("B[out r] A[r inp] -> out inp", sizes, relative_step=1e-3, rms_base=0.1)
    {'B': 0.0008, 'A': 0.00025}
    """
    _positive("relative_step", relative_step)
    _positive("rms_base", rms_base)
    f, open_ranks = resolve(f)
    net = f.network
    bound = integers(net, dict(open_sizes(f, sizes, open_ranks, more)))
    if rule == "gain":
        entries = entries_of(f, net, bound, rms_base)
        squares = first_step(net, bound, entries, f.scale)
        return by_gain(f, stored(net, entries), squares, relative_step * rms_base, relative_step)
    if rule == "structure":
        if plan is None:
            raise NetworkError('rule="structure" reads the steps of a plan', remedy="pass plan=tnpeft.plan(...)")
        return by_structure(net, bound, plan, relative_step)
    raise NetworkError(
        f"rule={rule!r} cannot be worked out from sizes" if rule == "measured" else f"rule={rule!r} is unknown",
        remedy="use gain or structure; tnpeft.parameter_groups(model, ..., batch=...) measures",
    )


def stored(net: Network, entries: Mapping[str, Entry]) -> dict[str, Size]:
    """Return by label the mean square of each trained factor's entries at the start, as stored.

    >>> f = Factorization.of("w[r] A[out r] B[inp r] -> out inp", ranks={"r": 2}, init={"A": "ones"}, unit_norm=["A"])
    >>> stored(f.network, entries_of(f, f.network, {"out": 4, "r": 2, "inp": 8}))
    {'w': 0.25, 'A': 1.0, 'B': 0.0}
    """
    return {factor.name: entries[factor.name].stored for factor in net.factors if factor.kind == "trainable"}


def by_gain(
    f: Factorization,
    raw: Mapping[str, float],
    squares: Mapping[str, float],
    move: float,
    relative_step: float,
) -> dict[str, float]:
    """Return rates by gain: ``raw`` and ``squares`` are each factor's mean square and squared gain.

    ``move`` is the RMS that the first step gives to an entry of the update.

    Raises:
        NetworkError: no factor moves the update at the start.
    """
    zeros = {label: square for label, square in squares.items() if raw[label] == 0 and square > 0}
    count = max(
        len({factor.name for factor in term.factors if factor.kind == "trainable"})
        for line in f.lines
        for term in line.network.terms
    )
    if zeros:
        rate = move / math.sqrt(sum(zeros.values()))
        kappa = KAPPA * relative_step / max(count - 1, 1)
        return {label: rate if label in zeros else kappa * math.sqrt(square) for label, square in raw.items()}
    total = math.sqrt(sum(square * raw[label] for label, square in squares.items()))
    if total == 0:
        raise NetworkError("no factor moves the update at its first step", line=str(f.network), remedy="change init")
    return {label: move * math.sqrt(square) / total for label, square in raw.items()}


def by_structure(net: Network, sizes: Mapping[str, int], plan: Steps, relative_step: float) -> dict[str, float]:
    """Return rates by the structure-aware rule of arXiv 2406.06248, read off the steps of a plan.

    >>> import tnpeft
    >>> f = tnpeft.families.lora(rank=4)
    >>> p = tnpeft.plan(f, out=64, inp=64, layer=1, proj=1, tokens=4, minimize="macs")
    >>> by_structure(f.network, {"out": 64, "r": 4, "inp": 64}, p, 1e-3)
    {'B': 0.008, 'A': 0.0005}
    """
    labels = {net.label(factor): factor for factor in net.factors if factor.kind == "trainable"}
    columns, found = product(sizes[i] for i in net.cols), dict[str, float]()
    for step in plan.steps:
        for name, use in zip(step.operands, step.uses, strict=True):
            if name in labels:
                width = product(sizes[i] for i in use if i not in step.indices and i in sizes)
                found.setdefault(name, relative_step * columns / width / len(labels))
    return {label: found[label] for label in labels if label in found}


def _positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value <= float_info.max):
        raise NetworkError(f"{name} is {value!r}", remedy=f"pass {name}= a positive number, such as 1e-3")
