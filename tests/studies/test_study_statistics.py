"""Statistics, tables and figures, against numpy, scipy and hand-made cases."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from tnpeft.studies import figures, tables
from tnpeft.studies.results import Point, nearest
from tnpeft.studies.scoring import metric
from tnpeft.studies.statistics import best_under, interval, paired, summary


def point(label: str, parameters: int, scores: dict[int, float], task: str = "sst2", kind: str = "family") -> Point:
    return Point(task, label, f"rank={parameters}", kind, parameters, 0, 1e-3, False, scores, scores)


def test_summary_is_numpys() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 30)
    found = summary(list(values))
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.sd == pytest.approx(values.std(ddof=1), rel=1e-12)


def test_the_interval_covers_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = interval(list(draw.normal(0, 1, 40)), draws=400)
        hits += low <= 0 <= high
    # binomial(200, 0.95) lies above 176 with probability 0.9998; the percentile bootstrap at n = 40 covers about 0.94
    assert hits > 176


def test_the_interval_is_the_normal_ones_for_many_scores_and_repeats() -> None:
    values = list(np.random.default_rng(2).normal(0, 1, 400))
    low, high = interval(values)
    half = 1.96 * np.std(values) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.01)
    assert high == pytest.approx(np.mean(values) + half, abs=0.01)
    assert interval(values) == (low, high)


def test_paired_differences_use_shared_seeds_alone() -> None:
    found = paired({0: 0.5, 1: 0.7, 2: 0.9}, {1: 0.6, 2: 0.7, 3: 0.0})
    assert found is not None
    assert found.n == 2
    assert found.mean == pytest.approx(0.15)
    assert paired({0: 1.0}, {1: 1.0}) is None


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


def test_matched_table_pairs_what_is_near_and_only_that() -> None:
    rows = tables.matched_table(POINTS, "LoRA")
    assert [(row["reference"], row["method"]) for row in rows] == [("LoRA (rank=100)", "CP (rank=95)")]
    assert rows[0]["difference"] == "+0.0000"
    assert rows[0]["shared seeds"] == 2
    assert nearest(POINTS[2:4], 200) is None


def test_tables_read_back() -> None:
    rows = tables.results_table(POINTS)
    back = list(csv.DictReader(io.StringIO(tables.as_csv(rows))))
    assert [row["mean"] for row in back] == ["0.5500", "0.6500", "0.5500", "0.7500", "0.2000"]
    assert tables.markdown(rows).count("\n") == len(rows) + 1
    assert tables.latex(rows).count(r"\\") == len(rows) + 1
    assert "seeds" in rows[0]
    assert {row["method"]: row["sizes tested"] for row in tables.curve_table(POINTS)} == {"LoRA": 2, "CP": 2}


def test_figures_are_written_and_repeat(tmp_path: Path) -> None:
    first = figures.budget_figure(POINTS, tmp_path / "a", reference="LoRA")
    second = figures.budget_figure(POINTS, tmp_path / "b", reference="LoRA")
    assert [path.suffix for path in first] == [".png", ".pdf", ".svg"]
    for one, two in zip(first, second, strict=True):
        assert one.stat().st_size > 5000
        assert one.read_bytes() == two.read_bytes()
    assert len(figures.curve_figure(POINTS, tmp_path / "c")) == 3


def test_colours_differ_for_red_green_blindness() -> None:
    """Machado's matrix for deuteranopia: the first six colours stay apart."""
    sight = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    seen = [sight @ [int(c[k : k + 2], 16) / 255 for k in (1, 3, 5)] for c in figures.COLOURS[:6]]
    apart = [np.linalg.norm(a - b) for k, a in enumerate(seen) for b in seen[k + 1 :]]
    assert min(apart) > 0.08
