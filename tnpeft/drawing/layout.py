"""Positions of the nodes of a graph: annealing on a small grid, rows left, columns right, stack on top."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import ceil, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnpeft.drawing.graph import Graph

Points = NDArray[np.complex128]  # x + iy
Cell = tuple[float, float]

_STARTS, _MOVES = 12, 150  # annealing runs, and moves of each per node
_HOT, _COLD = 3.0, 0.02
_CROSSING, _HIDDEN, _NARROW, _ORDER, _TIGHT = 4.0, 16.0, 5.0, 3.0, 1.5
_SLANTED, _SLANTED_DOT = 3.0, 0.6  # a bond or leg, a line to a dot that is neither upright nor level
_NEAR, _NEAR_DOT = 0.45, 0.22  # in cells: a line that passes a node more closely seems to end there
_CLOSE, _CLOSE_LEGS = 0.8, 1.0  # in cells: two nodes, two open legs should be further apart


def place(graph: Graph) -> tuple[Cell, ...]:
    """A place ``(x, y)`` in cells for every node, y upwards; the same structure always gives the same picture.

    >>> from tnpeft.drawing.graph import graph
    >>> from tnpeft.networks import network
    >>> net = network("B[out r] A[r inp] -> out inp")
    >>> place(graph(net, net.terms[0], {}))
    ((1.0, 0.0), (2.0, 0.0), (0.0, 0.0), (3.0, 0.0))
    """
    parts = tuple(node.side or ("factor" if node.kind else "dot") for node in graph.nodes)
    return _place(parts, tuple(edge.ends for edge in graph.edges))


@lru_cache(maxsize=256)
def _place(parts: tuple[str, ...], ends: tuple[tuple[int, int], ...]) -> tuple[Cell, ...]:
    search = _Search(parts, ends)
    final = _compact(search.polish(search.run()), "rows" in parts)
    return tuple((float(point.real), float(point.imag)) for point in final)


class _Search:
    """The grid, the cost of a placement, and the annealing."""

    def __init__(self, parts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> None:
        self.parts = parts
        inner = max(1, parts.count("factor") + parts.count("dot") // 2)
        self.width = max(2, ceil(1.5 * sqrt(inner)), parts.count("stack"), min(5, parts.count("factor")))
        self.height = max(2, ceil(1.2 * sqrt(inner)), parts.count("rows") + 1, parts.count("cols") + 1)
        self.cells = [self._cells(part) for part in parts]
        self.allowed = [set(cells.tolist()) for cells in self.cells]
        ends = np.array(pairs, dtype=int).reshape(-1, 2)
        self.a, self.b = ends[:, 0], ends[:, 1]
        dots = ["dot" in (parts[i], parts[j]) and {parts[i], parts[j]} <= {"dot", "factor"} for i, j in pairs]
        self.slant = np.where(np.array(dots, dtype=bool), _SLANTED_DOT, _SLANTED)
        first, second = np.triu_indices(len(ends), 1)
        shared = (ends[first][:, :, None] == ends[second][:, None, :]).any((1, 2)).reshape(first.shape)
        self.apart = first[~shared], second[~shared]
        forks = [_fork(ends[i], ends[j]) for i, j in zip(first[shared], second[shared], strict=True)]
        self.forks = np.array(forks, dtype=int).reshape(-1, 3)
        others = np.ones((len(ends), len(parts)), dtype=bool)
        for e, pair in enumerate(ends):
            others[e, pair] = False
        self.edge, self.other = np.nonzero(others)
        self.near = np.array([_NEAR_DOT if part == "dot" else _NEAR for part in parts])[self.other]
        self.couples = np.triu_indices(len(parts), 1)
        legs = [part in ("rows", "cols", "stack") for part in parts]
        self.close = np.array(
            [_CLOSE_LEGS if legs[i] and legs[j] else _CLOSE for i, j in zip(*self.couples, strict=True)]
        )
        runs = [
            (pair, turn) for side, turn in (("rows", 1j), ("cols", 1j), ("stack", 1)) for pair in self._next(side)
        ]
        self.order = np.array([pair for pair, _ in runs], dtype=int).reshape(-1, 2).T
        self.turned = np.array([turn for _, turn in runs], dtype=complex)

    def _next(self, side: str) -> Iterable[tuple[int, int]]:
        """Pairs of legs that should stand in the order of their group: top to bottom, or left to right."""
        return pairwise(k for k, part in enumerate(self.parts) if part == side)

    def _cells(self, part: str) -> Points:
        """Return the free positions of a node; dots and stack legs also between columns, dots between rows."""
        halves = part == "dot"
        x = np.arange(1, 2 * self.width + 2) / 2 if halves else np.arange(1.0, self.width + 1)
        y = np.arange(2 * self.height) / 2 if halves else np.arange(float(self.height))
        if part == "stack":
            x, y = np.arange(2, 2 * self.width + 1) / 2, np.array([float(self.height)])
        elif part in ("rows", "cols"):
            x = np.array([0.0 if part == "rows" else self.width + 1.0])
        return np.asarray((x[:, None] + 1j * y).ravel(), dtype=np.complex128)

    def run(self) -> Points:
        """The best placement of some annealing runs, side by side from random starts."""
        generators = [np.random.default_rng(seed) for seed in range(_STARTS)]
        points = np.array([self._random(generator) for generator in generators])
        now = self.cost(points)
        least, best = now.copy(), points.copy()
        moves = _MOVES * len(self.parts)
        for step in range(moves):
            heat = _HOT * (_COLD / _HOT) ** (step / moves)
            trials = np.array([self._step(*each) for each in zip(points, generators, strict=True)])
            then = self.cost(trials)
            chance = np.array([generator.random() for generator in generators])
            taken = chance < np.exp(np.minimum(0, now - then) / heat)
            points[taken], now[taken] = trials[taken], then[taken]
            better = now < least
            best[better], least[better] = points[better], now[better]
        return np.asarray(best[int(least.argmin())])

    def polish(self, points: Points) -> Points:
        """The placement after every single move or swap that helps."""
        now, before = float(self.cost(points)), float("inf")
        while now < before - 1e-9:
            before = now
            for node, cells in enumerate(self.cells):
                trials = np.array([self._moved(points, node, cell) for cell in cells])
                costs = self.cost(trials)
                if costs.min() < now - 1e-9:
                    now, points = float(costs.min()), trials[int(costs.argmin())]
        return points

    def _step(self, points: Points, generator: np.random.Generator) -> Points:
        """One node moved anywhere, or (every second time) near by, where the small improvements are."""
        node = int(generator.integers(len(self.parts)))
        cells = self.cells[node]
        if generator.random() < 0.5:
            gap = cells - points[node]
            cells = cells[(np.abs(gap.real) <= 1) & (np.abs(gap.imag) <= 1)]
        return self._moved(points, node, cells[int(generator.integers(len(cells)))])

    def _random(self, generator: np.random.Generator) -> Points:
        held: list[complex] = []
        for cells in self.cells:
            free = [cell for cell in cells.tolist() if cell not in held]
            held.append(free[int(generator.integers(len(free)))])
        return np.array(held)

    def _moved(self, points: Points, node: int, target: complex) -> Points:
        """The placement with a node moved and whatever stands there swapped; unchanged where that is not possible."""
        source = points[node]
        guests = np.nonzero(points == target)[0]
        if any(source not in self.allowed[guest] for guest in guests):
            return points
        trial = points.copy()
        trial[guests] = source
        trial[node] = target
        return trial

    def cost(self, points: Points) -> NDArray[np.float64]:
        """Return the cost of positions, nodes along the last axis: length, slant, crossings, order and more."""
        along = points[..., self.b] - points[..., self.a]
        length = np.maximum(np.abs(along), 1e-9)
        slant = np.abs(along.real * along.imag) / length**2
        spread = np.abs(points - points.mean(-1, keepdims=True)) ** 2
        i, j = self.couples
        tight = np.abs(points[..., i] - points[..., j]) < self.close
        first, second = self.order
        late = ((points[..., second] - points[..., first]) * self.turned).real < 0
        total = (length + 0.15 * length**2 + self.slant * slant).sum(-1) + 0.01 * spread.sum(-1)
        total += _TIGHT * tight.sum(-1) + _ORDER * late.sum(-1) + _NARROW * self._narrow(points)
        total += _CROSSING * self._crossings(points, along) + _HIDDEN * self._hidden(points, along, length)
        return np.asarray(total)

    def _crossings(self, points: Points, along: Points) -> Any:
        i, j = self.apart
        one, two = along[..., i], along[..., j]
        between = points[..., self.a[j]] - points[..., self.a[i]]
        over = (one.conj() * between).imag * (one.conj() * (between + two)).imag < 0
        under = (two.conj() * between).imag * (two.conj() * (between - one)).imag < 0
        return (over & under).sum(-1)

    def _hidden(self, points: Points, along: Points, length: Any) -> Any:
        """Count the lines that pass under a node that they do not end at."""
        step = along[..., self.edge]
        to = points[..., self.other] - points[..., self.a[self.edge]]
        part = np.clip((to * step.conj()).real / length[..., self.edge] ** 2, 0, 1)
        return (np.abs(to - part * step) < self.near).sum(-1)

    def _narrow(self, points: Points) -> Any:
        """Count the pairs of lines that leave a node in almost the same direction."""
        centre, one, two = (points[..., self.forks[:, k]] for k in range(3))
        turn = (one - centre).conj() * (two - centre)
        return (turn.real > 0.93 * np.abs(turn)).sum(-1)


def _fork(one: Any, two: Any) -> tuple[int, int, int]:
    """The node that two edges share, and their other ends."""
    centre = next(int(k) for k in one if k in two)
    return centre, int(one.sum() - centre), int(two.sum() - centre)


def _compact(points: Points, rows: bool) -> Points:
    """The placement without empty rows and columns of cells; a picture without row legs begins at column 1."""
    return _closed_up(points.real) + (0 if rows else 1) + 1j * _closed_up(points.imag)


def _closed_up(places: NDArray[np.float64]) -> NDArray[np.float64]:
    used, which = np.unique(places, return_inverse=True)
    steps = np.minimum(np.diff(used, prepend=used[:1]), 1.0)
    closed: NDArray[np.float64] = np.cumsum(steps)[which]
    return closed
