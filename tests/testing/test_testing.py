"""The tester tested: strategies draw what they promise, the oracle agrees with others, and check can fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import opt_einsum
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnpeft
from tnpeft import Factorization, Network, NetworkError, Site, network
from tnpeft.networks.sizes import bind
from tnpeft.testing import (
    brute,
    check,
    examine,
    factors_for,
    jacobian_rank,
    networks,
    random_factors,
    sizes_for,
    tolerance,
)

LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"

# ---- what is drawn


def test_drawn_networks_have_every_feature() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=400, database=None)
    @given(networks(tied=True, twins=True), st.data())
    def look(net: Network, data: st.DataObject) -> None:
        sizes = data.draw(sizes_for(net))
        uses = list(net.uses())
        seen.update(
            name
            for name, present in {
                "sum": len(net.terms) > 1,
                "difference": any(term.sign < 0 for term in net.terms),
                "six factors": len(uses) == 6,
                "one factor": len(uses) == 1,
                "hyper": net.hyper,
                "batch": net.batch,
                "group": len(net.rows) > 1,
                "stack": net.stack,
                "broadcast": any(set(net.stack) - set(term.places()) for term in net.terms),
                "scalar": any(not factor.indices for factor in uses),
                "frozen": any(factor.kind == "frozen" for factor in uses),
                "constant": any(factor.kind == "constant" for factor in uses),
                "tied": len(uses) > len(net.factors),
                "twin": any(net.label(factor).startswith("~") for factor in net.factors),
                "size 1": 1 in sizes.values(),
                "size above 1": max(sizes.values()) > 1,
            }.items()
            if present
        )
        assert len(uses) <= 6
        assert any(factor.kind == "trainable" for factor in uses)

    look()
    assert len(seen) == 16
    assert min(seen.values()) >= 8, seen


@given(networks(max_factors=3, max_terms=1, stack=(), kinds=("trainable",)))
def test_the_strategy_keeps_its_limits(net: Network) -> None:
    assert len(list(net.uses())) <= 3
    assert (len(net.terms), net.stack) == (1, ())
    assert {factor.kind for factor in net.factors} == {"trainable"}


# ---- the oracle


@given(networks(tied=True, twins=True), st.data())
def test_brute_force_agrees_with_another_contraction(net: Network, data: st.DataObject) -> None:
    sizes = data.draw(sizes_for(net))
    factors = data.draw(factors_for(net, sizes))
    letters = {index: opt_einsum.get_symbol(k) for k, index in enumerate(net.indices)}
    total: Any = np.zeros([sizes[i] for i in net.outer])
    for term in net.terms:
        carried = [i for i in net.outer if term.places()[i]]
        left = ",".join("".join(letters[i] for i in factor.indices) for factor in term.factors)
        arrays = [factors[net.label(factor)] for factor in term.factors]
        part = opt_einsum.contract(f"{left}->{''.join(letters[i] for i in carried)}", *arrays, optimize="greedy")
        total = total + term.sign * np.reshape(part, [sizes[i] if i in carried else 1 for i in net.outer])
    got = brute(net, factors)
    allowed = tolerance(net, sizes) * brute(net, factors, absolute=True)
    assert (np.abs(total.reshape(got.shape) - got) <= allowed).all()


def test_brute_force_of_a_twin_is_zero_at_the_start() -> None:
    net = network("G[o1 i1 u] H[u o2 i2] - ~G[o1 i1 u] ~H[u o2 i2] -> (o1 o2) (i1 i2)")
    factors = random_factors(net, {"o1": 2, "i1": 3, "u": 2, "o2": 2, "i2": 2})
    assert not brute(net, {**factors, "~G": factors["G"], "~H": factors["H"]}).any()


@pytest.mark.parametrize(
    ("line", "sizes", "rank"),
    [
        ("B[out r] A[r inp] -> out inp", {"out": 5, "r": 2, "inp": 4}, 2 * (5 + 4 - 2)),
        ("B[out r] ~A[r inp] -> out inp", {"out": 5, "r": 2, "inp": 4}, 10),
        ("U[out a] U[inp a] -> out inp", {"out": 4, "a": 2, "inp": 4}, 2 * 4 - 1),
        ("A[out inp] + B[out inp] -> out inp", {"out": 3, "inp": 2}, 6),
        ("A[out] B[inp] s[] -> out inp", {"out": 3, "inp": 4}, 6),
        ("~A[out inp] -> out inp", {"out": 3, "inp": 4}, 0),
    ],
)
def test_jacobian_rank(line: str, sizes: dict[str, int], rank: int) -> None:
    assert jacobian_rank(network(line), sizes) == rank


def test_jacobian_rank_of_a_factorization_uses_its_ranks() -> None:
    f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 1})
    assert jacobian_rank(f, out=3, inp=4) == 6
    with pytest.raises(NetworkError, match="no size for 'inp'"):
        jacobian_rank(f, out=3)


# ---- check: passes what is right


@pytest.mark.parametrize(
    "line",
    [
        LORA,
        "w[r] U[out r] V[inp r] -> out inp",
        "b[layer out] ~B[out r] d[layer r] ~A[r inp] -> layer out inp",
        "^W0[out inp] v[inp] + A[out inp] -> out inp",
        "A[replica out r] B[replica r inp] -> replica out inp",
        "G[o1 i1 u] H[u o2 i2] - ~G[o1 i1 u] ~H[u o2 i2] -> (o1 o2) (i1 i2)",
        "U[out a] S[a] U[inp a] -> out inp",
        "A[head dim r] B[r inp] -> (head dim) inp",
    ],
)
def test_check_passes_networks_of_many_kinds(line: str) -> None:
    report = check(line)
    assert report.passed
    assert len(report.findings) == 6
    assert all(finding.passed for finding in report.findings)


@settings(max_examples=25)
@given(networks(twins=True), st.data())
def test_check_passes_drawn_networks(net: Network, data: st.DataObject) -> None:
    report = examine(net, data.draw(sizes_for(net)))
    wrong = [finding.name for finding in report.findings if finding.passed is False]
    assert set(wrong) <= {"not a dead start"}, str(report)  # size 1 may leave a drawn factor without effect


@pytest.mark.parametrize("name", ["lora", "cp", "quanta", "ia3", "randlora", "lotra", "c3a"])
def test_check_passes_families(name: str) -> None:
    assert check(tnpeft.families.get(name)()).passed


def test_check_takes_sizes_and_sites() -> None:
    assert "22 counted" in str(check("B[out r] A[r inp] -> out inp", out=5, inp=6))
    assert "40 counted" in str(check("B[out r] A[r inp] -> out inp", {"out": 4, "inp": 4}, r=5))
    f = Factorization.of("B[layer out r] A[layer r inp] -> layer out inp", ranks={"r": 3})
    assert "102 counted" in str(check(f, sites=[Site(0, "q_proj", 10, 7)]))
    with pytest.raises(NetworkError, match="tried at sites, not at sizes"):
        check(f, out=4)
    with pytest.raises(NetworkError, match="unknown index 'q'"):
        check("B[out r] A[r inp] -> out inp", q=4)
    with pytest.raises(NetworkError, match="no rows and columns"):
        check("v[out] -> out")


def test_a_report_prints_and_is_plain_data() -> None:
    report = check("A[out inp] -> out inp", out=2, inp=3)
    rows = str(report).splitlines()
    assert rows[0] == "A[out inp] -> out inp"
    assert all(row.startswith("  ok ") for row in rows[1:])
    assert report.as_dict()["passed"] is True


def test_what_cannot_be_asked_is_said() -> None:
    report = check("G[basis out a] U[a inp] -> basis out inp")
    assert [finding.passed for finding in report.findings] == [True] * 4 + [None] * 2
    assert report.passed


# ---- check: each property can fail


def _wrong_dense(net: Network, factors: Any) -> Any:
    return brute(net, factors) * (1 + 1e-9)


class _WrongProgram:
    """A program whose update is not what the line says, or whose factor gets no gradient."""

    def __init__(self, program: Any, fault: str) -> None:
        self.program, self.labels, self.fault = program, program.labels, fault

    def __call__(self, x: Any, operands: Any, base: Any = None, scale: float = 1.0) -> Any:
        if self.fault == "scale":
            return self.program(x, operands, base=base, scale=1.0)
        return self.program(x, [operands[0].detach(), *operands[1:]], base=base, scale=scale)


def _wrong_program(fault: str) -> Callable[..., Any]:
    from tnpeft.nn.executor.program import program

    return lambda *args, **kwargs: _WrongProgram(program(*args, **kwargs), fault)


class _WrongStarter:
    """Start values all ones, or all zeros."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, *_: Any) -> Any:
        import torch

        return lambda piece: torch.full(piece.shape, self.value)


