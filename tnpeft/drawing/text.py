"""Networks as text: Mermaid for pages, a table of factors and indices for terminals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tnpeft._text import Table
from tnpeft.drawing.graph import Drawable, Graph, graph, lines_of
from tnpeft.networks import Network, Term
from tnpeft.networks.factor import PREFIX

_SHAPE = {
    "trainable": '(["{}"])',
    "frozen": '[["{}"]]',
    "constant": '{{{{"{}"}}}}',
    "leg": '["{}"]',
    "dot": '(("{}"))',
}
_STYLE = {
    "trainable": "fill:#0072B2,stroke:#004B77,color:#fff",
    "frozen": "fill:#E4E8EB,stroke:#7B868E,color:#1a1a1a,stroke-dasharray:4 3",
    "constant": "fill:#F7D488,stroke:#8A6200,color:#1a1a1a",
    "dot": "fill:#fff,stroke:#333,color:#333",
    "leg": "fill:none,stroke:none,color:#333",
}


def mermaid(net: Drawable, sizes: Mapping[str, Any] | None = None) -> str:
    """The network as a Mermaid flowchart, rows at the left: pages that know Mermaid show it as a picture.

    Raises:
        NetworkError: the line is not a network, or a size is unfit.

    >>> print(mermaid("B[out r] A[r inp] -> out inp", {"r": 8}).splitlines()[1])
      n0(["B"]):::trainable
    """
    parts = [
        (f"{sites} {'-' if term.sign < 0 else '+'}".strip(), graph(line, term, known))
        for sites, line, known in lines_of(net, sizes)
        for term in line.terms
    ]
    rows, first = ["flowchart LR"], 0
    for k, (title, part) in enumerate(parts):
        body = list(_chart(part, first))
        alone = len(parts) == 1 and title == "+"
        rows += body if alone else [f'  subgraph s{k} ["{title}"]', *("  " + row for row in body), "  end"]
        first += len(part.nodes)
    used = {_look(part, k) for _, part in parts for k in range(len(part.nodes))}
    return "\n".join([*rows, *(f"  classDef {look} {style}" for look, style in _STYLE.items() if look in used)])


def _look(part: Graph, k: int) -> str:
    node = part.nodes[k]
    return node.kind or ("leg" if node.side else "dot")


def _chart(part: Graph, first: int) -> Iterator[str]:
    for k, node in enumerate(part.nodes):
        look = _look(part, k)
        yield f"  n{first + k}{_SHAPE[look].format(node.text.replace(chr(10), ', ') or ' ')}:::{look}"
    for edge in part.edges:
        one, two = reversed(edge.ends) if part.nodes[edge.ends[1]].side == "rows" else edge.ends
        named = f'|"{edge.text.replace(chr(10), ", ")}"|' if edge.text else ""
        yield f"  n{first + one} ---{named} n{first + two}"


def text(net: Drawable, sizes: Mapping[str, Any] | None = None) -> str:
    """The network as a table: a row for each factor, a column for each index, a dot where one carries the other.

    Raises:
        NetworkError: the line is not a network, or a size is unfit.

    >>> print(text("B[out r] A[r inp] -> out inp", {"r": 8}))
         out  inp   r
      B   ●         ●
      A        ●    ●
         row  col  bond
                    8
    """
    tables = []
    for sites, line, known in lines_of(net, sizes):
        tables += [f"{sites}:"] * bool(sites) + _table(line, known)
    return "\n".join(row.rstrip() for row in tables)


def _table(net: Network, sizes: Mapping[str, object]) -> list[str]:
    order = [*net.outer, *net.bonds]
    body = [row for k, term in enumerate(net.terms) for row in _factors(net, term, k, order)]
    foot = [["", *(_role(net, index) for index in order)]]
    foot += [["", *(str(sizes.get(index, "")) for index in order)]] * any(index in sizes for index in order)
    return Table(("", *order), (*map(tuple, body), *map(tuple, foot)), "<^").text().splitlines()


def _factors(net: Network, term: Term, k: int, order: Sequence[str]) -> Iterator[list[str]]:
    for f, factor in enumerate(term.factors):
        sign = " " if f or (k == 0 and term.sign > 0) else "-" if term.sign < 0 else "+"
        yield [
            f"{sign} {PREFIX[factor.kind]}{factor.name}",
            *("●" if index in factor.indices else "" for index in order),
        ]


def _role(net: Network, index: str) -> str:
    for role, group in (("stack", net.stack), ("row", net.rows), ("col", net.cols)):
        if index in group:
            return role
    return "bond"
