"""Fitting a network to a dense tensor: planted solutions, known optima, sums, and what cannot be fitted."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense

import tnpeft
from tnpeft.nn import least_squares
from tnpeft.nn.fit import _Solver, fit
from tnpeft.nn.init.philox import normal

TT = "g1[x a] g2[a y b] g3[b z c] g4[c u] -> (x y) (z u)"
RING = "g1[z o1 a] g2[a o2 b] g3[b i1 c] g4[c i2 z] -> (o1 o2) (i1 i2)"
CP5 = "w[l r] A[o1 r] B[o2 r] C[i1 r] D[i2 r] -> l (o1 o2) (i1 i2)"
PLANTED = {
    "tucker": ("G[a b c] U[x a] V[y b] W[z c] -> x y z", {"a": 3, "b": 4, "c": 2, "x": 8, "y": 9, "z": 7}),
    "tensor train": (TT, {"a": 3, "b": 4, "c": 3, "x": 5, "y": 6, "z": 5, "u": 4}),
    "cp": ("A[x r] B[y r] C[z r] -> x y z", {"r": 4, "x": 8, "y": 9, "z": 7}),
    "lora per layer": ("B[l o r] A[l r i] -> l o i", {"l": 4, "o": 12, "i": 10, "r": 3}),
    "cp over five modes": (CP5, {"l": 4, "r": 3, "o1": 4, "o2": 5, "i1": 4, "i2": 5}),
    "ring": (RING, {"z": 2, "a": 3, "b": 2, "c": 3, "o1": 5, "o2": 6, "i1": 5, "i2": 4}),
    "kronecker": ("C[o1 i1] K[o2 i2] -> (o1 o2) (i1 i2)", {"o1": 4, "o2": 5, "i1": 3, "i2": 6}),
    "loha": ("B1[o r] A1[r i] B2[o s] A2[s i] -> o i", {"o": 24, "i": 20, "r": 2, "s": 2}),
    "sum": ("B[o r] A[r i] - w[o] V[o s] U[s i] d[i] -> o i", {"o": 12, "i": 10, "r": 2, "s": 2}),
    "broadcast sum": ("B[l o r] A[l r i] + S[o s] T[s i] -> l o i", {"l": 4, "o": 12, "i": 10, "r": 2, "s": 3}),
    "one factor": ("D[o i] -> o i", {"o": 4, "i": 3}),
}


def planted(line: str, sizes: dict[str, int], seed: int = 5) -> tuple[tnpeft.Network, dict, np.ndarray]:
    """A network, random factors and their dense tensor."""
    net = tnpeft.network(line)
    factors = {}
    for factor in net.factors:
        shape = [sizes[index] for index in factor.indices]
        factors[net.label(factor)] = normal(int(np.prod(shape)), seed, net.label(factor)).reshape(shape)
    return net, factors, dense(net, factors)


def distance(found: np.ndarray, target: np.ndarray) -> float:
    return float(np.linalg.norm(found - target) / np.linalg.norm(target))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_solutions_are_found(name):
    line, sizes = PLANTED[name]
    net, _, target = planted(line, sizes)
    result = fit(net, target, sizes, restarts=40)
    assert result.error <= 1e-12
    assert distance(dense(net, result.factors), target) <= 2e-12
    assert all(value.dtype == np.float64 for value in result.factors.values())


def test_indices_shared_with_the_rest_and_kept_are_separate_problems():
    """Each layer's LoRA of its own full matrix is that matrix's truncated SVD."""
    target = normal(3 * 12 * 9, 1, "T").reshape(3, 12, 9)
    result = fit(tnpeft.network("B[l o r] A[l r i] -> l o i"), target, r=2)
    tail = np.linalg.svd(target, compute_uv=False)[:, 2:]
    assert abs(result.error * np.linalg.norm(target) - np.linalg.norm(tail)) < 1e-5


def test_a_term_without_the_stack_index_fits_the_mean():
    target = normal(3 * 4 * 5, 2, "T").reshape(3, 4, 5)
    result = fit(
        tnpeft.network("w[l] D[o i] + M[o i] -> l o i"), target, fixed={"w": np.zeros(3), "D": np.zeros((4, 5))}
    )
    assert np.allclose(result.factors["M"], target.mean(0))


def test_a_factorization_fills_the_sizes():
    f = tnpeft.Factorization.of(
        "C[layer o1 i1] P[layer o2 a] Q[layer a i2] -> layer (o1 o2) (i1 i2)", ranks={"a": 2}, splits={"out": (2, 6)}
    )
    sizes = {"layer": 2, "o1": 2, "o2": 6, "i1": 3, "i2": 5, "a": 2}
    net, _, target = planted(str(f.network), sizes)
    result = fit(f, target, i1=3, i2=5)
    assert result.error <= 1e-12
    assert result.factors["C"].shape == (2, 2, 3)
    assert distance(dense(net, result.factors), target) <= 2e-12


def test_frozen_factors_stay_and_are_asked_for():
    line = "b[o] ~B[o r] d[r] ~A[r i] -> o i"
    sizes = {"o": 9, "i": 8, "r": 3}
    net, factors, target = planted(line, sizes)
    held = {name: factors[name] for name in "AB"}
    result = fit(net, target, sizes, fixed=held)
    assert result.error <= 1e-12
    assert (result.factors["A"] == factors["A"]).all()
    with pytest.raises(tnpeft.NetworkError, match=r"the frozen factor 'B' has no value"):
        fit(net, target, sizes)
    with pytest.raises(tnpeft.NetworkError, match=r"shape \(3, 9\)"):
        fit(net, target, sizes, fixed={**held, "B": factors["B"].T})


def test_a_twin_is_fixed_and_its_factor_found():
    net, factors, target = planted("G[o a] H[a i] - ~G[o a] ~H[a i] -> o i", {"o": 7, "i": 6, "a": 2})
    held = {label: value for label, value in factors.items() if label.startswith("~")}
    result = fit(net, target, a=2, fixed=held)
    assert result.error <= 1e-12
    assert (result.factors["~G"] == factors["~G"]).all()


def test_without_the_matrix_the_same_solution(monkeypatch):
    line, sizes = PLANTED["lora per layer"]
    net, _, target = planted(line, sizes)
    monkeypatch.setattr(least_squares, "DENSE_LIMIT", 0)
    assert fit(net, target, sizes).error <= 1e-12
    one = fit(tnpeft.network("D[o] ^J[i] -> o i"), np.outer(np.arange(1.0, 4), np.ones(5)), fixed={"J": np.ones(5)})
    assert np.allclose(one.factors["D"], [1, 2, 3])


def test_a_large_core_does_not_need_its_matrix():
    """A 20 x 20 x 20 core against 30 x 30 x 30: its least-squares matrix would take 1.7 GB."""
    sizes = dict.fromkeys("abc", 20) | dict.fromkeys("xyz", 30)
    net, factors, _ = planted("G[a b c] U[x a] V[y b] W[z c] -> x y z", sizes)
    held = {name: np.linalg.qr(factors[name])[0] for name in "UVW"}
    started = time.perf_counter()
    result = fit(net, dense(net, {**held, "G": factors["G"]}), sizes, fixed=held)
    assert result.error <= 1e-12
    assert time.perf_counter() - started < 20
    assert distance(result.factors["G"], factors["G"]) < 1e-12


@pytest.mark.parametrize(
    ("line", "shape", "options", "text"),
    [
        ("A[o r] A[i r] -> o i", (3, 3), {"r": 2}, "'A' stands 2 times"),
        ("A[o r] B[r i] + A[o s] C[s i] -> o i", (3, 3), {"r": 2, "s": 2}, "'A' stands 2 times"),
        ("B[o r] A[r i] -> o i", (3, 3), {}, "no size for 'r'"),
        ("B[o r] A[r i] -> o i", (3, 3), {"r": 2, "q": 1}, "unknown index 'q'"),
        ("B[o r] A[r i] -> o i", (3, 3, 3), {"r": 2}, "3 axes, the output 2 groups"),
        ("B[o r] A[r i] -> o i", (3, 3), {"r": 2, "o": 4}, "the target 3"),
        ("B[o r] A[r i] -> o i", (3, 3), {"r": 2**63}, "entries"),
        ("B[o r] A[r i] -> o i", (3, 3), {"r": 2, "restarts": None}, "restarts is None"),
        ("B[o r] A[r i] -> o i", (3, 3), {"r": 2, "sweeps": 1.5}, "sweeps is 1.5"),
        ("B[o r] A[r i] -> o i", (3, 3), {"r": 2, "tolerance": "1e-6"}, "tolerance is '1e-6'"),
        ("B[o1 o2 r] A[r i] -> (o1 o2) i", (6, 3), {"r": 2}, "no size for 'o1', 'o2'"),
        ("B[o1 o2 r] A[r i] -> (o1 o2) i", (6, 3), {"r": 2, "o1": 4}, "the target 6"),
    ],
)
def test_what_cannot_be_fitted_is_refused(line, shape, options, text):
    with pytest.raises(tnpeft.NetworkError, match=text):
        fit(tnpeft.network(line), np.ones(shape), **options)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_target_without_direction_is_refused(value):
    with pytest.raises(tnpeft.NetworkError, match="zero or not finite"):
        fit(tnpeft.network("B[o r] A[r i] -> o i"), np.full((3, 3), value), r=1)


def test_the_same_call_gives_the_same_factors():
    line, sizes = PLANTED["cp"]
    net, _, target = planted(line, sizes)
    first, second = (fit(net, target, sizes, seed=3) for _ in range(2))
    assert all((first.factors[name] == second.factors[name]).all() for name in first.factors)


def test_a_list_is_a_target_and_text_is_no_network() -> None:
    assert fit(tnpeft.network("B[out r] A[r inp] -> out inp"), [[1.0, 2.0], [2.0, 4.0]], r=1).error < 1e-12
    with pytest.raises(tnpeft.NetworkError, match="expected a Network, got str"):
        fit("B[out r] A[r inp] -> out inp", np.ones((2, 2)), r=1)


@given(
    st.sampled_from([np.float16, np.float32, np.float64, np.longdouble, np.int32]),
    st.integers(-300, 300),
    st.sampled_from([(6, 7), (1, 7), (6, 1), (1, 1)]),
)
@settings(max_examples=60, deadline=None)
def test_a_target_of_any_scale_and_dtype_is_fitted_or_refused(dtype, power, shape):
    rng = np.random.default_rng(0)
    exact = rng.integers(1, 5, (shape[0], 1)) @ rng.integers(1, 5, (1, shape[1]))
    with np.errstate(all="ignore"):
        target = (exact * np.longdouble(10) ** power).astype(dtype)
    net = tnpeft.network("A[out r] B[r inp] -> out inp")
    try:
        found = fit(net, target, r=2, restarts=1)
    except tnpeft.NetworkError:
        info = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.finfo(dtype)
        assert 16 * 10.0**power > float(info.max) or not target.any() or dtype is np.longdouble
        return
    wanted = target.astype(np.float64)
    got = np.float64(found.factors["A"]) / np.abs(found.factors["A"]).max() @ np.float64(found.factors["B"])
    error = np.abs(got / np.abs(got).max() - wanted / np.abs(wanted).max()).max()
    assert error < 20 * max(np.finfo(found.factors["A"].dtype).eps, 1e-9)
    assert found.error < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_torch_targets_of_every_float_dtype(dtype):
    target = torch.outer(torch.arange(1, 5), torch.arange(1, 4)).to(dtype)
    found = fit(tnpeft.network("A[out r] B[r inp] -> out inp"), target, r=1)
    assert found.error < 1e-12
    assert {(type(value), value.dtype) for value in found.factors.values()} == {(torch.Tensor, dtype)}
    update = found.factors["A"].double() @ found.factors["B"].double()
    assert torch.allclose(update, target.double(), rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert "relative error" in str(found)


@pytest.mark.parametrize("target", [np.ones((2, 2), complex), torch.ones(2, 2, dtype=torch.complex64)])
def test_a_complex_target_is_refused(target):
    with pytest.raises(tnpeft.NetworkError, match="complex"):
        fit(tnpeft.network("A[out r] B[r inp] -> out inp"), target, r=1)


def test_every_term_takes_its_share_of_the_scale():
    target, held = np.random.default_rng(0).standard_normal((3, 4)) * 1e250, {"F": np.ones((3, 4))}
    found = fit(tnpeft.network("A[out r] B[r inp] - ^F[out inp] g[] -> out inp"), target, r=2, fixed=held)
    update = found.factors["A"] @ found.factors["B"] - found.factors["g"]
    assert np.linalg.norm((update - target) / 1e250) / np.linalg.norm(target / 1e250) == pytest.approx(found.error)
    with pytest.raises(tnpeft.NetworkError, match="cannot be scaled"):
        fit(tnpeft.network("A[out r] B[r inp] - ^F[out inp] -> out inp"), target, r=2, fixed=held)


STARTS = {
    "matrix": ("B[a r] A[r b] -> a b", {"r": 3}, (9, 8)),
    "train": ("G1[a p] G2[p b q] G3[q c] -> a b c", {"p": 3, "q": 2}, (5, 6, 4)),
    "groups, wide": (
        "G3[q i1 i2] G1[o1 p] G2[p o2 q] -> (o1 o2) (i1 i2)",
        {"o1": 4, "i1": 3, "p": 7, "q": 2},
        (12, 12),
    ),
    "tucker": ("U[p a] V[b q] G[q p s] W[c s] -> a b c", {"p": 7, "q": 3, "s": 2}, (5, 6, 4)),
    "cp": ("w[r] A[a r] B[r b] C[c r] -> a b c", {"r": 3}, (5, 6, 4)),
    "cp without weights": ("A[a r] B[r b] C[c r] -> a b c", {"r": 4}, (5, 6, 4)),
}


@pytest.mark.parametrize("name", STARTS)
def test_known_formats_start_from_their_decomposition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorLy's start alone is as near as the best of random ones, and holds before any sweep as TensorLy says."""
    line, ranks, shape = STARTS[name]
    net, target = tnpeft.network(line), np.random.default_rng(3).standard_normal(shape)
    found = tnpeft.fit(net, target, **ranks)
    monkeypatch.setattr(_Solver, "_decomposed", lambda self: iter(()))
    assert found.error <= tnpeft.fit(net, target, **ranks).error * (1 + 1e-6)
    if name == "matrix":
        values = np.linalg.svd(target, compute_uv=False)
        assert found.error == pytest.approx(np.linalg.norm(values[3:]) / np.linalg.norm(values), rel=1e-9)
        assert found.restarts == 1


def test_the_module_does_not_hide_the_function() -> None:
    import importlib

    importlib.import_module("tnpeft.nn.fit")
    vars(tnpeft).pop("fit", None)
    assert tnpeft.fit is fit
