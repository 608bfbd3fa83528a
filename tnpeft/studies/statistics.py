"""Means with intervals, paired differences, the declared contrasts of a study, and variance between methods.

Scores are mappings from a replicate to a number. A replicate is a seed (``0``) or, where a study has several
backbones, a backbone and a seed (``"digits:3/0"``). Replicates of one backbone are not independent: their mean is one
observation.
All intervals and tests are Student's t over independent observations and assume that these are about normal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Any

LEVEL = 0.95
VERDICT = 8  # the fewest independent observations behind a verdict word: below, an interval is all that is shown

Scores = Mapping[Any, float]


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation and 95 % t interval of the mean of ``n`` independent observations.

    ``replicates`` is the number of scores behind them: more than ``n`` where several seeds share a backbone.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    replicates: int


def interval(values: Sequence[float], level: float = LEVEL, draws: int = 0) -> tuple[float, float]:
    """Return Student's t interval of the mean; of one value the whole line.

    It covers the mean of normal observations with probability ``level`` at every number of them. ``draws`` is
    accepted for callers of the bootstrap that this replaced, and has no effect.

    >>> low, high = interval([0.0, 1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3), interval([0.5])
    (-0.554, 3.554, (-inf, inf))
    """
    if len(values) < 2:
        return -math.inf, math.inf
    from scipy import stats

    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def observations(scores: Scores) -> dict[str, float]:
    """Return the independent observations: the mean of each backbone, or each seed where one backbone serves all.

    >>> observations({"a/0": 1.0, "a/1": 3.0, "b/0": 5.0}), observations({0: 1.0, 1: 3.0})
    ({'a': 2.0, 'b': 5.0}, {'0': 1.0, '1': 3.0})
    """
    groups: dict[str, list[float]] = {}
    for replicate, score in scores.items():
        backbone, _, seed = str(replicate).rpartition("/")
        groups.setdefault(backbone or seed, []).append(score)
    return {name: fmean(values) for name, values in groups.items()}


def summary(scores: Scores | Sequence[float]) -> Summary:
    """Return the summary of one or more scores, clustered by backbone."""
    given = scores if isinstance(scores, Mapping) else dict(enumerate(scores))
    values = list(observations(given).values())
    sd = stdev(values) if len(values) > 1 else 0.0
    return Summary(len(values), fmean(values), sd, *interval(values), len(given))


def differences(first: Scores, second: Scores) -> dict[Any, float]:
    """Return ``first - second`` for every replicate that both have.

    A shared replicate means the same backbone, examples and data order, so that a difference varies less than scores.
    """
    return {name: first[name] - second[name] for name in first if name in second}


def paired(first: Scores, second: Scores) -> Summary | None:
    """Return the summary of the paired differences ``first - second``; None without a shared replicate."""
    return summary(shared) if (shared := differences(first, second)) else None


def p_different(values: Sequence[float]) -> float:
    """Return the two-sided p value of a zero mean (one-sample t test); 1 for fewer than two values."""
    return min(1.0, 2 * _tail(abs, values))


def p_equivalent(values: Sequence[float], margin: float) -> float:
    """Return the p value of a mean at or beyond ``+-margin``: the larger of two one-sided t tests."""
    return _tail(lambda mean: margin - abs(mean), values)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values: those at most 0.05 are wrong together in at most 5 % of studies.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(order), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


@dataclass(frozen=True)
class Finding:
    """One declared contrast: a paired difference, its p values adjusted over the study's contrasts, and the word.

    Attributes:
        name: of the contrast.
        summary: of the difference; None where the two sides have no common replicate.
        margin: the difference that counts as none.
        different: adjusted p value of a zero difference.
        equivalent: adjusted p value of a difference at or beyond the margin.
    """

    name: str
    summary: Summary | None
    margin: float
    different: float
    equivalent: float

    @property
    def word(self) -> str:
        """The verdict at 5 % over all contrasts of the study; empty below ``VERDICT`` independent observations."""
        if self.summary is None or self.summary.n < VERDICT:
            return ""
        within = " by less than the margin" if self.equivalent <= 1 - LEVEL else ""
        if self.different <= 1 - LEVEL:
            return ("higher" if self.summary.mean > 0 else "lower") + within
        return "equivalent" if within else "not told apart"


def findings(contrasts: Sequence[tuple[str, Scores, Scores, float]]) -> list[Finding]:
    """Return what a study's declared contrasts (name, plus, minus, margin) say, all of them together.

    Two questions are asked of each: whether the difference is zero, and whether it lies within the margin. Each
    question's p values are adjusted by Holm's method over all contrasts, so that each question is answered wrongly
    for any of them in at most 5 % of studies.
    """
    shared = [differences(plus, minus) for _, plus, minus, _ in contrasts]
    values = [list(observations(its).values()) for its in shared]
    different = holm([p_different(its) for its in values])
    equivalent = holm([p_equivalent(its, margin) for its, (*_, margin) in zip(values, contrasts, strict=True)])
    return [
        Finding(name, summary(its) if its else None, margin, one, other)
        for (name, *_, margin), its, one, other in zip(contrasts, shared, different, equivalent, strict=True)
    ]


def variance_between(methods: Sequence[Scores]) -> dict[str, float]:
    """Return the variance between methods' means within each backbone (or seed) that all of them have.

    >>> variance_between([{"a/0": 1.0, "a/1": 2.0, "b/0": 1.0}, {"a/0": 2.5, "a/1": 2.5, "b/0": 1.0}])
    {'a': 0.5, 'b': 0.0}
    """
    means = [observations(scores) for scores in methods]
    shared = [name for name in means[0] if all(name in its for its in means)] if len(means) > 1 else []
    return {name: variance(its[name] for its in means) for name in shared}


def variance_ratio(first: Sequence[Scores], second: Sequence[Scores]) -> Summary | None:
    """Return the ratio of two sets' :func:`variance_between` over shared backbones: geometric mean and t interval.

    ``sd`` is that of the logarithms. None without a shared backbone, or where a variance is zero.
    """
    one, other = variance_between(first), variance_between(second)
    shared = [name for name in one if name in other]
    if not shared or any(one[name] <= 0 or other[name] <= 0 for name in shared):
        return None
    its = summary([math.log(one[name] / other[name]) for name in shared])
    return Summary(its.n, math.exp(its.mean), its.sd, _exp(its.low), _exp(its.high), its.replicates)


def exchange_rate(first: Sequence[tuple[int, Scores]], second: Sequence[tuple[int, Scores]]) -> Summary | None:
    """Return how many parameters of the first curve reach the loss of one parameter of the second.

    Curves are sizes with losses by replicate; a loss between sizes is read off straight lines over the logarithm of
    size. The answer is the geometric mean over the sizes of the second curve whose loss the first one reaches, with a
    jackknife interval over observations; ``sd`` is that of the logarithm. None where no loss is shared.

    >>> losses = lambda base: [(size, {0: base / size, 1: base / size}) for size in (1, 2, 4, 8)]
    >>> round(exchange_rate(losses(2.0), losses(1.0)).mean, 6)
    2.0
    """
    curves = [[(size, observations(losses)) for size, losses in sorted(curve)] for curve in (first, second)]
    shared = [name for name in curves[0][0][1] if all(name in its for curve in curves for _, its in curve)]
    if len(shared) < 2:
        return None

    def log_ratio(names: Sequence[str]) -> float | None:
        means = [[(math.log(size), fmean([its[name] for name in names])) for size, its in curve] for curve in curves]
        found = [(reached, size) for size, loss in means[1] if (reached := _reaches(means[0], loss)) is not None]
        return fmean([reached - size for reached, size in found]) if found else None

    whole, n = log_ratio(shared), len(shared)
    parts = [log_ratio([name for name in shared if name != left]) for left in shared]
    if whole is None or any(part is None for part in parts):
        return None
    pseudo = [n * whole - (n - 1) * part for part in parts if part is not None]
    its = summary(pseudo)
    return Summary(n, math.exp(whole), its.sd, _exp(its.low), _exp(its.high), n)


def _reaches(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """The place where a curve first comes down to a loss; None where it does not pass it."""
    for (left, high), (right, low) in itertools.pairwise(curve):
        if low <= loss <= high and high > low:
            return left + (right - left) * (high - loss) / (high - low)
    return None


def best_under(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the curve U(B): the best score among sizes of at most B parameters, at each B where it rises.

    A denser grid has more chances, so of two methods with equal means the denser one looks better here.

    >>> best_under([(4, 0.75), (1, 0.5), (2, 0.25), (8, 0.5)])
    [(1, 0.5), (4, 0.75)]
    """
    curve: list[tuple[int, float]] = []
    for size, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not curve or score > curve[-1][1]:
            curve.append((size, score))
    return curve


def _tail(distance: Callable[[float], float], values: Sequence[float]) -> float:
    """The probability that a t variable exceeds a distance of the mean, in its standard errors; 1 for one value."""
    if len(values) < 2:
        return 1.0
    from scipy import stats

    far, error = distance(fmean(values)), stdev(values) / math.sqrt(len(values))
    if error == 0:
        return 0.0 if far > 0 else 0.5 if far == 0 else 1.0
    return float(stats.t.sf(far / error, len(values) - 1))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
