"""The picture of a comparison: a panel for each measure, a bar for each family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnpeft._extras import needed
from tnpeft._files import save_figure
from tnpeft.networks import NetworkError

_FORMATS = (".svg", ".png", ".pdf")
_COLOUR = "#0072B2"  # of Okabe and Ito
_LONGEST = 28  # characters of a name on the axis
_SHOWN = ("parameters", "dof", "rank_bound", "gain", "macs", "saved_bytes")
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "tnpeft", "pdf.fonttype": 42}


def plot(rows: Sequence[Any], title: str, headings: Mapping[str, str], path: str | Path) -> Path:
    """Write the picture as a whole or not at all, and return its path.

    Raises:
        NetworkError: the ending is none of .svg, .png and .pdf, or no family fits.
    """
    needed("matplotlib", "plots", "the picture of a comparison")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise NetworkError(f"cannot draw into {target.name!r}", remedy=f"end the name in {', '.join(_FORMATS)}")
    rows = [row for row in rows if row.fits]
    if not rows:
        raise NetworkError("no family fits, so there is nothing to draw", remedy="read the rows' problems")
    names = [row.name if len(row.name) <= _LONGEST else f"{row.name[: _LONGEST - 3]}..." for row in rows]
    places = range(len(rows))
    with rc_context(_STYLE):
        figure = Figure(figsize=(2.1 * len(_SHOWN) + 1.5, 0.3 * len(rows) + 1.2), layout="constrained")
        figure.suptitle(title, fontsize=9, parse_math=False)
        for axes, measure in zip(figure.subplots(1, len(_SHOWN), sharey=True), _SHOWN, strict=True):
            values = [getattr(row, measure) or 0 for row in rows]
            axes.barh(places, values, color=_COLOUR)
            if min((v for v in values if v), default=1) * 20 < max(values):
                axes.set_xscale("log")
            axes.set_title(headings[measure], fontsize=9)
            axes.set_yticks(places, names, fontsize=8, parse_math=False)
            axes.tick_params(axis="x", labelsize=7)
            axes.locator_params(axis="x", nbins=3) if axes.get_xscale() == "linear" else None
            axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()
        save_figure(figure, target, dpi=200)
    return target
