"""The graph of one term in a picture: factors, small dots for hyper-indices, open legs, and the lines between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tnpeft.networks import Factorization, Network, Term, network
from tnpeft.networks.factor import Group, Kind
from tnpeft.networks.sizes import Size, bind, require_network

Drawable = Network | Factorization | str
Side = Literal["rows", "cols", "stack", ""]


@dataclass(frozen=True)
class Node:
    """A factor (it has a ``kind``), a dot for hyper-indices, or the end of an open leg (it has a ``side``)."""

    text: str
    kind: Kind | None = None
    side: Side = ""
    indices: Group = ()


@dataclass(frozen=True)
class Edge:
    """A line between two nodes, by number; it needs a text of its own only between two factors."""

    ends: tuple[int, int]
    text: str = ""


@dataclass(frozen=True)
class Graph:
    """One term as nodes and edges, and the order of the indices that are fused to its rows and its columns."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    rows: Group = ()
    cols: Group = ()


def graph(net: Network, term: Term, sizes: Mapping[str, object]) -> Graph:
    """The nodes and edges of one term; indices that stand in the same factors and play one part are drawn as one.

    >>> from tnpeft.networks import network
    >>> net = network("B[layer out r] A[layer r inp] -> layer out inp")
    >>> [node.text for node in graph(net, net.terms[0], {"r": 8}).nodes]
    ['B', 'A', '', 'layer', 'out', 'inp']
    """
    nodes = [Node(factor.name, factor.kind) for factor in term.factors]
    edges: list[Edge] = []
    for (side, carriers), indices in _bundles(net, term).items():
        text = label(indices, sizes)
        ends = [*carriers]
        if len(carriers) + bool(side) > 2:
            edges += [Edge((f, len(nodes))) for f in carriers]
            ends = [len(nodes)]
            nodes.append(Node("" if side else text, None, "", indices))
        if side:
            ends.append(len(nodes))
            nodes.append(Node(text, None, side, indices))
        if len(ends) == 2:
            edges.append(Edge((ends[0], ends[1]), "" if side else text))
    return Graph(tuple(nodes), tuple(edges), net.rows, net.cols)


def label(indices: Group, sizes: Mapping[str, object]) -> str:
    """The indices, one a line, with the sizes that are known.

    >>> label(("r", "s"), {"r": 8})
    'r = 8\\ns'
    """
    return "\n".join(f"{index} = {sizes[index]}" if index in sizes else index for index in indices)


def _bundles(net: Network, term: Term) -> dict[tuple[Side, tuple[int, ...]], Group]:
    """Indices by the side they leave at and the factors that carry them, bonds first."""
    found: dict[tuple[Side, tuple[int, ...]], Group] = {}
    places: dict[str, list[int]] = {}
    for f, factor in enumerate(term.factors):
        for index in factor.indices:
            places.setdefault(index, []).append(f)
    groups: tuple[tuple[Side, Group], ...] = (("stack", net.stack), ("rows", net.rows), ("cols", net.cols))
    sides = {index: side for side, group in groups for index in group}
    for index in (*(i for i in net.indices if i not in sides), *net.outer):
        if index in places:
            key = sides.get(index, ""), tuple(places[index])
            found[key] = (*found.get(key, ()), index)
    return found


def lines_of(net: Drawable, sizes: Mapping[str, Any] | None) -> Iterator[tuple[str, Network, dict[str, Size]]]:
    """Return the parts to draw: the sites that a line serves ("" if it is the only one), its network, known sizes.

    Raises:
        NetworkError: the line is not a network, or a size is unfit.

    >>> [(sites, str(net)) for sites, net, known in lines_of("A[out inp] -> out inp", {})]
    [('', 'A[out inp] -> out inp')]
    """
    net = network(net) if isinstance(net, str) else net
    if isinstance(net, Network):
        yield "", net, bind(net, sizes, {})
        return
    if not isinstance(net, Factorization):
        require_network(net)
    for line in net.lines:
        yield (
            line.sites if len(net.lines) > 1 else "",
            line.network,
            bind(line.network, net.sizes(sizes, line=line), {}),
        )
