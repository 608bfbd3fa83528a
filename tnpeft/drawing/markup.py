"""Pictures as SVG, written as text: no library is needed, and a page may restyle them by class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from tnpeft.drawing.composition import FILL, INK, LINE, MARGIN, RIM, SOFT, compose
from tnpeft.drawing.graph import Drawable
from tnpeft.drawing.scene import FONT, NODE_FONT, Box, Point

_INCH = 72.0  # units of the picture
_FAMILY = "DejaVu Sans, Verdana, Liberation Sans, Arial, sans-serif"
_HATCH = (
    '<defs><pattern id="tnpeft-hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
    f'patternTransform="rotate(45)"><rect width="5" height="5" fill="{FILL["frozen"]}"/>'
    f'<path d="M0 0V5" stroke="{RIM["frozen"]}" stroke-width="1.2"/></pattern></defs>'
)


def svg(net: Drawable, sizes: Mapping[str, Any] | None = None) -> str:
    """Return the picture as SVG. Classes name what is drawn: paper, line, bracket, dot, node, text and the role.

    Raises:
        NetworkError: the line is not a network, or a size is unfit.

    >>> svg("B[out r] A[r inp] -> out inp").rstrip().endswith("</svg>")
    True
    """
    whole = compose(net, sizes)
    left, bottom, right, top = whole.bounds()
    page = _Page(left - MARGIN, top + MARGIN)
    wide, high = (right - left + 2 * MARGIN) * _INCH, (top - bottom + 2 * MARGIN) * _INCH
    drawn = [f'<path class="line" d="{page.path(line)}" stroke="{LINE}" stroke-width="1.1"/>' for line in whole.lines]
    drawn += [
        f'<path class="bracket" d="{page.path(line)}" stroke="{SOFT}" stroke-width="0.8"/>' for line in whole.brackets
    ]
    drawn += [part for box in whole.boxes for part in page.box(box)]
    size = f'width="{wide:.2f}pt" height="{high:.2f}pt" viewBox="0 0 {wide:.2f} {high:.2f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{_FAMILY}" text-anchor="middle" role="img">'
    paper = '<rect class="paper" width="100%" height="100%" fill="white"/>'
    hatch = [_HATCH] * any(box.role == "frozen" for box in whole.boxes)
    return "\n".join([head, f"<title>{escape(_title(net))}</title>", paper, *hatch, *drawn, "</svg>\n"])


def _title(net: Drawable) -> str:
    return getattr(net, "name", "") or str(net)


class _Page:
    """The upper left corner of the page, in inches, and what is drawn from there."""

    def __init__(self, left: float, top: float) -> None:
        self.left, self.top = left, top

    def at(self, x: float, y: float) -> str:
        return f"{(x - self.left) * _INCH:.2f} {(self.top - y) * _INCH:.2f}"

    def path(self, points: tuple[Point, ...]) -> str:
        return "M" + "L".join(self.at(*point) for point in points)

    def box(self, box: Box) -> Iterator[str]:
        """A factor's outline, a dot, or the ground of a label; then the text."""
        if box.role == "dot":
            x, y = self.at(box.x, box.y).split()
            yield f'<circle class="dot" cx="{x}" cy="{y}" r="{box.width / 2 * _INCH:.2f}" fill="{LINE}"/>'
            return
        if box.role in FILL:
            yield self._outline(box)
        elif box.role in ("index", "leg") and box.text:
            yield self._rectangle(box, 'class="paper" fill="white"')
        if not box.text:
            return
        points = FONT.get(box.role, NODE_FONT)
        weight = ' font-weight="bold"' if box.role == "trainable" else ""
        if box.role == "frozen":  # the name on plain ground
            inner = Box("", box.role, box.x, box.y, box.width - 0.14, box.height - 0.12)
            yield self._rectangle(inner, f'class="frozen" fill="{FILL["frozen"]}"')
        rows = box.text.split("\n")
        for k, row in enumerate(rows):
            below = (len(rows) - 1) / 2 - k
            x, y = self.at(box.x, box.y + (1.15 * below - 0.36) * points / _INCH).split()
            look = f'class="text {box.role}" font-size="{points:g}" fill="{INK.get(box.role, LINE)}"{weight}'
            yield f'<text x="{x}" y="{y}" {look}>{escape(row)}</text>'

    def _rectangle(self, box: Box, look: str) -> str:
        x, y = self.at(box.x - box.width / 2, box.y + box.height / 2).split()
        wide, high = box.width * _INCH, box.height * _INCH
        return f'<rect x="{x}" y="{y}" width="{wide:.2f}" height="{high:.2f}" {look}/>'

    def _outline(self, box: Box) -> str:
        """Pill, hatched rectangle or octagon."""
        look = f'class="node {box.role}" stroke="{RIM[box.role]}"'
        if box.role == "trainable":
            return self._rectangle(box, f'rx="{box.height / 2 * _INCH:.2f}" fill="{FILL[box.role]}" {look}')
        if box.role == "frozen":
            return self._rectangle(box, f'fill="url(#tnpeft-hatch)" {look}')
        wide, high, cut = box.width / 2, box.height / 2, box.height * 0.3
        half = ((cut - wide, high), (wide - cut, high), (wide, high - cut), (wide, cut - high))
        corners = [(box.x + dx, box.y + dy) for dx, dy in half] + [(box.x - dx, box.y - dy) for dx, dy in half]
        return f'<path d="{self.path(tuple(corners))}Z" fill="{FILL[box.role]}" {look}/>'
