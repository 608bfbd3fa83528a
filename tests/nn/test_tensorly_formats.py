"""TensorLy's objects both ways: the same dense tensor on either side."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
from tensorly.random import random_cp, random_tt, random_tucker

import tnpeft

LINES = {
    "cp": ("B[b r] A[r a] C[c r] -> a b c", {"a": 2, "b": 3, "c": 4, "r": 5}, tensorly.cp_to_tensor),
    "weighted cp": ("w[r] A[a r] B[r b] -> a b", {"a": 2, "b": 3, "r": 4}, tensorly.cp_to_tensor),
    "tucker": (
        "U[p a] G[q p s] V[b q] W[s c] -> a b c",
        {"a": 2, "b": 3, "c": 4, "p": 2, "q": 3, "s": 2},
        tensorly.tucker_to_tensor,
    ),
    "train": ("C[s c] A[a p] B[s b p] -> a b c", {"a": 2, "b": 3, "c": 4, "p": 2, "s": 3}, tensorly.tt_to_tensor),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_is_the_tensor_that_tensorly_builds(name: str) -> None:
    line, sizes, build = LINES[name]
    net = tnpeft.network(line)
    rng = np.random.default_rng(0)
    factors = {f.name: rng.standard_normal([sizes[i] for i in f.indices]) for f in net.factors}
    np.testing.assert_allclose(build(tnpeft.to_tensorly(net, factors)), tnpeft.dense(net, factors), rtol=1e-12)


@pytest.mark.parametrize("kind", ["cp", "tucker", "train"])
def test_there_and_back(kind: str) -> None:
    draw = {"cp": lambda: random_cp((3, 4, 5), 2), "tucker": lambda: random_tucker((3, 4, 5), (2, 3, 2))}
    tensor = draw.get(kind, lambda: random_tt((3, 4, 5), (1, 2, 3, 1)))()
    net, factors = tnpeft.from_tensorly(tensor)
    again = tnpeft.to_tensorly(net, factors)
    np.testing.assert_allclose(again.to_tensor(), tensor.to_tensor(), rtol=1e-12)
    np.testing.assert_allclose(tnpeft.dense(net, factors), tensor.to_tensor(), rtol=1e-12)


@pytest.mark.parametrize(
    "line",
    ["A[a p] B[b p q] C[c q p] -> a b c", "A[a r] B[b r] + C[a s] D[b s] -> a b", "A[a p] C[c p s] B[s b] -> a b c"],
)
def test_other_lines_are_refused(line: str) -> None:
    net = tnpeft.network(line)
    with pytest.raises(tnpeft.NetworkError, match="neither CP nor Tucker nor a tensor train"):
        tnpeft.to_tensorly(net, {f.name: np.ones([2] * len(f.indices)) for f in net.factors})
    with pytest.raises(tnpeft.NetworkError, match="expected a CPTensor"):
        tnpeft.from_tensorly(np.ones(3))
