"""Programs on rows sorted by expert against one einsum per expert, forward, backward and twice backward."""

from __future__ import annotations

from functools import partial

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from watching import largest

from tnpeft import NetworkError, network
from tnpeft.networks import Network
from tnpeft.nn.executor.grouped import GroupedProgram, Part, grouped_linear, grouped_program
from tnpeft.nn.executor.groups import Groups
from tnpeft.testing import networks, random_factors, sizes_for

LORA = "B[expert out r] A[expert r inp] -> expert out inp"
LINES = [
    LORA,
    "B[expert out r] A[r inp] -> expert out inp",
    "U[out r] e[expert r] V[inp r] -> expert out inp",
    "U[out a] G[a expert b] V[inp b] -> expert out inp",
    "A[o1 r] e[r expert] B[o2 r] C[i1 r] D[i2 r] -> expert (o1 o2) (i1 i2)",
    "B[expert out r] A[r inp] + C[out s] D[s inp] -> expert out inp",
    "A[expert o1 i1] B[o2 i2] -> expert (o1 o2) (i1 i2)",
    "v[expert out] ^W[expert out inp] -> expert out inp",
    "B[out r] A[r inp] -> out inp",
]
SIZES = {"expert": 4, "out": 12, "inp": 6, "o1": 4, "o2": 3, "i1": 2, "i2": 3, **dict.fromkeys("rsab", 2)}


def dense(net: Network, factors: dict[str, Tensor], sizes: dict[str, int]) -> Tensor:
    """``[expert, rows, cols]``; every expert has what no factor tells apart."""
    found: Tensor = oracles.dense(net, factors)
    return found.expand(sizes["expert"], *found.shape[-2:])


def drawn(net: Network, sizes: dict[str, int]) -> tuple[GroupedProgram, list[Tensor], dict[str, Tensor]]:
    run = grouped_program(net, {i: sizes[i] for i in net.indices})
    kinds = {net.label(factor): factor.kind for factor in net.factors}
    arrays = random_factors(net, sizes)
    given = [torch.from_numpy(arrays[name]).requires_grad_(kinds[name] == "trainable") for name in run.labels]
    return run, given, dict(zip(run.labels, given, strict=True))


def close(a: Tensor, b: Tensor, scale: Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-11 * (1 + scale.abs().max())


def agree(net: Network, sizes: dict[str, int], ids: list[int]) -> None:
    torch.manual_seed(0)
    run, operands, factors = drawn(net, sizes)
    groups = Groups(torch.tensor(ids), sizes["expert"])
    matrices = dense(net, factors, sizes)
    x = torch.randn(len(ids), matrices.shape[2] + 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sizes["expert"], matrices.shape[2] + 2, matrices.shape[1] + 2, dtype=torch.float64)
    bias = torch.randn(sizes["expert"], matrices.shape[1] + 2, dtype=torch.float64)
    part = Part(run, tuple(operands), 0.5, slice(1, matrices.shape[1] + 1), slice(1, matrices.shape[2] + 1))
    whole = weight.mT + nn.functional.pad(0.5 * matrices, (1, 1, 1, 1))
    expected = torch.stack([whole[e] @ torch.tanh(row) + bias[e] for e, row in zip(ids, x, strict=True)])
    trained = [x, *(operand for operand in operands if operand.requires_grad)]
    out = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, trained, out, create_graph=True)
    result = grouped_linear(x, groups, [part], weight, bias, prepare=torch.tanh)
    close(result, expected, expected)
    found = torch.autograd.grad(result, trained, out, create_graph=True)
    once = torch.autograd.grad(result, trained, out, retain_graph=True)
    for a, b, c in zip(found, once, wanted, strict=True):
        close(a, c, c)
        close(b, c, c)
    weights = [torch.randn_like(g) for g in found]
    second = [
        torch.autograd.grad(
            sum((g * w).sum() for g, w in zip(grads, weights, strict=True)), trained, allow_unused=True
        )
        for grads in (found, wanted)
    ]
    for a, b in zip(*second, strict=True):
        if b is not None and a is not None:
            close(a, b, b)
        assert (a is None) <= (b is None or not b.any())
    with torch.no_grad():
        close(grouped_linear(x, groups, [part], weight, bias, prepare=torch.tanh), expected, expected)
        close(run.delta(operands).expand_as(matrices), matrices, matrices)
        part_of = x[:, 1:-1]
        alone = torch.stack([matrices[e] @ row for e, row in zip(ids, part_of, strict=True)])
        close(run(part_of, groups, operands, 2.0), 2 * alone, expected)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("ids", [[0, 0, 1, 1, 1, 2, 3, 3], [2, 2, 2], [0, 3]], ids=["all", "one", "some"])
def test_rows_meet_their_experts(line: str, ids: list[int]) -> None:
    agree(network(line), SIZES, ids)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_drawn_networks_over_experts(data: st.DataObject) -> None:
    net = data.draw(networks(stack=("expert",), tied=True))
    sizes = {"expert": 3} | data.draw(sizes_for(net))
    ids = sorted(data.draw(st.lists(st.integers(0, sizes["expert"] - 1), min_size=1, max_size=9)))
    agree(net, sizes, ids)


def step(run: GroupedProgram, *given: object) -> None:
    run(*given).sum().backward()


def test_a_matrix_of_every_expert_is_not_formed_in_training() -> None:
    sizes = {"expert": 32, "out": 64, "inp": 48, "r": 2}
    for line in LINES[:3]:
        run, operands, _ = drawn(network(line), sizes)
        x = torch.randn(256, 48, dtype=torch.float64, requires_grad=True)
        groups = Groups(torch.randint(0, 32, (256,)).sort()[0], 32)
        assert 0 < largest(partial(step, run, x, groups, operands)) < 32 * 64 * 48 / 4


def test_an_open_stack_index_beside_experts_is_refused() -> None:
    with pytest.raises(NetworkError, match="'replica' cannot stand beside experts"):
        grouped_program(network("A[replica expert out inp] -> replica expert out inp"), SIZES | {"replica": 2})