@pytest.mark.parametrize(
    ("target", "wrong", "finding", "detail"),
    [
        ("tnpeft.nn.dense", _wrong_dense, "contraction equals brute force", "dense:"),
        ("tnpeft.nn.executor.program.program", "scale", "contraction equals brute force", "plan "),
        ("tnpeft.nn.executor.program.program", "detach", "gradient equals the numerical one", "factor 'B'"),
        ("tnpeft.counting.parameters", lambda *_: 21, "count equals the stored elements", "21 counted, 22 stored"),
        ("tnpeft.counting.rank_bound", lambda *_: 1, "rank within its bound", "rank 2, bound 1"),
        (
            "tnpeft.nn.init.initializer.Initializer",
            _WrongStarter(1.0),
            "starts as declared",
            "the largest entry of the update is 2",
        ),
        (
            "tnpeft.nn.init.initializer.Initializer",
            _WrongStarter(0.0),
            "not a dead start",
            "no gradient reaches any factor",
        ),
    ],
)
def test_every_property_can_fail(
    target: str, wrong: Any, finding: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "B[out r] A[r inp] -> out inp"
    check(line)
    monkeypatch.setattr(target, _wrong_program(wrong) if isinstance(wrong, str) else wrong)
    failed = [each for each in examine(line).findings if each.passed is False]
    assert [each.name for each in failed] == [finding]
    assert failed[0].detail.startswith(detail)
    with pytest.raises(AssertionError, match=f"FAILED  {finding}"):
        check(line)


def test_a_factor_that_never_moves_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def starter(*_: Any) -> Callable[[Any], Any]:
        return lambda piece: torch.full(piece.shape, float(piece.label == "A"))

    monkeypatch.setattr("tnpeft.nn.init.initializer.Initializer", starter)
    report = examine("B[out r] A[r inp] + D[out s] C[s inp] -> out inp")
    assert [each.name for each in report.findings if each.passed is False] == ["not a dead start"]
    assert report.findings[-1].detail == "no gradient ever reaches D, C"


def test_a_start_away_from_zero_passes_only_if_declared() -> None:
    declared = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2}, init={"B": "ones", "A": "normal(1)"})
    finding = examine(declared).findings[4]
    assert finding.passed
    assert finding.detail.startswith("declared: no factor of term 1 is zero")


