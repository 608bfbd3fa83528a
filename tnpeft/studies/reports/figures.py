"""Figures for screen and print: loss and score against budget, rate and step; variance between families; contrasts.

A family has one colour and marker in every figure. Intervals are 95 % t intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from tnpeft._files import save_figure
from tnpeft.studies.reports.points import Point, grouped, on_backbones, span
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
FLAT = {"full": ":", "none": "--"}  # kinds without a size of their own: ceiling and floor
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
def _panels(
    path: Path, *shape: int, size: Any, title: str, labels: Sequence[str] = (), legend: str | None = None
) -> Iterator[Any]:
    """The panels of a figure; at the end it is written as PNG, PDF and SVG.

    With a ``legend`` (its title) there is one for all panels, ``labels`` first, what is not a family last.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(*shape, squeeze=False)
        if title:
            figure.suptitle(title, fontsize=11)
        yield panels
        found: dict[str, Any] = {}
        for axis in panels.flat:
            found |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        order = [name for name in dict.fromkeys((*labels, *found)) if name in found]
        if order and legend is not None:
            handles = [found[name] for name in order]
            figure.legend(handles, order, loc="outside right center", title=legend, fontsize=8)
        for end in (".png", ".pdf", ".svg"):
            save(figure, path.with_suffix(end))


def _families(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(p.label for p in points if p.kind not in FLAT))


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
    tasks = grouped(points, "task")
    measures = [name for name in ("scores", "losses") if any(getattr(p, name) for p in points)]
    by_dof = all(p.dof is not None for p in points if p.kind not in FLAT)
    size = (3.6 * len(measures) + 2.0, 3.3 * len(tasks) + 0.3)
    legend = {"labels": _families(points), "legend": _count(points)}
    with _panels(path, len(tasks), len(measures), size=size, title=title, **legend) as panels:
        for ((task, its), measure), axis in zip(product(tasks.items(), measures), panels.flat, strict=True):
            _budget_panel(axis, its, measure, by_dof, reference)
            axis.set_ylabel(METRIC[its[0].metric] if measure == "scores" else LOSS)
            if len(tasks) > 1 or not title:
                axis.set_title(TITLES.get(task, task), pad=14)


def _budget_panel(axis: Any, points: Sequence[Point], measure: str, by_dof: bool, reference: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    def size(p: Point) -> int:
        return int(p.dof or 0) if by_dof else p.parameters

    for rung in (p for p in points if p.label == reference):
        axis.axvline(size(rung), color="0.88", linewidth=1, zorder=0)
    labels, policy_of_all = _families(points), points[0].policy
    points = [p for p in points if getattr(p, measure)]
    found = {id(p): summary(getattr(p, measure)) for p in points}
    families = grouped([p for p in points if p.kind not in FLAT], "label", "policy")
    for label, policy in sorted(families, key=lambda its: labels.index(its[0])):
        group = sorted(families[label, policy], key=size)
        (colour, marker), first = style(label, labels), policy == policy_of_all
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
        if p.kind in FLAT:
            look = {"linestyle": FLAT[p.kind], "label": p.label}
            axis.axhline(found[id(p)].mean, color="0.45", linewidth=1, zorder=1, **look)
    if families:  # plain numbers at 1, 2 and 5 of every decade
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
    with _panels(path, 1, 2, size=(9.2, 3.6), title=title, labels=labels, legend="") as panels:
        for axis, (key, name) in zip(panels[0], (("lr", "Learning rate"), ("value", "Relative step")), strict=True):
            for p in tried:
                rows = [row for row in p.search if row["loss"] is not None]
                xs, ys = [row[key] for row in rows], [row["loss"] for row in rows]
                colour, marker = style(p.label, labels)
                axis.plot(xs, ys, color=colour, marker=marker, markersize=4, label=p.label)
            axis.set(xscale="log", xlabel=f"{name} (log scale)")
            axis.grid(axis="y")
        panels[0][0].set_ylabel(f"{LOSS} on dev")
        panels[0][1].sharey(panels[0][0])


def variance_figure(points: Sequence[Point], path: Path, controls: Sequence[str], *, title: str = "") -> None:
    """Variance of the loss between families by policy, on every backbone: all families, and the controls alone.

    Controls span the same updates, so that their variance is what optimiser and luck make: the noise floor.
    """
    policies = grouped(points, "policy")
    with _panels(path, 1, 1, size=(6.0, 3.4), title=title, legend="between means of") as [[axis]]:
        for shift, (name, colour, marker) in zip((-0.12, 0.12), SETS, strict=True):
            look = {"color": colour, "marker": marker, "linestyle": ""}
            for place, group in enumerate(policies.values()):
                its = [p.losses for p in group if name == SETS[0][0] or p.label in controls]
                found = [v for v in variance_between(its).values() if v > 0]
                axis.plot([place + shift] * len(found), found, alpha=0.4, markersize=4, **look)
                if found:
                    label = name if place == 0 else None
                    axis.plot(place + shift, geometric_mean(found), label=label, **look)
        axis.set_xticks(range(len(policies)), policies)
        axis.set(yscale="log", ylabel="Variance of the cross-entropy")
        axis.grid(axis="y")


def forest_figure(found: Sequence[Finding], path: Path, *, title: str = "", unit: str = "") -> None:
    """Declared contrasts with their intervals; the band is the margin within which a difference counts as none."""
    shown = [(its, its.summary) for its in found[::-1] if its.summary is not None]
    with _panels(path, 1, 1, size=(6.6, 1.2 + 0.36 * len(shown)), title=title) as [[axis]]:
        for place, (its, difference) in enumerate(shown):
            band = [place - 0.5, place + 0.5]
            axis.fill_betweenx(band, -its.margin, its.margin, color="0.9", linewidth=0, zorder=0)
            _across(axis, difference, place, COLOURS[1], "o")
        axis.axvline(0, color="0.6", linewidth=0.8, zorder=1)
        names = [f"{its.name}, n = {difference.n}" for its, difference in shown]
        axis.set_yticks(range(len(shown)), names, fontsize=8)
        axis.set_ylim(-0.5, len(shown) - 0.5)
        axis.set_xlabel(f"Difference{f' in {unit}' if unit else ''} (band: the margin)")


def is_ladder(points: Sequence[Point]) -> bool:
    """Return True if some method has several sizes and all such sizes are numbers: a line may join them."""
    several = [group for group in grouped(points, "task", "label").values() if len(group) > 1]
    sizes = [p.size.rpartition("=")[2] for group in several for p in group]
    return bool(sizes) and all(map(str.isdigit, sizes))


def ranked_figure(points: Sequence[Point], path: Path, *, title: str = "", reference: str = "") -> None:
    """Methods by their means, best on top, each in its family's colour; the reference's lines go through."""
    tasks, labels = grouped(points, "task"), _families(points)
    size = (6.4 * len(tasks), 0.9 + 0.19 * max(map(len, tasks.values())))
    with _panels(path, 1, len(tasks), size=size, title=title) as panels:
        for axis, (task, its) in zip(panels[0], tasks.items(), strict=True):
            group = sorted(its, key=lambda p: p.summary.mean)
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
