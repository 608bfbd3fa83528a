"""Figures for screen and print: accuracy against parameters, differences at matched budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tnpeft.studies.results import Point
from tnpeft.studies.statistics import best_under

# Okabe and Ito's colours, told apart by all common kinds of colour vision; every method has its own marker too.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#663300")
MARKERS = ("s", "o", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "tnpeft",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "legend.frameon": False,
}


def budget_figure(points: Sequence[Point], path: Path, *, title: str = "", reference: str = "") -> tuple[Path, ...]:
    """Accuracy against adapter parameters (log axis), a panel for each task, as PNG, PDF and SVG.

    Markers are means over seeds, bars their 95 % t intervals; faint vertical lines are the reference's
    rungs with their ranks above; a method without parameters and full fine-tuning are horizontal lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(p.task for p in points))
    labels = list(dict.fromkeys(p.label for p in points if p.kind not in ("full", "none")))
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, len(tasks), figsize=(3.4 * len(tasks) + 2.2, 3.7), squeeze=False, layout="constrained"
        )
        for axis, task in zip(panels[0], tasks, strict=True):
            _panel(axis, [p for p in points if p.task == task], labels, reference)
            if len(tasks) > 1 or not title:
                axis.set_title(TITLES.get(task, task), pad=14)
        panels[0][0].set_ylabel(f"{_metric(points)} on held-out examples")
        found = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
        order = [*labels, *(name for name in found if name not in labels)]
        handles = [found[name] for name in order if name in found]
        figure.legend(handles, [n for n in order if n in found], loc="outside right center", title=_seeds(points))
        if title:
            figure.suptitle(title, fontsize=11)
        written = tuple(save(figure, path.with_suffix(end)) for end in (".png", ".pdf", ".svg"))
        pyplot.close(figure)
    return written


TITLES = {
    "sst2": "SST-2",
    "rte": "RTE",
    "boolq": "BoolQ",
    "digits_shifted": "Digits, inverted and transposed",
    "digits_inverted": "Digits, inverted",
    "digits_transposed": "Digits, transposed",
}


def save(figure: Any, path: Path) -> Path:
    """Write a figure without the date in it, so that equal results give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamps = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.savefig(path, metadata=stamps.get(path.suffix))
    return path


def _metric(points: Sequence[Point]) -> str:
    return "Matthews correlation" if {p.task for p in points} == {"cola"} else "Accuracy"


def _seeds(points: Sequence[Point]) -> str:
    counts = sorted({p.summary.n for p in points})
    return (
        f"mean of {counts[0]} seed{'s' if counts[0] > 1 else ''}"
        if len(counts) == 1
        else (f"mean of {counts[0]} to {counts[-1]} seeds")
    )


def _panel(axis: Any, points: Sequence[Point], labels: Sequence[str], reference: str) -> None:
    for rung in (p for p in points if p.label == reference):
        axis.axvline(rung.parameters, color="0.85", linewidth=1, zorder=0)
        size = rung.size.rpartition("=")[2]
        top = axis.get_xaxis_transform()
        axis.text(
            rung.parameters,
            1.01,
            f"r={size}" if size else "",
            transform=top,
            ha="center",
            fontsize=7,
            color=COLOURS[0],
        )
    for place, label in enumerate(labels):
        group = sorted((p for p in points if p.label == label), key=lambda p: p.parameters)
        if group:
            _line(axis, group, COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)])
    for p, style in ((p, {"full": ":", "none": "--"}.get(p.kind)) for p in points):
        if style:
            axis.axhline(p.summary.mean, color="0.45", linestyle=style, linewidth=1, zorder=1, label=p.label)
    if any(p.parameters and p.label in labels for p in points):
        _logarithmic(axis)
    axis.set_xlabel("Adapter parameters (log scale)")
    axis.grid(axis="y", color="0.92", linewidth=0.6)
    axis.set_axisbelow(True)


def _logarithmic(axis: Any) -> None:
    """A log axis with plain numbers at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _half(point: Point) -> float:
    """Half the width of a point's interval as a bar; none for a single score, whose interval is the whole line."""
    its = point.summary
    return its.high - its.mean if its.n > 1 else 0.0


