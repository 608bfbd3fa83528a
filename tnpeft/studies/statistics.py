"""What a study's scores say: means with intervals, paired differences, and the best score under a budget."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DRAWS = 10_000


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation (of the sample) and a 95 % interval of the mean; ``n`` scores are behind it."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


def interval(values: Sequence[float], level: float = 0.95, draws: int = DRAWS) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean, the same every time; of one value that value.

    With few values it is too narrow (of three it cannot leave their range): always shown with their number.

    >>> low, high = interval([0.0, 1.0, 2.0, 3.0])
    >>> low < 1.5 < high, interval([0.5])
    (True, (0.5, 0.5))
    """
    if len(values) == 1:
        return values[0], values[0]
    draw = random.Random(0)
    means = sorted(math.fsum(draw.choices(values, k=len(values))) / len(values) for _ in range(draws))
    tail = (1 - level) / 2
    return means[math.floor(tail * (draws - 1))], means[math.ceil((1 - tail) * (draws - 1))]


def summary(values: Sequence[float]) -> Summary:
    """The summary of one or more scores.

    >>> found = summary([1.0, 2.0, 3.0])
    >>> found.n, found.mean, found.sd
    (3, 2.0, 1.0)
    """
    mean = math.fsum(values) / len(values)
    spread = math.fsum((v - mean) ** 2 for v in values)
    sd = math.sqrt(spread / (len(values) - 1)) if len(values) > 1 else 0.0
    return Summary(len(values), mean, sd, *interval(values))


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Summary | None:
    """The summary of ``first - second`` over the seeds that both have; None if they share none.

    Sharing a seed means sharing examples and data order, so the difference varies less than the scores do.

    >>> paired({0: 0.5, 1: 0.75}, {1: 0.5, 2: 0.1}).mean
    0.25
    """
    shared = sorted(set(first) & set(second))
    return summary([first[seed] - second[seed] for seed in shared]) if shared else None


def best_under(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The curve U(B): at each budget where it rises, the best score among sizes of at most that many parameters.

    A denser grid has more chances, so of two methods with equal means the denser one looks better here.

    >>> best_under([(4, 0.75), (1, 0.5), (2, 0.25), (8, 0.5)])
    [(1, 0.5), (4, 0.75)]
    """
    curve: list[tuple[int, float]] = []
    for size, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not curve or score > curve[-1][1]:
            curve.append((size, score))
    return curve
