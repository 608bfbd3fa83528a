"""Positions of the nodes of a graph on a small grid: rows left, columns right, stack on top."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, combinations, pairwise, product
from math import ceil, dist, hypot, inf, sqrt
from random import Random
from typing import TypeVar

from tnpeft.drawing.graph import Graph

Cell = tuple[float, float]
Vector = tuple[int, int]  # in half cells

_STARTS, _NODES = 6, 100  # placements that are tried at least, and their nodes in all where a graph is small
_SWEEPS = 20  # rounds in which each node goes between its neighbours
_STEP, _STEP_DOT, _JITTER = 4, 2, 2.0  # how far a move goes, and a start is shaken, in half cells
_CROSSING, _HIDDEN, _NARROW, _ORDER, _TIGHT, _SPREAD = 4.0, 16.0, 5.0, 3.0, 1.5, 0.01
_SLANTED, _SLANTED_DOT = 3.0, 0.6  # a bond or leg, a line to a dot that is neither upright nor level
_NEAR, _NEAR_DOT = 0.45, 0.22  # in cells: a line that passes a node more closely seems to end there
_CLOSE, _CLOSE_LEGS = 0.8, 1.0  # in cells: two nodes, two open legs should be further apart
_SIDES = ("rows", "cols", "stack")
_MARGIN = 2  # free half cells around the grid, for what is near its edge

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


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
    grid = _Grid(parts, ends)
    starts = max(_STARTS, _NODES // len(parts))
    numbers = [lambda: 0.5, *(Random(seed).random for seed in range(starts))]  # the first start is not shaken
    found = [_Placement(grid, random).polished() for random in numbers]
    best = min(found, key=lambda placement: placement.cost() + placement.closed_up().cost())
    left = 0 if "rows" in parts else 1  # a picture without row legs begins at column 1
    return tuple((x / 2 + left, y / 2) for x, y in (grid.where[at] for at in best.points))


class _Memo(dict[K, V]):
    """The values of a function, each computed once."""

    def __init__(self, compute: Callable[[K], V]) -> None:
        super().__init__()
        self.compute = compute

    def __missing__(self, key: K) -> V:
        value = self[key] = self.compute(key)
        return value


class _Grid:
    """The half cells, numbered so that the bits of a whole number are a set of them, and what lines between them do.

    A line is one number, ``start * size + stop``, so that a sum over all lines is one call.
    """

    def __init__(self, parts: Sequence[str], ends: Sequence[tuple[int, int]]) -> None:
        inner = max(1, parts.count("factor") + parts.count("dot") // 2)
        wide = max(2, ceil(1.5 * sqrt(inner)), parts.count("stack"), min(5, parts.count("factor")))
        high = max(2, ceil(1.2 * sqrt(inner)), parts.count("rows") + 1, parts.count("cols") + 1)
        self.row = 2 * wide + 3 + 2 * _MARGIN
        self.size = self.row * (2 * high + 1 + 2 * _MARGIN)
        self.where = [(at % self.row - _MARGIN, at // self.row - _MARGIN) for at in range(self.size)]
        self.ends, self.count = ends, len(parts)
        self.cells = [[self.at(x, y) for x, y in _cells(part, 2 * wide, 2 * high)] for part in parts]
        self.allowed = [frozenset(cells) for cells in self.cells]
        self.dot = [part == "dot" for part in parts]
        self.leg = [part in _SIDES for part in parts]
        dots = [{parts[i], parts[j]} <= {"dot", "factor"} and "dot" in (parts[i], parts[j]) for i, j in ends]
        self.slant = [_SLANTED_DOT if dot else _SLANTED for dot in dots]
        self.edges = [tuple(e for e, pair in enumerate(ends) if node in pair) for node in range(len(parts))]
        self.forks = [tuple(self._forks(node)) for node in range(len(parts))]
        self.runs = [([k for k, part in enumerate(parts) if part == side], side != "stack") for side in _SIDES]
        self.order = [
            tuple((*pair, downwards) for run, downwards in self.runs for pair in pairwise(run) if node in pair)
            for node in range(len(parts))
        ]
        self.nearby = _Memo(self._nearby)
        self.close, self.close_legs = (
            [self._close(at, gap) for at in range(self.size)] for gap in (_CLOSE, _CLOSE_LEGS)
        )
        self.lengths = _Memo(self._length)  # of a line: its cost, and that of its slant
        self.passed = _Memo(self._passed)  # of a line: the half cells it passes closely, for factors and for dots
        self.crossings = _Memo(self._crossings)  # of a line: whether another crosses it
        self.passing = _Memo(self._passing)  # of a kind of node and its place: whether a line passes it closely
        self.narrow = _Memo(self._narrow)

    def at(self, x: int, y: int) -> int:
        return (y + _MARGIN) * self.row + x + _MARGIN

    def _forks(self, node: int) -> Iterator[tuple[int, int, int]]:
        """The pairs of lines that share an end and change with the node: the end and their other ends."""
        for centre in {node, *(sum(self.ends[e]) - node for e in self.edges[node])}:
            others = [sum(self.ends[e]) - centre for e in self.edges[centre]]
            yield from ((centre, i, j) for i, j in combinations(others, 2) if node in (centre, i, j))

    def _nearby(self, key: tuple[int, int]) -> list[int]:
        """The other cells that a node may move to: within a step of where it is."""
        node, at = key
        x, y = self.where[at]
        most = _STEP_DOT if self.dot[node] else _STEP
        near = (cell for cell in self.cells[node] if cell != at)
        return [c for c in near if abs(self.where[c][0] - x) <= most and abs(self.where[c][1] - y) <= most]

    def _close(self, at: int, gap: float) -> int:
        steps = (x + self.row * y for x, y in _NEIGHBOURS if hypot(x, y) < 2 * gap)
        return sum(1 << at + step for step in steps if at + step >= 0)

    def _vector(self, line: int) -> tuple[Vector, Vector]:
        return self.where[line // self.size], self.where[line % self.size]

    def _length(self, line: int) -> tuple[float, float]:
        (ax, ay), (bx, by) = self._vector(line)
        x, y = bx - ax, by - ay
        length = max(hypot(x, y) / 2, 1e-9)
        return length + 0.15 * length**2, abs(x * y) / 4 / length**2

    def _passed(self, line: int) -> tuple[int, int]:
        start = line // self.size
        (ax, ay), (bx, by) = self._vector(line)
        near, nearer = (sum(1 << start + x + self.row * y for x, y in steps) for steps in _passed(bx - ax, by - ay))
        return near, nearer

    def _crossings(self, line: int) -> _Memo[int, bool]:
        """Of every other line, whether the two cross, each at a point within."""
        where, size = self.where, self.size
        (ax, ay), (bx, by) = where[line // size], where[line % size]
        ux, uy = bx - ax, by - ay

        def crosses(other: int) -> bool:
            (cx, cy), (dx, dy) = where[other // size], where[other % size]
            if (ux * (cy - ay) - uy * (cx - ax)) * (ux * (dy - ay) - uy * (dx - ax)) >= 0:
                return False
            vx, vy = dx - cx, dy - cy
            return (vx * (ay - cy) - vy * (ax - cx)) * (vx * (by - cy) - vy * (bx - cx)) < 0

        return _Memo(crosses)

    def _passing(self, key: tuple[bool, int]) -> _Memo[int, int]:
        dot, at = key
        return _Memo(lambda line: self.passed[line][dot] >> at & 1)

    def _narrow(self, key: tuple[int, int, int]) -> bool:
        """True if two lines leave a point in almost the same direction."""
        (cx, cy), (ax, ay), (bx, by) = (self.where[at] for at in key)
        ax, ay, bx, by = ax - cx, ay - cy, bx - cx, by - cy
        return ax * bx + ay * by > 0.93 * hypot(ax, ay) * hypot(bx, by)


class _Placement:
    """A half cell for every node, and what it costs: length, slant, crossings, order and more."""

    def __init__(self, grid: _Grid, random: Callable[[], float]) -> None:
        self.grid = grid
        self.points = self._start(random)

    def _start(self, random: Callable[[], float]) -> list[int]:
        """Every node near the middle of its neighbours, the legs at random along their sides, in their order."""
        grid = self.grid
        spots = [_between(random(), grid.where[cells[0]], grid.where[cells[-1]]) for cells in grid.cells]
        for run, downwards in grid.runs:
            legs = sorted((spots[k] for k in run), key=lambda spot: -spot.imag if downwards else spot.real)
            for k, spot in zip(run, legs, strict=True):
                spots[k] = spot
        inner = [node for node in range(grid.count) if not grid.leg[node] and grid.edges[node]]
        for node in inner * _SWEEPS:
            near = [spots[sum(grid.ends[e]) - node] for e in grid.edges[node]]
            spots[node] = sum(near) / len(near)
        points: list[int] = []
        for cells, spot in zip(grid.cells, spots, strict=True):
            spot += _JITTER * complex(random() - 0.5, random() - 0.5)
            points.append(min(cells, key=lambda at: (at in points, abs(complex(*grid.where[at]) - spot))))
        return points

    def polished(self) -> _Placement:
        """The placement after every single move or swap that helps, the best one of a node at a time."""
        better = True
        while better:
            better = False
            for node in range(self.grid.count):
                change, self.points = self._best(node)
                better |= change < -1e-9
        return self

    def _best(self, node: int) -> tuple[float, list[int]]:
        """The best move of a node, what stands at its target going where it came from."""
        grid, points = self.grid, self.points
        source, alone = points[node], self._local([node], points)
        best, chosen = -1e-9, points
        for target in grid.nearby[node, source]:
            guest = points.index(target) if target in points else None
            if guest is not None and source not in grid.allowed[guest]:
                continue
            nodes = [node] if guest is None else [node, guest]
            before = alone if guest is None else self._local(nodes, points)
            trial = points[:]
            trial[node] = target
            if guest is not None:
                trial[guest] = source
            change = self._local(nodes, trial, before + best) - before
            if change < best:
                best, chosen = change, trial
        return best, chosen

    def closed_up(self) -> _Placement:
        """The placement without empty rows or columns of cells."""
        xs, ys = (_closed_up([self.grid.where[at][axis] for at in self.points]) for axis in (0, 1))
        self.points = [self.grid.at(x, y) for x, y in zip(xs, ys, strict=True)]
        return self

    def cost(self) -> float:
        """The cost of the placement."""
        return self._local(range(self.grid.count), self.points)

    def _local(self, nodes: Sequence[int], points: Sequence[int], most: float = inf) -> float:
        """The costs that some nodes and their edges take part in, and the spread; infinite if above ``most``."""
        grid, size = self.grid, self.grid.size
        lengths, angles = grid.lengths, grid.narrow
        own: Iterable[int] = grid.edges[nodes[0]]
        forks, order = grid.forks[nodes[0]], grid.order[nodes[0]]
        if len(nodes) > 1:
            own = {e for node in nodes for e in grid.edges[node]}
            forks = tuple({fork for node in nodes for fork in grid.forks[node]})
            order = tuple({pair for node in nodes for pair in grid.order[node]})
        mine = [points[i] * size + points[j] for i, j in [grid.ends[e] for e in own]]
        total: float = 0.0
        for e, line in zip(own, mine, strict=True):
            length, slant = lengths[line]
            total += length + grid.slant[e] * slant
        if total > most:
            return inf
        for one, two, downwards in order:
            late = points[two] // grid.row > points[one] // grid.row if downwards else points[two] < points[one]
            total += _ORDER * late
        total += _NARROW * sum([angles[points[c], points[i], points[j]] for c, i, j in forks])
        if total > most:  # many trials end here, before anything is compared with all lines
            return inf
        lines = [points[i] * size + points[j] for i, j in grid.ends]
        dots = sum([1 << at for at, dot in zip(points, grid.dot, strict=True) if dot])
        solid = sum([1 << at for at, dot in zip(points, grid.dot, strict=True) if not dot])
        crossings = hidden = tight = seen = 0
        for line in mine:
            near, nearer = grid.passed[line]
            hidden += (near & solid | nearer & dots).bit_count()
            crossings += sum(map(grid.crossings[line].__getitem__, lines))
            if len(nodes) == 1 and total + _CROSSING * crossings + _HIDDEN * hidden > most:
                return inf
        if len(nodes) > 1:
            crossings -= sum(grid.crossings[one][two] for one, two in combinations(mine, 2))
        else:
            mine = []  # only several nodes' own lines were counted twice
        for node in nodes:
            at = points[node]
            passing = grid.passing[grid.dot[node], at].__getitem__
            hidden += sum(map(passing, lines)) - sum(map(passing, mine))
            close = grid.close[at] & (solid | dots)
            if grid.leg[node]:
                legs = sum([1 << at for at, leg in zip(points, grid.leg, strict=True) if leg])
                close |= grid.close_legs[at] & legs
            tight += (close & ~seen).bit_count()
            seen |= 1 << at
        xs, ys = zip(*[grid.where[at] for at in points], strict=True)
        squares = sum([x * x for x in xs]) + sum([y * y for y in ys])
        total += _SPREAD / 4 * (squares - (sum(xs) ** 2 + sum(ys) ** 2) / len(points))
        return total + _CROSSING * crossings + _HIDDEN * hidden + _TIGHT * tight


_NEIGHBOURS = [step for step in product(range(-2, 3), repeat=2) if step != (0, 0)]


def _cells(part: str, wide: int, high: int) -> Iterable[Vector]:
    """The half cells that a node may have; dots and stack legs also between columns, dots between rows."""
    if part == "dot":
        return product(range(1, wide + 2), range(high))
    if part == "stack":
        return product(range(2, wide + 1), (high,))
    xs = {"rows": (0,), "cols": (wide + 2,)}.get(part, range(2, wide + 1, 2))
    return product(xs, range(0, high, 2))


@lru_cache(maxsize=1 << 12)
def _passed(x: int, y: int) -> tuple[list[Vector], list[Vector]]:
    """The half cells that the line from 0 passes so closely that a factor or leg (or a dot) there seems on it."""
    found: tuple[list[Vector], list[Vector]] = ([], [])
    for px, py in product(range(min(0, x), max(0, x) + 1), range(min(0, y), max(0, y) + 1)):
        if (px, py) not in ((0, 0), (x, y)):
            part = (px * x + py * y) / (x * x + y * y)
            gap = dist((px, py), (part * x, part * y)) / 2
            for steps, near in zip(found, (_NEAR, _NEAR_DOT), strict=True):
                steps += [(px, py)] if gap < near else []
    return found


def _between(part: float, low: Vector, high: Vector) -> complex:
    return complex(*low) + part * (complex(*high) - complex(*low))


def _closed_up(places: Sequence[int]) -> list[int]:
    """The coordinates from 0 on, neighbouring ones at most a cell apart."""
    used = sorted(set(places))
    closed = dict(zip(used, accumulate((min(two - one, 2) for one, two in pairwise(used)), initial=0), strict=True))
    return [closed[place] for place in places]
