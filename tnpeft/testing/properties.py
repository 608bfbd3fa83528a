"""The properties themselves: each takes one small instance and answers with a verdict and its numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnpeft.layout import Layout, SiteLayout
from tnpeft.networks import Network, Site
from tnpeft.testing.cases import Case
from tnpeft.testing.oracle import brute, tolerance
from tnpeft.testing.strategies import random_factors

Answer = tuple[bool, str]

_TOKENS = (1, 64, 1_000_000)  # plans are made for these; the arithmetic must not depend on it
_BATCH = 3
_STEP = 1e-30  # of the complex-step derivative, which has no cancellation and so no optimal step
_EPS = float(np.finfo(np.float64).eps)


def _worst(got: Any, exact: Any, scale: Any, allowed: float) -> Answer:
    """The largest error relative to ``scale``, against what rounding allows."""
    error = np.abs(np.asarray(got) - exact) / np.where(scale > 0, scale, 1.0)
    worst = float(error.max()) if np.isfinite(error).all() else float("inf")
    return worst <= allowed, f"largest relative error {worst:.1e}, rounding allows {allowed:.1e}"


def contraction(case: Case, seed: int) -> Answer:
    """``dense`` and every plan give what brute force gives."""
    from tnpeft.nn import dense

    net, factors = case.network, random_factors(case.network, case.sizes, seed)
    allowed = tolerance(net, case.sizes)
    passed, detail = _worst(dense(net, factors), brute(net, factors), brute(net, factors, absolute=True), allowed)
    if not passed:
        return False, f"dense: {detail}"
    return _applied(case, seed)


def _programs(case: Case) -> Iterator[tuple[str, Any]]:
    """Programs of one site for every objective, number of tokens, and with and without training."""
    from tnpeft.nn.executor.program import program
    from tnpeft.planning import OBJECTIVES

    net, sizes = _site(case)
    for minimize in OBJECTIVES:
        for tokens in _TOKENS:
            for training in (True, False):
                how = f"{minimize}, {tokens} tokens, {'training' if training else 'inference'}"
                yield how, program(net, sizes, tokens=tokens, minimize=minimize, training=training)


def _site(case: Case) -> tuple[Network, dict[str, int]]:
    net = case.network.select(*case.network.stack)
    return net, {index: case.sizes[index] for index in net.indices}


def _applied(case: Case, seed: int) -> Answer:
    """Every program on activations against ``base + scale * x @ dense.T`` by brute force."""
    import torch

    net, sizes = _site(case)
    factors = random_factors(net, sizes, seed)
    update, size = brute(net, factors), brute(net, factors, absolute=True)
    generator = np.random.default_rng(seed + 1)
    x, base = (generator.standard_normal((_BATCH, n)) for n in update.shape[::-1])
    exact, scale = base + 0.5 * x @ update.T, np.abs(base) + 0.5 * np.abs(x) @ size.T
    allowed = tolerance(net, sizes) + 2 * _EPS * (update.shape[1] + 4)
    answer = True, "no plan was tried"
    for how, run in _programs(case):
        operands = [torch.from_numpy(factors[label]) for label in run.labels]
        got = run(torch.from_numpy(x), operands, base=torch.from_numpy(base), scale=0.5).numpy()
        answer = _worst(got, exact, scale, allowed)
        if not answer[0]:
            return False, f"plan {how}: {answer[1]}"
    return answer


def gradient(case: Case, seed: int) -> Answer:
    """Autograd along a random direction of each trainable factor, against the complex-step derivative."""
    import torch

    from tnpeft.nn.executor.program import program

    net, sizes = _site(case)
    factors = random_factors(net, sizes, seed)
    trainable = [net.label(f) for f in net.factors if f.kind == "trainable"]
    generator = np.random.default_rng(seed + 2)
    rows, cols = brute(net, factors).shape
    x, weight = generator.standard_normal((_BATCH, cols)), generator.standard_normal((_BATCH, rows))
    run = program(net, sizes, tokens=_BATCH)
    positive = Network(tuple(replace(term, sign=1) for term in net.terms), net.output)
    tensors = {k: torch.from_numpy(v).requires_grad_(k in trainable) for k, v in factors.items()}
    loss = (run(torch.from_numpy(x), [tensors[k] for k in run.labels]) * torch.from_numpy(weight)).sum()
    found = torch.autograd.grad(loss, [tensors[k] for k in trainable], allow_unused=True) if trainable else ()
    allowed = len(list(net.uses())) * tolerance(net, sizes) + _EPS * 2 * rows * (cols + 4)
    detail = "nothing is trainable"
    for label, grad in zip(trainable, found, strict=True):
        direction = generator.standard_normal(factors[label].shape)
        got = 0.0 if grad is None else float((grad.numpy() * direction).sum())
        exact = (weight.T @ x * _derivative(net, factors, label, direction)).sum()
        larger = {k: np.abs(v) for k, v in factors.items()}
        slopes = _derivative(positive, larger, label, np.abs(direction))
        scale = (np.abs(weight).T @ np.abs(x) * slopes).sum()
        passed, detail = _worst(got, exact, scale, allowed + 2 * _EPS * direction.size)
        if not passed:
            return False, f"factor {label!r}: {detail}"
    return True, detail


def _derivative(net: Network, factors: dict[str, NDArray[Any]], label: str, direction: NDArray[Any]) -> NDArray[Any]:
    """d dense along one factor's direction, by the complex step: exact to rounding for any polynomial."""
    slopes: NDArray[Any] = brute(net, {**factors, label: factors[label] + 1j * _STEP * direction}).imag / _STEP
    return slopes


