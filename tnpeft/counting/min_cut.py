"""The smallest product of sizes that separates two sides of a network: exact, in whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from heapq import heappop, heappush
from math import prod
from typing import Any

Node = Hashable


@dataclass(frozen=True)
class Edge:
    """Nodes that indices join, and the product of their sizes: two nodes for a bond, more for a hyper-index."""

    nodes: frozenset[Node]
    size: int


@dataclass(frozen=True)
class MinCut:
    """The size of a minimum cut, and the nodes on the side of the start."""

    size: int
    side: frozenset[Node]


def incidence(edges: Sequence[Edge]) -> dict[Node, list[int]]:
    """Return the numbers of the edges at each node; edges of size 1 are left out, since they cost nothing to cut."""
    found: dict[Node, list[int]] = {}
    for number, edge in enumerate(edges):
        if edge.size > 1:
            for node in edge.nodes:
                found.setdefault(node, []).append(number)
    return found


def min_cut(
    edges: Sequence[Edge],
    start: Collection[Node],
    stop: Collection[Node],
    *,
    limit: int | None = None,
    skip: Callable[[Edge], bool] = lambda edge: False,
    at: Mapping[Node, Sequence[int]] | None = None,
) -> MinCut:
    """Return the cut of the smallest product of sizes between ``start`` and ``stop``.

    The start takes in what an edge joins to it that is at least a cut already known, since no smaller cut goes
    through that edge; most questions about chains and trains are answered by this alone, near the start. What is left
    is a maximum flow.

    Args:
        edges: of the network; an edge is cut if it has nodes on both sides.
        start: the nodes of one side.
        stop: the nodes of the other side.
        limit: cuts above it are not told apart: it is returned for them.
        skip: true for an edge that is left out.
        at: the :func:`incidence` of the edges, if it is at hand.
    """
    at = incidence(edges) if at is None else at
    core, ends = set[Node](), frozenset(stop)
    best = MinCut(limit, frozenset(start)) if limit is not None else None
    seen, boundary, widest = set[int](), set[int](), list[tuple[int, int]]()
    across = direct = 1  # products over the boundary, and over its edges that reach the stop
    new = set(start)
    while True:
        core |= new
        for k in (k for node in new for k in at.get(node, ())):
            edge = edges[k]
            if k in seen:
                if k in boundary and edge.nodes <= core:
                    boundary.remove(k)
                    across //= edge.size
            elif not skip(edge):
                seen.add(k)
                if not edge.nodes <= core:
                    boundary.add(k)
                    heappush(widest, (-edge.size, k))
                    across *= edge.size
                    direct *= 1 if edge.nodes.isdisjoint(ends) else edge.size
        if best is None or across < best.size:
            best = MinCut(across, frozenset(core))
        while widest and widest[0][1] not in boundary:
            heappop(widest)
        if direct >= best.size or not widest:
            return best
        if -widest[0][0] < best.size:
            return _flow([edge for edge in edges if edge.size > 1 and not skip(edge)], core, ends, best)
        new = set(edges[widest[0][1]].nodes - core)
        if new & ends:
            return best


def _flow(edges: Sequence[Edge], core: set[Node], ends: frozenset[Node], best: MinCut) -> MinCut:
    """Return the smaller one of ``best`` and the minimum cut between the core and the ends.

    Capacities are logarithms in fixed point, with more digits than the known cut has: two products below it differ by
    more than all rounding together.
    """
    digits = best.size.bit_length() * 30103 // 100000 + len(str(len(edges))) + 3
    room: dict[Any, dict[Any, int]] = {"start": {}, "stop": {}}  # what can still flow from a node to the next

    def name(node: Node) -> Any:
        return "start" if node in core else "stop" if node in ends else (node,)

    def connect(tail: Any, head: Any, capacity: int) -> None:
        room.setdefault(tail, {})[head] = room.get(tail, {}).get(head, 0) + capacity
        room.setdefault(head, {}).setdefault(tail, 0)

    for number, edge in enumerate(edges):
        nodes = [*dict.fromkeys(map(name, edge.nodes))]
        capacity = _logarithm(min(edge.size, best.size), digits)
        if len(nodes) == 2:
            connect(nodes[0], nodes[1], capacity)
            connect(nodes[1], nodes[0], capacity)
        elif len(nodes) > 2:  # an entry and an exit: the edge is cut once, however many nodes it has on each side
            connect(number, -1 - number, capacity)
            for node in nodes:
                connect(node, number, capacity)
                connect(-1 - number, node, capacity)
    side = frozenset(core | {node[0] for node in _saturated(room) if isinstance(node, tuple)})
    size = prod(edge.size for edge in edges if edge.nodes & side and edge.nodes - side)
    return MinCut(size, side) if size < best.size else best


def _saturated(room: dict[Any, dict[Any, int]]) -> set[Any]:
    """Send the maximum flow from start to stop along shortest paths, and return what start still reaches.

    >>> sorted(_saturated({"start": {"a": 2}, "a": {"start": 0, "stop": 1}, "stop": {"a": 0}}))
    ['a', 'start']
    """
    while True:
        came: dict[Any, Any] = {"start": None}
        pending = ["start"]
        for node in pending:
            for head, left in room[node].items():
                if left and head not in came:
                    came[head] = node
                    pending.append(head)
        if "stop" not in came:
            return {*came}
        path, head = [], "stop"
        while came[head] is not None:
            path.append((came[head], head))
            head = came[head]
        flow = min(room[tail][head] for tail, head in path)
        for tail, head in path:
            room[tail][head] -= flow
            room[head][tail] += flow


@lru_cache(maxsize=4096)
def _logarithm(size: int, digits: int) -> int:
    """Return ln(size) times 10**digits, within one of the exact value."""
    with localcontext() as context:
        context.prec = digits + len(str(size.bit_length()))  # the latter covers the whole part
        return int(Decimal(size).ln().scaleb(digits).to_integral_value())
