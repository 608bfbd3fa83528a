"""Statistics, tables and figures, against numpy, scipy and hand-made cases."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies
from scipy import stats

from tnpeft._text import Table
from tnpeft.studies.reports import figures, tables
from tnpeft.studies.reports.points import Point
from tnpeft.studies.reports.reporting import render
from tnpeft.studies.statistics import (
    best_under,
    findings,
    holm,
    interval,
    p_different,
    p_equivalent,
    paired,
    summary,
    variance_between,
    variance_ratio,
)
from tnpeft.studies.tasks.scoring import metric


def point(label: str, parameters: int, scores: dict[int, float], task: str = "sst2", kind: str = "family") -> Point:
    return Point(task, label, f"rank={parameters}", kind, parameters, 0, 1e-3, False, scores, scores)


def test_summary_is_numpys() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 30)
    found = summary(list(values))
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.sd == pytest.approx(values.std(ddof=1), rel=1e-12)


def far(hits: int, draws: int, chance: float) -> float:
    """Distance of a count from what a binomial chance says, in standard deviations."""
    return (hits / draws - chance) / math.sqrt(chance * (1 - chance) / draws)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_cover_as_often_as_they_say(n: int, level: float) -> None:
    draw, draws = np.random.default_rng(n), 2000
    found = [interval(list(draw.normal(3, 2, n)), level) for _ in range(draws)]
    assert abs(far(sum(low <= 3 <= high for low, high in found), draws, level)) < 4


def test_intervals_over_backbones_cover_where_seeds_of_one_backbone_are_alike() -> None:
    draw, draws, hits, naive = np.random.default_rng(7), 1000, 0, 0
    for _ in range(draws):
        shared = draw.normal(0, 1, 8)
        scores = {f"{b}/{s}": shared[b] + draw.normal(0, 0.3) for b in range(8) for s in range(3)}
        its = summary(scores)
        assert (its.n, its.replicates) == (8, 24)
        hits += its.low <= 0 <= its.high
        low, high = interval(list(scores.values()))
        naive += low <= 0 <= high
    assert abs(far(hits, draws, 0.95)) < 4
    assert far(naive, draws, 0.95) < -10  # what counting every seed as independent would claim


def test_one_score_says_nothing_of_the_mean() -> None:
    assert interval([0.5]) == interval([0.5], draws=2000) == (-math.inf, math.inf)
    assert (summary([0.5]).n, summary([0.5]).sd) == (1, 0.0)
    assert p_different([0.5]) == p_equivalent([0.5], 1.0) == 1.0


@given(strategies.lists(strategies.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=12))
def test_p_values_are_scipys_and_agree_with_the_interval(values: list[float]) -> None:
    if len(set(values)) == 1:
        assert p_different(values) == (1.0 if values[0] == 0 else 0.0)
        return
    low, high = interval(values)
    wanted = stats.ttest_1samp(values, 0.0).pvalue
    assert p_different(values) == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    if abs(wanted - 0.05) > 1e-6:
        assert (p_different(values) < 0.05) == (not low <= 0 <= high)
    sides = [
        stats.ttest_1samp(values, side, alternative=kind).pvalue for side, kind in ((-0.5, "greater"), (0.5, "less"))
    ]
    assert p_equivalent(values, 0.5) == pytest.approx(max(sides), rel=1e-6, abs=1e-9)


@given(strategies.lists(strategies.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_step_down_procedure(ps: list[float]) -> None:
    adjusted = holm(ps)
    assert all(one >= p for one, p in zip(adjusted, ps, strict=True))
    left = sorted(range(len(ps)), key=ps.__getitem__)
    rejected = set()
    for rank, place in enumerate(left):
        if ps[place] > 0.05 / (len(ps) - rank):
            break
        rejected.add(place)
    ours = {place for place, p in enumerate(adjusted) if p <= 0.05}
    assert ours == rejected or any(abs(adjusted[place] - 0.05) < 1e-12 for place in ours ^ rejected)


def drawn(
    draw: np.random.Generator, n: int, means: list[float]
) -> list[tuple[str, dict[int, float], dict[int, float], float]]:
    """Contrasts of these means against one common reference, margin 1, differences of standard deviation 1.4."""
    base = dict(enumerate(draw.normal(0, 1, n)))
    return [(f"c{k}", dict(enumerate(draw.normal(mean, 1, n))), base, 1.0) for k, mean in enumerate(means)]


@pytest.mark.parametrize(("mean", "wrong"), [(0.0, ("higher", "lower")), (1.0, ("equivalent", "within"))])
def test_a_study_is_wrong_about_any_contrast_as_often_as_stated(mean: float, wrong: tuple[str, str]) -> None:
    draw, draws, errors = np.random.default_rng(11), 600, 0
    for _ in range(draws):
        words = [its.word for its in findings(drawn(draw, 12, [mean] * 6))]
        errors += any(word.startswith(wrong) or "margin" in word for word in words)
    assert far(errors, draws, 0.05) < 3


def test_large_effects_are_found_and_small_ones_called_equivalent() -> None:
    draw = np.random.default_rng(12)
    found = findings(drawn(draw, 100, [5.0, -5.0, 0.0]))
    assert [its.word for its in found] == ["higher", "lower", "equivalent"]
    assert found[0].summary is not None
    assert found[0].summary.n == 100
    small = {k: 0.2 + 0.01 * (k % 3) for k in range(12)}
    (its,) = findings([("small", small, dict.fromkeys(range(12), 0.0), 1.0)])
    assert its.word == "higher by less than the margin"


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_no_verdict_under_eight_observations(n: int) -> None:
    sure = {k: 10.0 + 0.01 * k for k in range(n)}
    (found,) = findings([("sure", sure, dict.fromkeys(sure, 0.0), 1.0)])
    assert found.word == ""
    spread = {f"b{k % n}/{k}": 10.0 + 0.01 * k for k in range(16)}  # many replicates of few backbones
    (found,) = findings([("sure", spread, dict.fromkeys(spread, 0.0), 1.0)])
    assert found.word == ""
    assert findings([("apart", {0: 1.0}, {1: 1.0}, 1.0)])[0].summary is None


def test_paired_differences_use_shared_replicates_alone() -> None:
    found = paired({0: 0.5, 1: 0.7, 2: 0.9}, {1: 0.6, 2: 0.7, 3: 0.0})
    assert found is not None
    assert found.n == 2
    assert found.mean == pytest.approx(0.15)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_variance_between_methods_and_its_ratio() -> None:
    draw = np.random.default_rng(13)
    wide = [{f"{b}/0": float(v) for b, v in enumerate(draw.normal(0, 2, 8))} for _ in range(40)]
    narrow = [{f"{b}/0": float(v) for b, v in enumerate(draw.normal(0, 1, 8))} for _ in range(40)]
    found = variance_between(wide)
    assert list(found) == [str(b) for b in range(8)]
    assert found["3"] == pytest.approx(np.var([scores["3/0"] for scores in wide], ddof=1))
    ratio = variance_ratio(wide, narrow)
    assert ratio is not None
    assert ratio.low < 4 < ratio.high
    assert 2.5 < ratio.mean < 6
    assert variance_ratio(wide, [{"9/0": 1.0}, {"9/0": 2.0}]) is None


def test_best_under_is_the_maximum_below_every_budget() -> None:
    draw = np.random.default_rng(3)
    points = [
        (int(size), float(score)) for size, score in zip(draw.integers(1, 50, 20), draw.random(20), strict=True)
    ]
    curve = best_under(points)
    for budget in range(1, 60):
        under = [score for size, score in points if size <= budget]
        steps = [score for size, score in curve if size <= budget]
        assert (steps[-1] if steps else None) == (max(under) if under else None)


def test_metrics_are_scikit_learns() -> None:
    learn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(4)
    guesses, labels = draw.integers(0, 2, 50).tolist(), draw.integers(0, 2, 50).tolist()
    assert metric("accuracy", guesses, labels) == pytest.approx(learn.accuracy_score(labels, guesses))
    assert metric("f1", guesses, labels) == pytest.approx(learn.f1_score(labels, guesses))
    assert metric("matthews", guesses, labels) == pytest.approx(learn.matthews_corrcoef(labels, guesses))
    assert metric("matthews", [1, 1], [0, 1]) == 0.0


POINTS = [
    point("LoRA", 100, {0: 0.5, 1: 0.6}),
    point("LoRA", 200, {0: 0.6, 1: 0.7}),
    point("CP", 95, {0: 0.4, 1: 0.7}),
    point("CP", 150, {0: 0.7, 1: 0.8}),
    point("no adapter", 0, {0: 0.2, 1: 0.2}, kind="none"),
]


def test_tables_read_back() -> None:
    rows = tables.results_table(POINTS)
    back = list(csv.DictReader(io.StringIO(Table.of(rows).csv())))
    assert [row["mean"] for row in back] == ["0.5500", "0.6500", "0.5500", "0.7500", "0.2000"]
    assert Table.of(rows).markdown().count("\n") == len(rows) + 1
    assert Table.of(rows).latex().count(r"\\") == len(rows) + 1
    assert "seeds" in rows[0]
    assert {row["method"]: row["sizes tested"] for row in tables.curve_table(POINTS)} == {"LoRA": 2, "CP": 2}
    assert not {"policy", "dof", "relative step", "loss"} & set(rows[0])
    full = [replace(p, policy="P1", dof=p.parameters - 1, step=0.01, losses=p.scores) for p in POINTS]
    assert {"policy", "dof", "relative step", "loss"} <= set(tables.results_table(full)[0])


def test_figures_are_written_and_repeat(tmp_path: Path) -> None:
    for name in "ab":
        figures.budget_figure(POINTS, tmp_path / name, reference="LoRA")
    for end in (".png", ".pdf", ".svg"):
        one, two = ((tmp_path / name).with_suffix(end).read_bytes() for name in "ab")
        assert len(one) > 5000
        assert one == two


@pytest.mark.parametrize("metric_of_task", figures.METRIC)
@pytest.mark.parametrize("draw", [figures.budget_figure, figures.ranked_figure])
def test_axes_are_named_by_the_metric_of_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric_of_task: str, draw: Any
) -> None:
    named: list[str] = []

    def look(figure: Any, path: Path) -> None:
        named.extend(text for axis in figure.axes for text in (axis.get_ylabel(), axis.get_xlabel()))

    monkeypatch.setattr(figures, "save", look)
    both = [replace(p, task="other", metric="f1") for p in POINTS[:2]]
    draw([*(replace(p, metric=metric_of_task) for p in POINTS), *both], tmp_path / "a")
    for name in (metric_of_task, "f1"):
        assert any(text.startswith(figures.METRIC[name]) for text in named)
    if metric_of_task != "accuracy":
        assert not any("ccuracy" in text for text in named)


def test_a_family_keeps_its_look_under_every_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, tuple[Any, ...]] = {}

    def look(figure: Any, path: Path) -> None:
        for bars, label in zip(*figure.axes[0].get_legend_handles_labels(), strict=True):
            line = bars[0] if isinstance(bars, tuple) else bars
            drawn[label] = (line.get_color(), line.get_marker(), line.get_linestyle())

    monkeypatch.setattr(figures, "save", look)
    points = [replace(p, policy=policy) for policy in ("own step", "one rate") for p in POINTS]
    figures.budget_figure(points, tmp_path / "a")
    for label in ("LoRA", "CP"):
        assert drawn[label][:2] == drawn[f"{label}, one rate"][:2] == figures.style(label)
        assert (drawn[label][2], drawn[f"{label}, one rate"][2]) == ("-", "--")


def test_a_family_has_one_look_in_every_figure() -> None:
    looks = {figures.style(label, others) for label in ["CP"] for others in ([], ["CP"], ["mine", "CP"])}
    assert len(looks) == 1
    labels = [*figures.FAMILIES, "mine", "yours"]
    assert len({figures.style(label, labels) for label in labels}) == len(labels)


def studied(policy: str, spread: float) -> list[Point]:
    draw = np.random.default_rng(len(policy))
    tried = [{"value": 10.0**-k, "lr": 10.0**-k / 2, "loss": 1.0 + (k - 2) ** 2, "score": 0.5} for k in range(1, 5)]
    tried += [{"value": 10.0, "lr": 1.0, "loss": None, "score": 0.1}]
    return [
        Point(
            "sst2", label, "rank=2", "family", 2048, 0, 1e-2, False, {}, {}, {},
            {f"b{k}/0": 1.0 + spread * place + 0.01 * draw.normal() for k in range(8)},
            policy, 2016, 1e-2, tuple(tried),
        )
        for place, label in enumerate(("LoRA", "MoSLoRA", "CP"))
    ]  # fmt: skip


def test_variances_contrasts_and_searches_are_shown(tmp_path: Path) -> None:
    points = [*studied("P0", 1.0), *studied("P21", 0.1)]
    points = [replace(p, scores=p.losses) for p in points]
    rows = tables.variance_table(points, ["LoRA", "MoSLoRA"])
    assert [row["policy"] for row in rows] == ["P0", "P21"]
    assert 0.005 < float(rows[1]["families, over the first policy's"]) < 0.02
    assert tables.variance_table(points[:3], ["LoRA", "MoSLoRA"]) == []
    common = {"measure": "loss", "task": "sst2"}
    declared = [
        {"name": "CP", "plus": "P0: CP (rank=2)", "minus": "P0: LoRA (rank=2)", "margin": 0.5, **common},
        {"name": "same", "plus": "P21: MoSLoRA (rank=2)", "minus": "P21: LoRA (rank=2)", "margin": 0.5, **common},
        {"name": "gone", "plus": "P9: CP", "minus": "P0: LoRA (rank=2)", "margin": 0.5, **common},
    ]
    found = tables.contrasts(points, declared)
    assert [row["verdict"] for row in tables.contrasts_table(found, declared)] == [
        "higher",
        "higher by less than the margin",
        "",
    ]
    assert tables.contrasts_table(found, declared)[2]["difference"] == "not run"
    figures.variance_figure(points, tmp_path / "variance", ["LoRA", "MoSLoRA"])
    figures.rates_figure(points[:3], tmp_path / "rates")
    figures.forest_figure(found, tmp_path / "forest")
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 9
    assert min(sizes) > 5000


def test_points_come_back_from_their_tables() -> None:
    for p in (*POINTS, *studied("P0", 1.0)):
        back = Point.of(json.loads(json.dumps(p.table, allow_nan=False)))
        by_text = {str(key): value for key, value in p.scores.items()}
        assert replace(back, scores=p.scores, dev=p.dev, search=p.search) == p
        assert back.scores == by_text
        assert back.search == p.search


# Machado, Oliveira and Fernandes (2009), severity 1: what each kind of colour blindness makes of linear RGB.
SIGHTS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", SIGHTS)
def test_colours_stay_apart_for_the_colour_blind(kind: str) -> None:
    srgb = np.array([[int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)] for colour in figures.COLOURS])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = [lab(colour) for colour in np.clip(linear @ np.array(SIGHTS[kind]).T, 0, 1)]
    apart = [np.linalg.norm(a - b) for k, a in enumerate(seen) for b in seen[k + 1 :]]
    assert min(apart) > 10  # a difference of 2.3 in CIELAB is just noticeable


def lab(linear: np.ndarray) -> np.ndarray:
    """CIELAB of a colour in linear RGB, white as D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    ratio = xyz / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def tabular(text: str) -> list[list[str]]:
    """The cells of a LaTeX tabular, read as TeX would: what is not escaped is special."""
    columns = re.match(r"\\begin\{tabular\}\{([rl]+)\}\n\\toprule\n", text)
    assert columns
    body, end, rest = text[columns.end() :].partition("\n\\bottomrule\n\\end{tabular}")
    assert (bool(end), rest, body.count("\n\\midrule\n")) == (True, "", 1)
    rows = []
    for line in re.split(r" \\\\(?:\n|$)", body.replace("\n\\midrule\n", "\n"))[:-1]:
        tokens = re.findall(r"\\[a-zA-Z]+\{\}|\\[%&_#${}]|[^\\]", line.replace("\n", " "))
        assert len("".join(tokens)) == len(line)
        assert not {*tokens} & {*"%_#$^~{}|<>"}
        cells = "".join("\0" if token == "&" else token for token in tokens).split("\0")
        assert len(cells) == len(columns[1])
        rows.append([cell.strip() for cell in cells])
    return rows