def count(case: Case, seed: int) -> Answer:
    """The formula's count is the number of trainable elements that are held."""
    from tnpeft.counting import parameters

    net = case.network
    stored = random_factors(net, case.sizes, seed)
    held = sum(stored[net.label(f)].size for f in net.factors if f.kind == "trainable")
    said = parameters(net, case.sizes)
    return said == held, f"{said} counted, {held} stored"


def rank(case: Case, seed: int) -> Answer:
    """No matrix of the stack has a rank above the bound."""
    from tnpeft.counting import RankWarning, rank_bound

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)  # drawn ranks may exceed their cuts
        bound = rank_bound(case.network, case.sizes)
    update = brute(case.network, random_factors(case.network, case.sizes, seed))
    rank = int(np.linalg.matrix_rank(update).max())
    return rank <= bound, f"rank {rank}, bound {bound}"


# ---- the start


@dataclass(frozen=True)
class Start:
    """A site as training finds it: its site_layout and the start values of its factors, in float64."""

    site_layout: SiteLayout
    init: dict[str, Any]
    factors: dict[str, NDArray[np.float64]]


def starts(plan: Layout, seed: int) -> list[Start]:
    """The start at one site of every line and shape, over a random base weight."""
    from tnpeft.nn.init.initializer import Initializer

    starter = Initializer(plan, seed, _weight)
    different = {(p.network, tuple(p.sizes.items())): p for p in plan.site_layouts}
    return [
        Start(
            site_layout,
            dict(plan.factorization.init),
            {label: starter(piece).double().numpy() for label, piece in site_layout.parameters.items()},
        )
        for site_layout in different.values()
    ]


def _weight(site: Site) -> Any:
    import torch

    generator = torch.Generator().manual_seed(site.layer)
    return torch.randn(site.out, site.inp, generator=generator)


def identity(start: Start) -> Answer:
    """The update is exactly zero, unless a term names a start other than zeros for all its trainable factors."""
    net = start.site_layout.network
    largest = float(np.abs(brute(net, start.factors)).max())
    if largest == 0:
        return True, "the update is exactly zero"
    declared = [
        all(str(start.init.get(net.label(f), "zeros")) != "zeros" for f in term.factors if f.kind == "trainable")
        for term in net.terms
    ]
    if any(declared):
        return True, f"declared: no factor of term {declared.index(True) + 1} is zero; largest entry {largest:.1e}"
    return False, f"the largest entry of the update is {largest:.1e}"


def alive(start: Start, seed: int) -> Answer:
    """Some factor moves the update at once, and every trainable factor does after one step."""
    net, factors = start.site_layout.network, dict(start.factors)
    generator = np.random.default_rng(seed)
    first = _moving(net, factors, generator)
    for label in first:
        factors[label] = factors[label] + 0.1 * generator.standard_normal(factors[label].shape)
    still = [f.name for f in net.factors if f.kind == "trainable" and f.name not in _moving(net, factors, generator)]
    if not first:
        return False, "no gradient reaches any factor"
    if still:
        return False, f"no gradient ever reaches {', '.join(still)}"
    return True, f"{', '.join(first)} at the first step, all at the second"


def _moving(net: Network, factors: dict[str, NDArray[np.float64]], generator: np.random.Generator) -> list[str]:
    """Trainable factors along which the update has a derivative."""
    found = []
    for factor in net.factors:
        if factor.kind == "trainable":
            direction = generator.standard_normal(factors[factor.name].shape)
            if _derivative(net, factors, factor.name, direction).any():
                found.append(factor.name)
    return found
