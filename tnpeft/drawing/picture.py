"""Pictures of networks for papers: PNG, SVG and PDF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnpeft._extras import needed
from tnpeft._files import save_figure, whole
from tnpeft.drawing.composition import FILL, INK, LINE, MARGIN, RIM, SOFT, compose
from tnpeft.drawing.graph import Drawable
from tnpeft.drawing.markup import svg
from tnpeft.drawing.scene import FONT, NODE_FONT, Box, Line, Scene
from tnpeft.networks import NetworkError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".svg", ".png", ".pdf")

_STYLE: Any = {"pdf.fonttype": 42, "hatch.linewidth": 0.6}


def draw(net: Drawable, file: str | Path, sizes: Mapping[str, Any] | None = None, *, dpi: int = 200) -> Path:
    """The path of a picture of the network, just written; the file's ending chooses SVG, PNG or PDF.

    Factors are nodes (blue pills trained, hatched boxes frozen, yellow octagons constant), indices are lines,
    a dot joins an index in three or more places. Rows leave to the left, columns to the right, stack indices
    to the top. The same network always gives the same picture. PNG and PDF need matplotlib (the extra ``plots``).

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
    if path.suffix.lower() == ".svg":
        text = '<?xml version="1.0" encoding="utf-8"?>\n' + svg(net, sizes)
        with whole(path) as part:
            part.write_text(text, encoding="utf-8")
        return path
    needed("matplotlib", "plots", f"a picture as {path.suffix}")
    from matplotlib import rc_context

    metadata = {".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    with rc_context(_STYLE):
        save_figure(figure(net, sizes), path, dpi=dpi, metadata=metadata)
    return path


def figure(net: Drawable, sizes: Mapping[str, Any] | None = None) -> Figure:
    """The picture as a matplotlib figure, one inch to the unit; every text has the id ``role:text``.

    >>> figure("B[out r] A[r inp] -> out inp").axes[0].texts[0].get_text()
    'B'
    """
    from matplotlib.figure import Figure

    whole = compose(net, sizes)
    left, bottom, right, top = whole.bounds()
    wide, high = right - left + 2 * MARGIN, top - bottom + 2 * MARGIN
    canvas = Figure(figsize=(wide, high), facecolor="white")
    axes = canvas.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(left - MARGIN, right + MARGIN), ylim=(bottom - MARGIN, top + MARGIN))
    axes.set_axis_off()
    _paint(axes, whole)
    return canvas


# ---- painting


def _paint(axes: Axes, whole: Scene) -> None:
    for line in whole.lines:
        axes.plot(*_columns(line), color=LINE, linewidth=1.1, solid_capstyle="round", zorder=1)
    for bracket in whole.brackets:
        axes.plot(*_columns(bracket), color=SOFT, linewidth=0.8, zorder=1)
    for box in whole.boxes:
        _paint_box(axes, box)


def _columns(line: Line) -> tuple[list[float], list[float]]:
    return [x for x, _ in line], [y for _, y in line]


def _paint_box(axes: Axes, box: Box) -> None:
    from matplotlib.patches import Circle

    if box.role == "dot":
        axes.add_patch(Circle((box.x, box.y), box.width / 2, color=LINE, zorder=3, gid=f"dot:{box.text}"))
        return
    ground: dict[str, Any] | None = None
    if box.role in FILL:
        axes.add_patch(_shape(box))
        if box.role == "frozen":
            ground = {"facecolor": FILL["frozen"], "edgecolor": "none", "pad": 1.2}
    elif box.role in ("index", "leg"):
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axes.text(
        box.x,
        box.y,
        box.text,
        fontsize=FONT.get(box.role, NODE_FONT),
        color=INK.get(box.role, LINE),
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
        "facecolor": FILL[box.role],
        "edgecolor": RIM[box.role],
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
