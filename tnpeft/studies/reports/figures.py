"""Figures for screen and print: loss and score against budget, rate and step; variance between families; contrasts.

A family has one colour and marker in every figure. Intervals are 95 % t intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from tnpeft._files import save_figure
from tnpeft.studies.reports.points import Point, on_backbones, span
from tnpeft.studies.statistics import Finding, Summary, summary, variance_between

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
    "grid.color": "0.92",
    "grid.linewidth": 0.6,
}

# The order in which families take colours and markers, so that each has its own in every figure.
FAMILIES = ("LoRA", "CP", "Tucker", "LoTR", "LoRTA", "Tensor train", "VeRA", "TensLoRA QKV-depth")
FAMILIES += ("MoSLoRA", "Block term", "LoRA, random gauge", "FacT-TT", "FacT-TK", "CaRA", "MetaTT-4D", "LoRETTA")
FAMILIES += ("Hierarchical Tucker", "TeRA", "IA3", "TensLoRA Att-QKV-depth", "TensLoRA Att", "TensLoRA Depth")
METRIC = {"accuracy": "Accuracy", "matthews": "Matthews correlation", "f1": "F1 of the second class"}
LOSS = "Cross-entropy"
TITLES = {
    "sst2": "SST-2",
    "rte": "RTE",
    "boolq": "BoolQ",
    "digits_shifted": "Digits, inverted and transposed",
    "digits_inverted": "Digits, inverted",
    "digits_transposed": "Digits, transposed",
}
SETS = (("all families", COLOURS[1], "o"), ("controls (same updates)", COLOURS[6], "D"))  # of the variance figure


def style(label: str, others: Sequence[str] = ()) -> tuple[str, str]:
    """Return the colour and marker of a family; one that is not in ``FAMILIES`` comes after them, in order.

    >>> style("LoRA"), style("mine", ["LoRA", "mine"]) == style("yours", ["mine", "yours"])
    (('#D55E00', 's'), False)
    """
    order = [*FAMILIES, *(name for name in others if name not in FAMILIES)]
    place = order.index(label) if label in order else len(order)
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def save(figure: Any, path: Path) -> None:
    """Write a figure without the date in it, so that equal results give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamps = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    save_figure(figure, path, metadata=stamps.get(path.suffix))


