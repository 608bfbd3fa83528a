"""A whole picture: the terms of all lines with their signs, captions and a legend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tnpeft.drawing.graph import Drawable, graph, lines_of
from tnpeft.drawing.scene import FONT, Box, Scene, extent, scene
from tnpeft.networks import Network

# Okabe and Ito's colours, told apart in grey and by shape as well.
FILL = {"trainable": "#0072B2", "frozen": "#E4E8EB", "constant": "#F7D488"}
RIM = {"trainable": "#004B77", "frozen": "#7B868E", "constant": "#8A6200"}
INK = {"trainable": "white", "frozen": "#1A1A1A", "constant": "#1A1A1A"}
LINE, SOFT = "#333333", "#777777"
MARGIN = 0.12
_MEANING = {"trainable": "trained", "frozen": "frozen random", "constant": "constant"}
_WIDEST = 9.0  # inches; further terms go on in a new row
_GAP = 0.3


def compose(net: Drawable, sizes: Mapping[str, Any] | None = None) -> Scene:
    """All terms of all lines, their signs, and a legend of the kinds that occur.

    >>> [box.text for box in compose("A[out inp] - ^W[out inp] -> out inp").boxes if box.role == "sign"]
    ['\u2212']
    """
    rows = [_captioned(_row(line, known), caption) for caption, line, known in lines_of(net, sizes)]
    return _legend(_stacked(rows))


def _row(net: Network, sizes: Mapping[str, object]) -> Scene:
    """The terms of one line beside each other, in new rows where the page ends."""
    rows: list[Scene] = []
    for k, term in enumerate(net.terms):
        part = scene(graph(net, term, sizes))
        if k or term.sign < 0:
            part = _signed(part, "+" if term.sign > 0 else "\u2212")
        if rows and _width(rows[-1]) + _GAP + _width(part) <= _WIDEST:
            rows[-1] = _joined(rows[-1], part)
        else:
            rows.append(part)
    return _stacked(rows)


def _width(part: Scene) -> float:
    left, _, right, _ = part.bounds()
    return right - left


def _signed(part: Scene, sign: str) -> Scene:
    left, bottom, _, top = part.bounds()
    box = Box(sign, "sign", left - _GAP, (bottom + top) / 2, *extent(sign, FONT["sign"]))
    return Scene((box, *part.boxes), part.lines, part.brackets)


def _joined(one: Scene, two: Scene) -> Scene:
    """Two scenes side by side, their middles at one height."""
    _, low, right, high = one.bounds()
    left, bottom, _, top = two.bounds()
    return _merged([one, two.moved(right + _GAP - left, (low + high - bottom - top) / 2)])


def _stacked(rows: list[Scene]) -> Scene:
    """Scenes below each other, their left sides at one place."""
    placed = rows[:1]
    for row in rows[1:]:
        left, low, _, _ = placed[-1].bounds()
        own, _, _, top = row.bounds()
        placed.append(row.moved(left - own, low - 1.5 * _GAP - top))
    return _merged(placed)


def _merged(parts: Iterable[Scene]) -> Scene:
    parts = list(parts)
    return Scene(
        tuple(box for part in parts for box in part.boxes),
        tuple(line for part in parts for line in part.lines),
        tuple(line for part in parts for line in part.brackets),
    )


def _captioned(part: Scene, text: str) -> Scene:
    if not text:
        return part
    left, _, _, top = part.bounds()
    wide, high = extent(text, FONT["caption"])
    return Scene(
        (Box(text, "caption", left + wide / 2, top + high, wide, high), *part.boxes), part.lines, part.brackets
    )


def _legend(part: Scene) -> Scene:
    """The scene with a small sample and the meaning of every kind of factor, unless all are trained."""
    kinds = [kind for kind in _MEANING if any(box.role == kind for box in part.boxes)]
    if kinds == ["trainable"]:
        return part
    left, bottom, _, _ = part.bounds()
    boxes, x = list(part.boxes), left
    for kind in kinds:
        wide, high = extent(_MEANING[kind], FONT["caption"])
        y = bottom - _GAP - high / 2
        boxes.append(Box("", kind, x + 0.15, y, 0.3, 0.17))  # type: ignore[arg-type]
        boxes.append(Box(_MEANING[kind], "caption", x + 0.38 + wide / 2, y, wide, high))
        x += 0.6 + wide
    return Scene(tuple(boxes), part.lines, part.brackets)
