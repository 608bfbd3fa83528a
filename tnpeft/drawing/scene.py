"""A picture as plain geometry in inches: boxes, lines and texts, placed so that nothing covers anything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from tnpeft.drawing.graph import Graph, Node
from tnpeft.drawing.layout import place

Point = tuple[float, float]
Line = tuple[Point, Point]
Role = Literal["trainable", "frozen", "constant", "dot", "leg", "index", "sign", "caption"]

CELL = 1.15, 0.85  # inches between neighbouring nodes
FONT: Mapping[str, float] = {"leg": 8.5, "index": 8.0, "sign": 15.0, "caption": 8.5}
NODE_FONT, DOT, PAD = 9.5, 0.085, 0.03
# Advance widths of DejaVu Sans from the space to the tilde, in thousandths of the size.
_WIDTHS = """
    318 401 460 838 636 950 780 275 390 390 500 838 318 361 318 337 636 636 636 636 636 636 636 636 636 636 337 337
    838 838 838 531 1000 684 686 698 770 632 575 775 752 295 295 656 557 863 748 787 603 787 695 635 611 732 684 989
    685 611 685 390 337 390 838 500 500 613 635 550 635 615 352 635 634 278 278 579 278 974 634 612 635 635 411 521
    392 634 592 818 592 592 525 636 337 636 838