@contextmanager
def _canvas(path: Path, *shape: int, size: tuple[float, float], title: str = "") -> Iterator[tuple[Any, Any]]:
    """A figure and its panels; at the end it is written as PNG, PDF and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
        if title:
            figure.suptitle(title, fontsize=11)
        yield figure, panels
        for end in (".png", ".pdf", ".svg"):
            save(figure, path.with_suffix(end))
        pyplot.close(figure)


def _legend(figure: Any, panels: Any, labels: Sequence[str], title: str) -> None:
    """One legend for all panels, in the order of the study, what is not a family last."""
    found: dict[str, Any] = {}
    for axis in panels.flat:
        found |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = [name for name in dict.fromkeys((*labels, *found)) if name in found]
    if order:
        figure.legend([found[name] for name in order], order, loc="outside right center", title=title, fontsize=8)


def _families(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(p.label for p in points if p.kind not in ("full", "none")))


def _count(points: Sequence[Point]) -> str:
    """The numbers behind the markers, as a title of a legend."""
    counts = [p.summary.n for p in points]
    return f"mean of {span(counts)} {'backbone' if on_backbones(points) else 'seed'}{'' if max(counts) == 1 else 's'}"


def _half(its: Summary) -> float:
    """Half the width of an interval as a bar; none for a single observation, whose interval is the whole line."""
    return its.high - its.mean if its.n > 1 else 0.0


def _across(axis: Any, its: Summary, place: int, colour: str, marker: str) -> None:
    """A mean with its interval along the horizontal axis."""
    axis.errorbar(its.mean, place, xerr=_half(its), color=colour, marker=marker, markersize=5, capsize=2)


def budget_figure(points: Sequence[Point], path: Path, *, title: str = "", reference: str = "") -> None:
    """Score and loss on held-out examples against degrees of freedom (log axis), a row of panels for each task.

    Where degrees of freedom are unknown, parameters stand in their place. A method without parameters and full
    fine-tuning are horizontal lines, floor and ceiling; faint vertical lines are the reference's sizes. Policies
    after the first one are dashed, with hollow markers.
    """
    tasks = list(dict.fromkeys(p.task for p in points))
    measures = [name for name in ("scores", "losses") if any(getattr(p, name) for p in points)]
    by_dof = all(p.dof is not None for p in points if p.kind not in ("full", "none"))
    size = (3.6 * len(measures) + 2.0, 3.3 * len(tasks) + 0.3)
    with _canvas(path, len(tasks), len(measures), size=size, title=title) as (figure, panels):
        for (task, measure), axis in zip(product(tasks, measures), panels.flat, strict=True):
            its = [p for p in points if p.task == task]
            _budget_panel(axis, its, measure, by_dof, reference)
            axis.set_ylabel(METRIC[its[0].metric] if measure == "scores" else LOSS)
            if len(tasks) > 1 or not title:
                axis.set_title(TITLES.get(task, task), pad=14)
        _legend(figure, panels, _families(points), _count(points))


def _budget_panel(axis: Any, points: Sequence[Point], measure: str, by_dof: bool, reference: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    def size(p: Point) -> int:
        return int(p.dof or 0) if by_dof else p.parameters

    for rung in (p for p in points if p.label == reference):
        axis.axvline(size(rung), color="0.88", linewidth=1, zorder=0)
    labels, policies = _families(points), list(dict.fromkeys(p.policy for p in points))
    found = {id(p): summary(values) for p in points if (values := getattr(p, measure))}
    points = [p for p in points if id(p) in found]
    for label, policy in product(labels, policies):
        group = sorted((p for p in points if (p.label, p.policy) == (label, policy)), key=size)
        if group:
            (colour, marker), first = style(label, labels), policy == policies[0]
            axis.errorbar(
                [size(p) for p in group],
                [found[id(p)].mean for p in group],
                yerr=[_half(found[id(p)]) for p in group],
                color=colour,
                marker=marker,
                markersize=6,
                markerfacecolor=colour if first else "white",
                markeredgecolor="white" if first else colour,
                markeredgewidth=0.6 if first else 1.2,
                linestyle="-" if first else "--",
                linewidth=1.5 if len(group) > 1 else 0,
                elinewidth=1,
                capsize=2,
                label=label if first else f"{label}, {policy}",
                zorder=3,
            )
    for p in points:
        if p.kind in ("full", "none"):
            kind = {"full": ":", "none": "--"}[p.kind]
            axis.axhline(found[id(p)].mean, color="0.45", linestyle=kind, linewidth=1, zorder=1, label=p.label)
    if _families(points):  # plain numbers at 1, 2 and 5 of every decade
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(("Degrees of freedom" if by_dof else "Adapter parameters") + " (log scale)")
    axis.grid(axis="y")
    axis.set_axisbelow(True)


def rates_figure(points: Sequence[Point], path: Path, *, title: str = "") -> None:
    """Dev loss of every search, one line a family: against the learning rate, and against the relative step.

    Where step sizes decide, the first is a fan and the second collapses. Losses that are not finite are left out.
    """
    tried = [p for p in points if p.step is not None and len(p.search) > 1]
    labels = _families(tried)
    with _canvas(path, 1, 2, size=(9.2, 3.6), title=title) as (figure, panels):
        for axis, name in zip(panels[0], ("Learning rate", "Relative step"), strict=True):
            for p in tried:
                rows = [row for row in p.search if math.isfinite(row.loss)]
                xs = [row.lr if name == "Learning rate" else row.value for row in rows]
                colour, marker = style(p.label, labels)
                axis.plot(xs, [row.loss for row in rows], color=colour, marker=marker, markersize=4, label=p.label)
            axis.set(xscale="log", xlabel=f"{name} (log scale)")
            axis.grid(axis="y")
        panels[0][0].set_ylabel(f"{LOSS} on dev")
        panels[0][1].sharey(panels[0][0])
        _legend(figure, panels, labels, "")


def variance_figure(points: Sequence[Point], path: Path, controls: Sequence[str], *, title: str = "") -> None:
    """Variance of the loss between families by policy, on every backbone: all families, and the controls alone.

    Controls span the same updates, so that their variance is what optimiser and luck make: the noise floor.
    """
    policies = list(dict.fromkeys(p.policy for p in points))
    with _canvas(path, 1, 1, size=(6.0, 3.4), title=title) as (figure, panels):
        axis = panels[0][0]
        for shift, (name, colour, marker) in zip((-0.12, 0.12), SETS, strict=True):
            look = {"color": colour, "marker": marker, "linestyle": ""}
            for place, policy in enumerate(policies):
                its = [p for p in points if p.policy == policy and (name == SETS[0][0] or p.label in controls)]
                found = [v for v in variance_between([p.losses for p in its]).values() if v > 0]
                axis.plot([place + shift] * len(found), found, alpha=0.4, markersize=4, **look)
                if found:
                    middle = math.exp(math.fsum(map(math.log, found)) / len(found))
                    axis.plot(place + shift, middle, label=name if place == 0 else None, **look)
        axis.set_xticks(range(len(policies)), policies)
        axis.set(yscale="log", ylabel="Variance of the cross-entropy")
        axis.grid(axis="y")
        _legend(figure, panels, (), "between means of")


def forest_figure(found: Sequence[Finding], path: Path, *, title: str = "", unit: str = "") -> None:
    """Declared contrasts with their intervals; the band is the margin within which a difference counts as none."""
    shown = [(its, its.summary) for its in found[::-1] if its.summary is not None]
    with _canvas(path, 1, 1, size=(6.6, 1.2 + 0.36 * len(shown)), title=title) as (_, panels):
        axis = panels[0][0]
        for place, (its, difference) in enumerate(shown):
            band = [place - 0.5, place + 0.5]
            axis.fill_betweenx(band, -its.margin, its.margin, color="0.9", linewidth=0, zorder=0)
            _across(axis, difference, place, COLOURS[1], "o")
        axis.axvline(0, color="0.6", linewidth=0.8, zorder=1)
        names = [f"{its.name}, n = {difference.n}" for its, difference in shown]
        axis.set_yticks(range(len(shown)), names, fontsize=8)
        axis.set_xlabel(f"Difference{f' in {unit}' if unit else ''} (band: the margin)")
        axis.set_ylim(-0.5, len(shown) - 0.5)


def is_ladder(points: Sequence[Point]) -> bool:
    """Return True if some method has several sizes and all such sizes are numbers: a line may join them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for p in points:
        groups.setdefault((p.task, p.label), []).append(p.size.rpartition("=")[2])
    several = [size for sizes in groups.values() if len(sizes) > 1 for size in sizes]
    return bool(several) and all(map(str.isdigit, several))