NAMES = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textbar": "|", "textless": "<"}
NAMES |= {"textgreater": ">", "textpm": "±", "texttimes": "×"}


@given(
    strategies.lists(
        strategies.tuples(strategies.text(alphabet=r"ab \{}$&#_%^~|<>±×01.,-()=", max_size=12)), min_size=1
    )
)
def test_latex_holds_any_text(cells: list[tuple[str]]) -> None:
    found = tabular(Table.of({"name": text, "n_%": 5} for (text,) in cells).latex())
    assert found[0] == ["name", r"n\_\%"]
    for (text,), (cell, number) in zip(cells, found[1:], strict=True):
        back = re.sub(r"\\([a-zA-Z]+)\{\}", lambda match: NAMES[match[1]], re.sub(r"\\([%&_#${}])", r"\1", cell))
        assert back == text.strip()
        assert number == "5"


def test_the_tables_of_the_paper_are_latex() -> None:
    files = sorted((Path(__file__).resolve().parents[2] / "paper" / "tables").glob("*.tex"))
    assert files
    for path in files:
        assert len(tabular(path.read_text().strip())) > 1, path.name


def test_further_metrics_have_a_table_of_their_own() -> None:
    assert tables.metrics_table(POINTS) == []
    also = {"f1": {0: 0.5, 1: 0.7}, "matthews": {0: 0.25}}
    rows = tables.metrics_table([*POINTS, replace(POINTS[0], task="mrpc", also=also)])
    assert [(row["task"], row["metric"], row["seeds"], row["mean"], row["sd"]) for row in rows] == [
        ("mrpc", "f1", 2, "0.6000", "0.1414"),
        ("mrpc", "matthews", 1, "0.2500", ""),
    ]


def test_a_ladder_under_two_policies_is_drawn(tmp_path: Path) -> None:
    points = [replace(p, policy=policy, size=f"rank={p.parameters}") for policy in ("own", "one") for p in POINTS]
    facts = {"name": "two", "title": "", "reference": "LoRA", "seeds": [0, 1], "points": [p.table for p in points]}
    render(facts, tmp_path)
    assert (tmp_path / "two.png").exists()
