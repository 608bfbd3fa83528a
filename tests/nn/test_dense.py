"""The dense tensor against unoptimised einsum over a thousand drawn networks, and against TensorLy."""

from __future__ import annotations

import subprocess
import sys
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnpeft import NetworkError, dense, network
from tnpeft.networks import Network
from tnpeft.nn.dense import evaluator
from tnpeft.planning.build import Builder
from tnpeft.planning.search import Path
from tnpeft.planning.steps import Plan
from tnpeft.testing import brute, networks, random_factors, sizes_for, tolerance

LORA = network("B[out r] A[r inp] -> out inp")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Network, dict[str, int]]:
    net = draw(networks(tied=True, twins=True))
    return net, draw(sizes_for(net))


@st.composite
def paths(draw: st.DrawFn, count: int) -> Path:
    ids, pairs = list(range(count)), []
    while len(ids) > 1:
        pair = sorted(draw(st.permutations(ids))[:2])
        pairs.append((pair[0], pair[1]))
        ids = [k for k in ids if k not in pair] + [count + len(pairs) - 1]
    return tuple(pairs)


def close(got: np.ndarray, net: Network, sizes: dict[str, int], factors: dict[str, np.ndarray]) -> bool:
    """Within rounding of brute force, and so within 1e-12, relative to the einsum of absolute values."""
    allowed = min(tolerance(net, sizes), 1e-12)
    exact = brute(net, factors)
    return got.shape == exact.shape and bool(
        (np.abs(got - exact) <= allowed * brute(net, factors, absolute=True)).all()
    )


@settings(max_examples=2000)
@given(cases(), st.integers(0, 2**32 - 1))
def test_dense_is_brute_force(case: tuple[Network, dict[str, int]], seed: int) -> None:
    net, sizes = case
    factors = random_factors(net, sizes, seed)
    assert close(dense(net, factors), net, sizes, factors)


@settings(max_examples=300)
@given(st.data(), cases())
def test_any_path_gives_the_same(data: st.DataObject, case: tuple[Network, dict[str, int]]) -> None:
    net, sizes = case
    factors = random_factors(net, sizes)
    builder = Builder(net, "").dense([data.draw(paths(len(term.factors))) for term in net.terms])
    steps = builder.with_costs(sizes, True)
    got = evaluator(Plan(net, tuple(sizes.items()), steps, "none", True, "dense", False))(factors)
    shape = tuple(sizes[index] for index in net.outer)
    assert got.shape == shape
    assert close(got.reshape(brute(net, factors).shape), net, sizes, factors)


@settings(max_examples=100)
@given(cases())
def test_torch_is_numpy(case: tuple[Network, dict[str, int]]) -> None:
    net, sizes = case
    factors = random_factors(net, sizes)
    got = dense(net, {label: torch.from_numpy(array) for label, array in factors.items()})
    assert isinstance(got, torch.Tensor)
    assert close(got.numpy(), net, sizes, factors)


@settings(max_examples=15)
@given(
    networks(tied=True, twins=True, max_factors=4).flatmap(lambda n: st.tuples(st.just(n), sizes_for(n, max_work=64)))
)
def test_gradients_and_their_gradients(case: tuple[Network, dict[str, int]]) -> None:
    net, sizes = case
    labels = [net.label(factor) for factor in net.factors]
    arrays = random_factors(net, sizes)
    tensors = tuple(torch.from_numpy(arrays[label]).requires_grad_() for label in labels)

    def function(*given: torch.Tensor) -> torch.Tensor:
        return dense(net, dict(zip(labels, given, strict=True)))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def rng(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


# ---- what is taken and what is refused


def test_kinds_and_dtypes() -> None:
    b, a = rng(3, 2), rng(2, 4)
    assert dense(LORA, {"B": b.astype(np.float32), "A": a.astype(np.float32)}).dtype == np.float32
    assert dense(LORA, {"B": b + 1j, "A": a}).dtype == np.complex128
    mixed = dense(LORA, {"B": torch.tensor(b), "A": torch.tensor(a, dtype=torch.bfloat16)})
    assert mixed.dtype == torch.float64
    lists = {"B": [[1, 2]], "A": [[3], [4]]}
    assert dense(LORA, lists).tolist() == [[11]]


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({"B": rng(3, 2)}, "no array for the factor 'A'"),
        ({"B": rng(3, 2), "A": rng(2, 4), "C": rng(1)}, "no factor 'C'"),
        ({"B": rng(3, 2), "A": rng(3, 4)}, r"'A' has shape \(3, 4\).*needs \(2, any\)"),
        ({"B": rng(3, 2), "A": rng(2)}, r"'A' has shape \(2,\)"),
        ({"B": rng(3, 2), "A": torch.zeros(2, 4)}, "is a torch tensor and 'B' is not"),
        ({"B": rng(3, 2), "A": np.zeros((2, 0))}, "empty"),
    ],
)
def test_bad_factors_are_named(factors: dict[str, object], words: str) -> None:
    with pytest.raises(NetworkError, match=words):
        dense(LORA, factors)


def test_sizes_are_checked() -> None:
    with pytest.raises(NetworkError, match="'A' has shape"):
        dense(LORA, {"B": rng(3, 2), "A": rng(2, 4)}, sizes={"inp": 5})


def test_numpy_needs_no_torch() -> None:
    code = (
        "import sys, numpy as np, tnpeft\n"
        "net = tnpeft.network('B[out r] A[r inp] -> out inp')\n"
        "tnpeft.dense(net, {'B': np.ones((2, 1)), 'A': np.ones((1, 2))})\n"
        "tnpeft.plan(net, out=4, r=2, inp=4, tokens=8)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("count", [9, 14, 40])
def test_long_terms_are_ordered_by_opt_einsum(count: int) -> None:
    """Chains with an index that many factors share, against the product matrix by matrix."""
    net = network(" ".join(f"G{k}[h a{k} a{k + 1}]" for k in range(count)) + f" -> a0 a{count}")
    rng = np.random.default_rng(count)
    factors = {f.name: rng.standard_normal((2, 3, 3)) for f in net.factors}
    expected = sum(reduce(np.matmul, [g[h] for g in factors.values()]) for h in range(2))
    np.testing.assert_allclose(dense(net, factors), expected, rtol=1e-9)
    tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in factors.items()}
    dense(net, tensors).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors.values())