def ranked_figure(points: Sequence[Point], path: Path, *, title: str = "", reference: str = "") -> None:
    """Methods by their means, best on top, each in its family's colour; the reference's lines go through."""
    tasks = list(dict.fromkeys(p.task for p in points))
    most = max(sum(p.task == task for p in points) for task in tasks)
    labels, size = _families(points), (6.4 * len(tasks), 0.9 + 0.19 * most)
    with _canvas(path, 1, len(tasks), size=size, title=title) as (_, panels):
        for axis, task in zip(panels[0], tasks, strict=True):
            group = sorted((p for p in points if p.task == task), key=lambda p: p.summary.mean)
            for place, p in enumerate(group):
                _across(axis, p.summary, place, *(style(p.label, labels) if p.label in labels else ("0.45", "o")))
                if p.label == reference:
                    axis.axvline(p.summary.mean, color="0.8", linewidth=1, zorder=0)
            sized = {p.label for p in group if sum(q.label == p.label for q in group) > 1}
            names = [p.name if p.label in sized or p.policy else p.label for p in group]
            axis.set_yticks(range(len(group)), names, fontsize=7)
            axis.grid(axis="x")
            axis.set_axisbelow(True)
            axis.set_xlabel(f"{METRIC[group[0].metric]} on held-out examples ({_count(group)})", fontsize=9)
            if len(tasks) > 1 or not title:
                axis.set_title(TITLES.get(task, task))