def _line(axis: Any, group: Sequence[Point], colour: str, marker: str) -> None:
    sizes, means = [p.parameters for p in group], [p.summary.mean for p in group]
    bars = [_half(p) for p in group]
    axis.errorbar(
        sizes,
        means,
        yerr=bars,
        color=colour,
        marker=marker,
        markersize=9 if marker == "*" else 6.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=1.5 if len(group) > 1 else 0,
        elinewidth=1,
        capsize=2,
        label=group[0].label,
        zorder=3,
    )


def is_ladder(points: Sequence[Point]) -> bool:
    """Whether some method has several sizes and all such sizes are numbers: a line may join them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for p in points:
        groups.setdefault((p.task, p.label), []).append(p.size.rpartition("=")[2])
    several = [sizes for sizes in groups.values() if len(sizes) > 1]
    return bool(several) and all(size.isdigit() for sizes in several for size in sizes)


def ranked_figure(points: Sequence[Point], path: Path, *, title: str = "", reference: str = "") -> tuple[Path, ...]:
    """Methods by their means, best on top, with their 95 % t intervals; the reference's lines go through."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(p.task for p in points))
    most = max(sum(p.task == task for p in points) for task in tasks)
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, len(tasks), figsize=(6.4 * len(tasks), 0.8 + 0.19 * most), squeeze=False, layout="constrained"
        )
        for axis, task in zip(panels[0], tasks, strict=True):
            group = sorted((p for p in points if p.task == task), key=lambda p: p.summary.mean)
            for place, p in enumerate(group):
                its, mine = p.summary, p.label == reference
                bars = _half(p)
                colour, marker = (COLOURS[0], MARKERS[0]) if mine else (COLOURS[1], MARKERS[1])
                axis.errorbar(its.mean, place, xerr=bars, color=colour, marker=marker, markersize=5, capsize=2)
                if mine:
                    axis.axvline(its.mean, color="0.8", linewidth=1, zorder=0)
            axis.set_yticks(range(len(group)), [f"{p.name}, {p.parameters:,}" for p in group], fontsize=7)
            axis.grid(axis="x", color="0.92", linewidth=0.6)
            axis.set_axisbelow(True)
            if len(tasks) > 1 or not title:
                axis.set_title(TITLES.get(task, task))
        figure.supxlabel(f"{_metric(points)} on held-out examples ({_seeds(points)})", fontsize=9)
        if title:
            figure.suptitle(title, fontsize=11)
        written = tuple(save(figure, path.with_suffix(end)) for end in (".png", ".pdf", ".svg"))
        pyplot.close(figure)
    return written


def curve_figure(points: Sequence[Point], path: Path, *, title: str = "") -> tuple[Path, ...]:
    """The best-under-budget curves U(B) as steps, a panel for each task; methods of one size are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(p.task for p in points))
    labels = list(dict.fromkeys(p.label for p in points if p.kind not in ("full", "none")))
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, len(tasks), figsize=(3.4 * len(tasks) + 2.2, 3.4), squeeze=False, layout="constrained"
        )
        for axis, task in zip(panels[0], tasks, strict=True):
            for place, label in enumerate(labels):
                group = [(p.parameters, p.summary.mean) for p in points if (p.task, p.label) == (task, label)]
                if len(group) > 1:
                    curve = best_under(group)
                    curve.append((max(size for size, _ in group), curve[-1][1]))
                    axis.step(
                        *zip(*curve, strict=True),
                        where="post",
                        color=COLOURS[place % len(COLOURS)],
                        marker=MARKERS[place % len(MARKERS)],
                        markersize=4,
                        label=f"{label} ({len(group)} sizes)",
                    )
            axis.set(xlabel="Parameters allowed (log scale)", title=TITLES.get(task, task))
            _logarithmic(axis)
            axis.grid(axis="y", color="0.92", linewidth=0.6)
        panels[0][0].set_ylabel("Best mean accuracy under the budget")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", title=_seeds(points))
        if title:
            figure.suptitle(title, fontsize=11)
        written = tuple(save(figure, path.with_suffix(end)) for end in (".png", ".pdf", ".svg"))
        pyplot.close(figure)
    return written
