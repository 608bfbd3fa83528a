"""The base weight as an operand of what is executed: the table's plan, its flops, its gradients, its precision."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from bench import meters
from torch import Tensor
from torch.nn.functional import linear

import tnpeft
from tnpeft import network, plan_table
from tnpeft.nn.executor.listing import Y
from tnpeft.nn.executor.program import Program, program

SIZES = {"out": 24, "inp": 128, "r": 1, "s": 2, "q": 160}
NETWORKS = {
    "low": "B[out r] A[r inp] -> out inp",
    "high": "B[out q] A[q inp] -> out inp",
    "matrix": "A[out inp] -> out inp",
    "subtracted": "-A[out inp] -> out inp",
    "scaled base": "v[out] ^W[out inp] -> out inp",
    "hadamard": "^V[out inp] B[out r] A[r inp] -> out inp",
    "some of the terms": "C[out inp] + B[out r] A[r inp] -> out inp",
    "all of the terms": "C[out inp] + B[out q] A[q inp] - ^V[out inp] d[inp] -> out inp",
    "frozen": "B[out s] A[s inp] - ~G[out q] ~H[q inp] -> out inp",
}
TOKENS = (1, 55, 5000)


def case(name: str, tokens: int, rows: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Program, list[Tensor]]:
    """A program planned for so many tokens, and x, weight and its factors."""
    net = network(NETWORKS[name])
    run = program(net, {i: SIZES[i] for i in net.indices}, tokens=tokens)
    generator = torch.Generator().manual_seed(0)
    groups = [("out", "inp"), *(net.factor(label).indices for label in run.labels)]
    shapes = [(rows, SIZES["inp"]), *(tuple(SIZES[i] for i in group) for group in groups)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    trained = [True, False, *(net.factor(label).kind == "trainable" for label in run.labels)]
    return run, [tensor.requires_grad_(on) for tensor, on in zip(tensors, trained, strict=True)]


def joined(run: Program, x: Tensor, weight: Tensor, *factors: Tensor) -> Tensor:
    return run.with_linear(x, factors, weight, None, 0.5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_joined_is_the_table_s_plan(name: str, tokens: int) -> None:
    net = network(NETWORKS[name])
    sizes = {i: SIZES[i] for i in net.indices}
    run = program(net, sizes, tokens=tokens)
    for found, base in ((run.fused_plan, "fp32"), (run.plan, None)):
        wanted = plan_table(net, sizes, base=base).at(tokens)
        assert (found.form, found.steps) == (wanted.form, wanted.steps)


def test_the_table_shows_the_base_weight() -> None:
    table = plan_table(network(NETWORKS["high"]), {"out": 24, "inp": 128, "q": 160})
    assert [plan.form for plan in table.plans] == ["factored", "factored", "merged"]
    assert "W[out inp]" in str(table)
    assert "(frozen forward)" in str(table)
    assert "merged" not in str(plan_table(network(NETWORKS["high"]), {"out": 24, "inp": 128, "q": 160}, base=None))


def test_every_form_is_met() -> None:
    met = {case(name, tokens)[0].fused_plan.form for name, tokens in product(NETWORKS, TOKENS)}
    assert met == {"factored", "merged"}
    partly = case("some of the terms", 55)[0].merged
    assert partly is not None
    assert sum(step.result == Y for step in partly.forward) > 1


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients(name: str, tokens: int) -> None:
    run, given = case(name, tokens)
    found: list[Any] = []
    for function in (joined, lambda run, x, weight, *factors: linear(x, weight + run.delta(factors, 0.5))):
        result = function(run, *given)
        trained = [tensor for tensor in given if tensor.requires_grad]
        found.append([result, *torch.autograd.grad(result.sin().sum(), trained)])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["matrix", "subtracted", "hadamard"])
def test_second_derivatives(name: str) -> None:
    run, given = case(name, 5000, rows=2)
    assert run.fused_plan.form == "merged"
    found = []
    for function in (joined, lambda run, x, weight, *factors: linear(x, weight + run.delta(factors, 0.5))):
        trained = [tensor for tensor in given if tensor.requires_grad]
        first = torch.autograd.grad(function(run, *given).sin().sum(), trained, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.sin().sum() for grad in first), trained))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_flops_are_those_of_the_plan_for_the_dtype(name: str, tokens: int, dtype: torch.dtype) -> None:
    """In half precision the base weight takes nothing."""
    rows = 11
    run, given = case(name, tokens, rows, dtype)
    plan = (run.fused_plan if dtype == torch.float32 else run.plan).resized(tokens=rows)
    summed = [s for s in plan.steps if s.kind == "contract" and set(s.uses[0]) & set(s.uses[1]) - set(s.indices)]
    frozen = 2 * rows * SIZES["out"] * SIZES["inp"]
    with torch.no_grad(), meters.flop_counter() as counter:
        joined(run, *given)
    assert counter.get_total_flops() == frozen + 2 * sum(step.macs for step in summed)


def test_half_precision_would_lose_the_update() -> None:
    run, given = case("matrix", 5000, dtype=torch.float32)
    x, weight, change = (tensor.detach() for tensor in given)
    weight, change = torch.ones_like(weight), torch.full_like(change, 2**-12)
    wanted = linear(x, change) * 0.5
    exact = run.with_linear(x, [change], weight, None, 0.5) - linear(x, weight)
    torch.testing.assert_close(exact, wanted, rtol=1e-2, atol=1e-4)
    half = [tensor.bfloat16() for tensor in (x, change, weight)]
    assert torch.equal(half[2] + half[1] * 0.5, half[2])
    with meters.flop_counter() as counter:
        run.with_linear(half[0], [half[1]], half[2], None, 0.5)
    assert counter.get_total_flops() == 2 * 2 * len(x) * weight.numel()


def test_a_family_that_forms_its_matrix_pays_for_no_second_product() -> None:
    """IA3 scales the rows of the base weight: forward nothing but the frozen product, over a model's linear."""
    import peft

    base = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(64, 96)))
    model = peft.get_peft_model(base, tnpeft.TensorNetworkConfig(network="ia3", target_modules=["0.0"]))
    with meters.flop_counter() as counter:
        model(torch.randn(200, 64))
    assert counter.get_total_flops() == 2 * 200 * 64 * 96
