"""Where the nodes of a graph stand: annealing on a small grid, rows left, columns right, stack on top."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import ceil, exp, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnpeft.drawing.graph import Graph, Side

Points = NDArray[np.float64]

_STARTS, _MOVES = 3, 160  # annealing runs, and moves of each per node
_HOT, _COLD = 3.0, 0.02
_CROSSING, _HIDDEN, _NARROW, _SLANTED, _ORDER = 4.0, 8.0, 3.0, 1.0, 2.0
_NEAR = 0.42  # in cells: a line that passes a node's centre more closely seems to end there


@lru_cache(maxsize=256)
def place(graph: Graph) -> tuple[tuple[float, float], ...]:
    """A cell ``(x, y)`` for every node, y upwards; the same graph always gives the same picture.

    >>> from tnpeft.drawing.graph import graph
    >>> from tnpeft.networks import network
    >>> net = network("B[out r] A[r inp] -> out inp")
    >>> place(graph(net, net.terms[0], {}))
    ((1.0, 0.0), (2.0, 0.0), (0.0, 0.0), (3.0, 0.0))
    """
    search = _Search(graph)
    found = [_compact(search.run(np.random.default_rng(seed)), search.sides) for seed in range(_STARTS)]
    return tuple((float(x), float(y)) for x, y in min(found, key=search.cost))


class _Search:
    """The grid, the cost of a placement, and the annealing."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = graph.nodes
        self.sides = [node.side for node in graph.nodes]
        inner = max(1, self.sides.count(""))
        self.width = max(2, ceil(1.5 * sqrt(inner)), self.sides.count("stack"))
        self.height = max(2, ceil(1.2 * sqrt(inner)), self.sides.count("rows"), self.sides.count("cols"))
        ends = np.array([edge.ends for edge in graph.edges], dtype=int).reshape(-1, 2)
        self.a, self.b = ends[:, 0], ends[:, 1]
        count = len(ends)
        first, second = np.triu_indices(count, 1)
        shared = (ends[first][:, :, None] == ends[second][:, None, :]).any((1, 2)) if count else first > 0
        self.apart = first[~shared], second[~shared]
        self.joint = [_fork(ends[i], ends[j]) for i, j in zip(first[shared], second[shared], strict=True)]
        self.forks = np.array(self.joint, dtype=int).reshape(-1, 3)
        others = np.ones((count, len(self.nodes)), dtype=bool)
        for e, (i, j) in enumerate(ends):
            others[e, [i, j]] = False
        self.edge, self.other = np.nonzero(others)
        self.order = self._orders()

    def _orders(self) -> list[tuple[int, int, int]]:
        """Pairs of legs that should stand in the order of their group: top to bottom, or left to right."""
        pairs = []
        for side, axis in (("rows", 1), ("cols", 1), ("stack", 0)):
            legs = [k for k, own in enumerate(self.sides) if own == side]
            pairs += [(i, j, axis) for i, j in pairwise(legs)]
        return pairs

    def cells(self, node: int) -> list[tuple[int, int]]:
        side = self.sides[node]
        if side == "stack":
            return [(x, self.height) for x in range(1, self.width + 1)]
        if side:
            return [(0 if side == "rows" else self.width + 1, y) for y in range(self.height)]
        return [(x, y) for x in range(1, self.width + 1) for y in range(self.height)]

    def run(self, generator: np.random.Generator) -> Points:
        domains = [self.cells(k) for k in range(len(self.nodes))]
        points = np.zeros((len(self.nodes), 2))
        held: dict[tuple[int, int], int] = {}
        for node, domain in enumerate(domains):
            free = [cell for cell in domain if cell not in held]
            held[free[int(generator.integers(len(free)))]] = node
        for cell, node in held.items():
            points[node] = cell
        moves = _MOVES * len(self.nodes)
        now = self.cost(points)
        least, best = now, points
        for step in range(moves):
            heat = _HOT * (_COLD / _HOT) ** (step / moves)
            node = int(generator.integers(len(self.nodes)))
            target = domains[node][int(generator.integers(len(domains[node])))]
            source = (int(points[node][0]), int(points[node][1]))
            guest = held.get(target)
            if target == source:
                continue
            trial = points.copy()
            trial[node] = target
            if guest is not None:
                trial[guest] = source
            then = self.cost(trial)
            if then <= now or generator.random() < exp((now - then) / heat):
                points, now = trial, then
                del held[source]
                held[target] = node
                if guest is not None:
                    held[source] = guest
                if now < least:
                    least, best = now, points
        return best

    def cost(self, points: Points) -> float:
        a, b = points[self.a], points[self.b]
        along = b - a
        length = np.hypot(along[:, 0], along[:, 1])
        slant = np.abs(along[:, 0] * along[:, 1]) / np.maximum(length, 1e-9) ** 2
        total = float((length + 0.15 * length**2 + _SLANTED * slant).sum())
        total += _CROSSING * self._crossings(a, b) + _HIDDEN * self._hidden(points, a, along, length)
        total += _NARROW * self._narrow(points) + 0.01 * float(((points - points.mean(0)) ** 2).sum())
        for i, j, axis in self.order:
            gap = points[j][axis] - points[i][axis]
            total += _ORDER * bool(gap > 0 if axis else gap < 0)
        return total

    def _crossings(self, a: Points, b: Points) -> int:
        i, j = self.apart

        def turn(p: Points, q: Points, r: Points) -> Any:
            return (q[:, 0] - p[:, 0]) * (r[:, 1] - p[:, 1]) - (q[:, 1] - p[:, 1]) * (r[:, 0] - p[:, 0])

        one = turn(a[i], b[i], a[j]) * turn(a[i], b[i], b[j])
        two = turn(a[j], b[j], a[i]) * turn(a[j], b[j], b[i])
        return int(((one < 0) & (two < 0)).sum())

    def _hidden(self, points: Points, a: Points, along: Points, length: Any) -> int:
        """How often a line passes under a node that is not its own."""
        start, step = a[self.edge], along[self.edge]
        to = points[self.other] - start
        part = np.clip((to * step).sum(1) / np.maximum(length[self.edge], 1e-9) ** 2, 0, 1)
        gap = to - part[:, None] * step
        return int(((gap**2).sum(1) < _NEAR**2).sum())

    def _narrow(self, points: Points) -> int:
        """How often two lines leave a node in almost the same direction."""
        if not len(self.forks):
            return 0
        centre, one, two = (points[self.forks[:, k]] for k in range(3))
        u, v = one - centre, two - centre
        cosine = (u * v).sum(1) / np.maximum(np.hypot(*u.T) * np.hypot(*v.T), 1e-9)
        return int((cosine > 0.93).sum())


def _fork(one: Any, two: Any) -> tuple[int, int, int]:
    """The node that two edges share, and their other ends."""
    centre = next(int(k) for k in one if k in two)
    return centre, int(one.sum() - centre), int(two.sum() - centre)


def _compact(points: Points, sides: list[Side]) -> Points:
    """The placement without empty rows and columns of cells; sides without legs take no room."""
    result = points.copy()
    for axis in (0, 1):
        used = np.unique(points[:, axis])
        result[:, axis] = np.searchsorted(used, points[:, axis])
    if "rows" not in sides:
        result[:, 0] += 1
    return result