@settings(max_examples=50)
@given(networks(), st.data())
def test_tolerance_is_above_the_rounding_of_single_precision(net: Network, data: st.DataObject) -> None:
    sizes = data.draw(sizes_for(net))
    factors = data.draw(factors_for(net, sizes))
    low = {label: array.astype(np.float32) for label, array in factors.items()}
    exact = brute(net, {label: array.astype(np.float64) for label, array in low.items()})
    scale = brute(net, {label: array.astype(np.float64) for label, array in low.items()}, absolute=True)
    assert bind(net, sizes, {}) == sizes
    assert (np.abs(brute(net, low) - exact) <= tolerance(net, sizes, np.float32) * scale).all()


def test_a_kernel_written_by_hand_agrees_with_its_line_or_is_refused() -> None:
    line = "A[out r] B[dim r] H[head r] P[layer r] -> layer out (head dim)"

    def kernel(f: Any, wrong: float = 0.0) -> Any:
        right = np.einsum("hr,dr->rhd", f["H"], f["B"]).reshape(f["A"].shape[1], -1)
        return np.stack([(f["A"] * row) @ right for row in f["P"]]) * (1 + wrong)

    assert tnpeft.testing.agrees(line, kernel) < 1e-13
    assert tnpeft.testing.agrees(line, kernel, out=7, head=3, seed=1) < 1e-13
    with pytest.raises(AssertionError, match=r"largest relative error 1\.0e-09, rounding allows .*, at out=5"):
        tnpeft.testing.agrees(line, lambda f: kernel(f, 1e-9))
    with pytest.raises(AssertionError, match=r"returns the shape \(5, 30\), the line \(2, 5, 30\)"):
        tnpeft.testing.agrees(line, lambda f: kernel(f)[0])
    with pytest.raises(AssertionError, match="largest relative error nan"):
        tnpeft.testing.agrees(line, lambda f: kernel(f) * np.nan)
