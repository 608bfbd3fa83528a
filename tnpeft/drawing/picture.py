"""Pictures of networks for papers: PNG, SVG and PDF."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnpeft.drawing.graph import Drawable, graph, lines_of
from tnpeft.drawing.scene import FONT, NODE_FONT, Box, Line, Scene, extent, scene
from tnpeft.networks import Network, NetworkError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".svg", ".png", ".pdf")
_WIDEST = 9.0  # inches; further terms go on in a new row
_MARGIN, _GAP = 0.12, 0.3

# Okabe and Ito's colours, told apart in grey and by shape as well.
_FILL = {"trainable": "#0072B2", "frozen": "#E4E8EB", "constant": "#F7D488"}
_RIM = {"trainable": "#004B77", "frozen": "#7B868E", "constant": "#8A6200"}
_INK = {"trainable": "white", "frozen": "#1A1A1A", "constant": "#1A1A1A"}
_MEANING = {"trainable": "trained", "frozen": "frozen random", "constant": "constant"}
_LINE, _SOFT = "#333333", "#777777"
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "tnpeft", "pdf.fonttype": 42, "hatch.linewidth": 0.6}


def draw(net: Drawable, file: str | Path, sizes: Mapping[str, Any] | None = None, *, dpi: int = 200) -> Path:
    """The path of a picture of the network, just written; the file's ending chooses SVG, PNG or PDF.

    Factors are nodes (blue pills trained, hatched boxes frozen, yellow octagons constant), indices are lines,
    a dot joins an index in three or more places. Rows leave to the left, columns to the right, stack indices
    to the top. The same network always gives the same picture.

    Raises:
        NetworkError: the line is not a network, a size is unfit, or the ending is none of the three.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     draw("B[out r] A[r inp] -> out inp", folder + "/lora.svg", {"r": 8}).name
    'lora.svg'
    """
    path = Path(file)
    if path.suffix.lower() not in _FORMATS:
        raise NetworkError(f"cannot draw into {path.name!r}", remedy=f"end the name in {', '.join(_FORMATS)}")
    from matplotlib import rc_context

    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    with rc_context(_STYLE):
        figure(net, sizes).savefig(path, dpi=dpi, metadata=metadata)
    return path


def svg(net: Drawable, sizes: Mapping[str, Any] | None = None) -> str:
    """Return the picture as SVG.

    >>> svg("B[out r] A[r inp] -> out inp").rstrip().endswith("</svg>")
    True
    """
    from matplotlib import rc_context

    stream = StringIO()
    with rc_context(_STYLE):
        figure(net, sizes).savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def figure(net: Drawable, sizes: Mapping[str, Any] | None = None) -> Figure:
    """The picture as a matplotlib figure, one inch to the unit; every text has the id ``role:text``.

    >>> figure("B[out r] A[r inp] -> out inp").axes[0].texts[0].get_text()
    'B'
    """
    from matplotlib.figure import Figure

    whole = compose(net, sizes)
    left, bottom, right, top = whole.bounds()
    wide, high = right - left + 2 * _MARGIN, top - bottom + 2 * _MARGIN
    canvas = Figure(figsize=(wide, high), facecolor="white")
    axes = canvas.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(left - _MARGIN, right + _MARGIN), ylim=(bottom - _MARGIN, top + _MARGIN))
    axes.set_axis_off()
    _paint(axes, whole)
    return canvas


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


# ---- painting


def _paint(axes: Axes, whole: Scene) -> None:
    for line in whole.lines:
        axes.plot(*_columns(line), color=_LINE, linewidth=1.1, solid_capstyle="round", zorder=1)
    for bracket in whole.brackets:
        axes.plot(*_columns(bracket), color=_SOFT, linewidth=0.8, zorder=1)
    for box in whole.boxes:
        _paint_box(axes, box)


def _columns(line: Line) -> tuple[list[float], list[float]]:
    return [x for x, _ in line], [y for _, y in line]


def _paint_box(axes: Axes, box: Box) -> None:
    from matplotlib.patches import Circle

    if box.role == "dot":
        axes.add_patch(Circle((box.x, box.y), box.width / 2, color=_LINE, zorder=3, gid=f"dot:{box.text}"))
        return
    ground: dict[str, Any] | None = None
    if box.role in _FILL:
        axes.add_patch(_shape(box))
        if box.role == "frozen":
            ground = {"facecolor": _FILL["frozen"], "edgecolor": "none", "pad": 1.2}
    elif box.role in ("index", "leg"):
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axes.text(
        box.x,
        box.y,
        box.text,
        fontsize=FONT.get(box.role, NODE_FONT),
        color=_INK.get(box.role, _LINE),
        fontweight="bold" if box.role == "trainable" else "normal",
        ha="center",
        va="center",
        linespacing=1.15,
        bbox=ground if box.text else None,
        zorder=4,
        gid=f"{box.role}:{box.text}",
    )


def _shape(box: Box) -> Any:
    """The outline of a factor: pill, hatched rectangle or octagon."""
    from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

    left, bottom = box.x - box.width / 2, box.y - box.height / 2
    style: dict[str, Any] = {
        "facecolor": _FILL[box.role],
        "edgecolor": _RIM[box.role],
        "linewidth": 1.0,
        "zorder": 2,
        "gid": f"node:{box.text}",
    }
    if box.role == "trainable":
        rounded = f"round,pad=0,rounding_size={box.height / 2}"
        return FancyBboxPatch((left, bottom), box.width, box.height, boxstyle=rounded, **style)
    if box.role == "frozen":
        return Rectangle((left, bottom), box.width, box.height, hatch="/////", **style)
    cut, right, top = box.height * 0.3, left + box.width, bottom + box.height
    across, up = (left, left + cut, right - cut, right), (bottom, bottom + cut, top - cut, top)
    order = ((0, 1), (0, 2), (1, 3), (2, 3), (3, 2), (3, 1), (2, 0), (1, 0))
    return Polygon([(across[i], up[j]) for i, j in order], closed=True, **style)
