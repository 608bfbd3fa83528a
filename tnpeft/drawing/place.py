"""Where the nodes of a graph stand: annealing on a small grid, rows left, columns right, stack on top."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import ceil, exp, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnpeft.drawing.graph import Graph

Points = NDArray[np.complex128]  # x + iy
Cell = tuple[float, float]

_STARTS, _MOVES = 6, 150  # annealing runs, and moves of each per node
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
    best = min((search.run(np.random.default_rng(seed)) for seed in range(_STARTS)), key=search.cost)
    final = _compact(search.polish(best), "rows" in parts)
    return tuple((float(point.real), float(point.imag)) for point in final)


class _Search:
    """The grid, the cost of a placement, and the annealing."""

    def __init__(self, parts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> None:
        self.parts = parts
        inner = max(1, parts.count("factor") + parts.count("dot") // 2)
        self.width = max(2, ceil(1.5 * sqrt(inner)), parts.count("stack"))
        self.height = max(2, ceil(1.2 * sqrt(inner)), parts.count("rows") + 1, parts.count("cols") + 1)
        self.cells = [self._cells(part) for part in parts]
        self.allowed = [set(cells) for cells in self.cells]
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
        self.order = [pair for side in ("rows", "cols", "stack") for pair in self._order(side)]

    def _order(self, side: str) -> Iterable[tuple[int, int, int]]:
        """Pairs of legs that should stand in the order of their group: top to bottom, or left to right."""
        legs = [k for k, part in enumerate(self.parts) if part == side]
        return [(i, j, int(side != "stack")) for i, j in pairwise(legs)]

    def _cells(self, part: str) -> list[Cell]:
        """Where a node may stand; dots and stack legs also between two columns, dots between two rows."""
        columns, rows = range(1, self.width + 1), range(self.height)
        if part == "stack":
            return [(x / 2, float(self.height)) for x in range(2, 2 * self.width + 1)]
        if part in ("rows", "cols"):
            return [(0.0 if part == "rows" else self.width + 1.0, float(y)) for y in rows]
        if part == "factor":
            return [(float(x), float(y)) for x in columns for y in rows]
        return [(x / 2, y / 2) for x in range(1, 2 * self.width + 2) for y in range(2 * self.height)]

    def run(self, generator: np.random.Generator) -> Points:
        """The best placement of one annealing run from a random start."""
        points = self._random(generator)
        now = self.cost(points)
        least, best = now, points
        moves = _MOVES * len(self.parts)
        for step in range(moves):
            heat = _HOT * (_COLD / _HOT) ** (step / moves)
            node = int(generator.integers(len(self.parts)))
            trial = self._moved(points, node, self._target(complex(points[node]), node, generator))
            if trial is not None:
                then = self.cost(trial)
                if then <= now or generator.random() < exp((now - then) / heat):
                    points, now = trial, then
                    if now < least:
                        least, best = now, points
        return best

    def polish(self, points: Points) -> Points:
        """The placement after every single move or swap that helps."""
        now, before = self.cost(points), float("inf")
        while now < before - 1e-9:
            before = now
            for node, cells in enumerate(self.cells):
                trials = [trial for cell in cells if (trial := self._moved(points, node, cell)) is not None]
                costs = [self.cost(trial) for trial in trials]
                if costs and min(costs) < now - 1e-9:
                    now = min(costs)
                    points = trials[costs.index(now)]
        return points

    def _target(self, at: complex, node: int, generator: np.random.Generator) -> Cell:
        """Anywhere, or (every second time) near by, where the small improvements are."""
        cells = self.cells[node]
        if generator.random() < 0.5:
            cells = [cell for cell in cells if abs(cell[0] - at.real) <= 1 and abs(cell[1] - at.imag) <= 1]
        return cells[int(generator.integers(len(cells)))]

    def _random(self, generator: np.random.Generator) -> Points:
        held: dict[Cell, None] = {}
        for cells in self.cells:
            free = [cell for cell in cells if cell not in held]
            held[free[int(generator.integers(len(free)))]] = None
        return np.array([complex(*cell) for cell in held])

    def _moved(self, points: Points, node: int, target: Cell) -> Points | None:
        """The placement with a node moved, and the one that stands there swapped; None if that is not possible."""
        source = (float(points[node].real), float(points[node].imag))
        (guests,) = np.nonzero(points == complex(*target))
        if target == source or any(source not in self.allowed[guest] for guest in guests):
            return None
        trial = points.copy()
        trial[node] = complex(*target)
        trial[guests] = points[node]
        return trial

    def cost(self, points: Points) -> float:
        """How bad a placement is: length, slant, crossings, and what is hidden, narrow, tight or out of order."""
        along = points[self.b] - points[self.a]
        length = np.maximum(np.abs(along), 1e-9)
        slant = np.abs(along.real * along.imag) / length**2
        total = float((length + 0.15 * length**2 + self.slant * slant).sum())
        total += _CROSSING * self._crossings(points, along) + _HIDDEN * self._hidden(points, along, length)
        total += _NARROW * self._narrow(points) + 0.01 * float((np.abs(points - points.mean()) ** 2).sum())
        i, j = self.couples
        total += _TIGHT * int((np.abs(points[i] - points[j]) < self.close).sum())
        for one, two, axis in self.order:
            gap = points[two] - points[one]
            total += _ORDER * bool(gap.imag > 0 if axis else gap.real < 0)
        return total

    def _crossings(self, points: Points, along: Points) -> int:
        i, j = self.apart
        start = points[self.a]
        between = start[j] - start[i]
        one = (along[i].conj() * between).imag * (along[i].conj() * (between + along[j])).imag
        two = (along[j].conj() * between).imag * (along[j].conj() * (between - along[i])).imag
        return int(((one < 0) & (two < 0)).sum())

    def _hidden(self, points: Points, along: Points, length: Any) -> int:
        """How often a line passes under a node that is not its own."""
        step = along[self.edge]
        to = points[self.other] - points[self.a][self.edge]
        part = np.clip((to * step.conj()).real / length[self.edge] ** 2, 0, 1)
        return int((np.abs(to - part * step) < self.near).sum())

    def _narrow(self, points: Points) -> int:
        """How often two lines leave a node in almost the same direction."""
        centre, one, two = (points[self.forks[:, k]] for k in range(3))
        turn = (one - centre).conj() * (two - centre)
        return int((turn.real > 0.93 * np.abs(turn)).sum())


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