"""
_ADVANCE = {chr(32 + k): int(width) for k, width in enumerate(_WIDTHS.split())}
_WIDEST_LETTER = 1000
_OUTWARD: Mapping[str, tuple[int, int]] = {"rows": (-1, 0), "cols": (1, 0), "stack": (0, 1)}


@dataclass(frozen=True)
class Box:
    """A rectangle with a text in it, by its centre; ``role`` says how it looks."""

    text: str
    role: Role
    x: float
    y: float
    width: float
    height: float

    def moved(self, dx: float, dy: float) -> Box:
        """The same box somewhere else."""
        return replace(self, x=self.x + dx, y=self.y + dy)

    def overlap(self, other: Box) -> float:
        """The common area of two boxes.

        >>> Box("", "dot", 0, 0, 2, 2).overlap(Box("", "dot", 1, 1, 2, 2))
        1.0
        """
        wide = min(self.x + self.width / 2, other.x + other.width / 2) - max(
            self.x - self.width / 2, other.x - other.width / 2
        )
        high = min(self.y + self.height / 2, other.y + other.height / 2) - max(
            self.y - self.height / 2, other.y - other.height / 2
        )
        return max(0.0, wide) * max(0.0, high)

    def under(self, line: Line) -> float:
        """Return the share of a line, 0 to 1, that runs under the box (Liang and Barsky's clipping).

        >>> Box("", "dot", 0, 0, 2, 2).under(((-2.0, 0.0), (2.0, 0.0)))
        0.5
        """
        (x0, y0), (x1, y1) = line
        enter, leave = 0.0, 1.0
        for start, step, centre, half in (
            (x0, x1 - x0, self.x, self.width / 2),
            (y0, y1 - y0, self.y, self.height / 2),
        ):
            low, high = centre - half - start, centre + half - start
            if step == 0:
                if low > 0 or high < 0:
                    return 0.0
            else:
                one, two = sorted((low / step, high / step))
                enter, leave = max(enter, one), min(leave, two)
        return max(0.0, leave - enter)


@dataclass(frozen=True)
class Scene:
    """Boxes, lines between them, and thin brackets around fused indices."""

    boxes: tuple[Box, ...]
    lines: tuple[Line, ...] = ()
    brackets: tuple[Line, ...] = ()

    def moved(self, dx: float, dy: float) -> Scene:
        """The same scene somewhere else."""

        def shifted(lines: tuple[Line, ...]) -> tuple[Line, ...]:
            return tuple(((x0 + dx, y0 + dy), (x1 + dx, y1 + dy)) for (x0, y0), (x1, y1) in lines)

        boxes = tuple(box.moved(dx, dy) for box in self.boxes)
        return Scene(boxes, shifted(self.lines), shifted(self.brackets))

    def bounds(self) -> tuple[float, float, float, float]:
        """Left, bottom, right and top of all that is drawn."""
        xs = [x for line in self.brackets for x, _ in line]
        return (
            min([box.x - box.width / 2 for box in self.boxes] + xs),
            min(box.y - box.height / 2 for box in self.boxes),
            max([box.x + box.width / 2 for box in self.boxes] + xs),
            max(box.y + box.height / 2 for box in self.boxes),
        )


def extent(text: str, points: float) -> tuple[float, float]:
    """Width and height of a text in inches, set in DejaVu Sans or a font at most as wide.

    >>> wide, high = extent("layer = 24\\nproj = 2", 10)
    >>> 0.6 < wide < 1.0, 0.25 < high < 0.4
    (True, True)
    """
    rows = text.split("\n")
    wide = max(sum(_ADVANCE.get(letter, _WIDEST_LETTER) for letter in row) for row in rows)
    return wide * points / 72000, 1.25 * points * len(rows) / 72


def scene(graph: Graph) -> Scene:
    """One term, drawn around its own origin."""
    centres = [(x * CELL[0], y * CELL[1]) for x, y in place(graph)]
    boxes = [_node(node, centre) for node, centre in zip(graph.nodes, centres, strict=True)]
    tips = [_tip(node, centre) for node, centre in zip(graph.nodes, centres, strict=True)]
    lines = [(tips[i], tips[j]) for i, j in (edge.ends for edge in graph.edges)]
    placed = list(boxes)
    for e, edge in enumerate(graph.edges):
        if edge.text:
            box = _text(edge.text, "index")
            spots = _along(lines[e], boxes[edge.ends[0]], boxes[edge.ends[1]])
            placed.append(_best(box, spots, placed, lines[:e] + lines[e + 1 :]))
    for node, centre in zip(graph.nodes, centres, strict=True):
        if node.kind is None and node.text and not node.side:
            box = _text(node.text, "index")
            placed.append(_best(box, _around(centre, box), placed, lines))
    brackets = dict(_brackets(graph.nodes, boxes))
    for side, ((x, low), (_, high)) in brackets.items():  # the order of fused indices is part of the matrix
        box = _text(f"({' '.join(graph.rows if side == 'rows' else graph.cols)})", "index")
        gap = box.height / 2 + 0.04
        out = -1 if side == "rows" else 1
        spots = [(x + dx * out * box.width, y) for dx in (0, 0.5, -0.5) for y in (high + gap, low - gap)]
        placed.append(_best(box, spots, placed, lines))
    return Scene(tuple(placed), tuple(lines), tuple(brackets.values()))


def _node(node: Node, centre: Point) -> Box:
    """The box of a node; an open leg's text stands beyond the end of its line."""
    x, y = centre
    if node.kind:
        wide = max(0.42, extent(node.text, NODE_FONT)[0] + 0.2)
        return Box(node.text, node.kind, x, y, wide, 0.36)
    if not node.side:
        return Box("", "dot", x, y, DOT, DOT)
    box = _text(node.text, "leg")
    dx, dy = _OUTWARD[node.side]
    x, y = _tip(node, centre)
    return box.moved(x + dx * box.width / 2, y + dy * box.height / 2)


def _tip(node: Node, centre: Point) -> Point:
    """Return the point at which lines to the node end: the centre, or the inner end of an open leg."""
    dx, dy = _OUTWARD[node.side] if node.side else (0, 0)
    return centre[0] - 0.42 * dx, centre[1] - 0.3 * dy


def _text(text: str, role: Role) -> Box:
    wide, high = extent(text, FONT[role])
    return Box(text, role, 0.0, 0.0, wide + 2 * PAD, high + PAD)


def _along(line: Line, one: Box, two: Box) -> Iterable[Point]:
    """Places on a line for its label, the middle of its visible part first."""
    (x0, y0), (x1, y1) = line
    start, end = one.under(line), 1 - two.under(line)
    for part in (0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3, 0.7, 0.25, 0.75, 0.2, 0.8):
        at = start + part * (end - start)
        yield x0 + at * (x1 - x0), y0 + at * (y1 - y0)


def _around(centre: Point, box: Box) -> Iterable[Point]:
    """Places around a dot for its label, near ones first."""
    x, y = centre
    for gap, (dx, dy) in product(
        (0.05, 0.12), ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
    ):
        yield x + dx * (box.width / 2 + gap), y + dy * (box.height / 2 + gap)


def _best(box: Box, spots: Iterable[Point], boxes: Sequence[Box], lines: Sequence[Line]) -> Box:
    """The box at the first of the spots where it covers least: other boxes count most, then lines."""

    def covered(trial: Box) -> float:
        wider = replace(trial, width=trial.width + 2 * PAD, height=trial.height + 2 * PAD)
        length = sum(wider.under(line) for line in lines)
        return 50 * sum(trial.overlap(other) for other in boxes) + length

    return min((box.moved(*spot) for spot in spots), key=covered)


def _brackets(nodes: Sequence[Node], boxes: Sequence[Box]) -> Iterable[tuple[str, Line]]:
    """A thin line beside the legs of each group of fused row or column indices."""
    for side, sign in (("rows", -1), ("cols", 1)):
        legs = [box for node, box in zip(nodes, boxes, strict=True) if node.side == side]
        if sum(len(node.indices) for node in nodes if node.side == side) > 1:
            x = max(sign * box.x + box.width / 2 for box in legs) * sign + sign * 0.05
            low, high = min(box.y - box.height / 2 for box in legs), max(box.y + box.height / 2 for box in legs)
            yield side, ((x, low), (x, high))
