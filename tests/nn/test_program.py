"""Programs against brute force, torch's flop counter, what autograd really keeps, and the compiler."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from bench import meters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from tnpeft import NetworkError, network
from tnpeft.networks import Network
from tnpeft.nn.executor.program import Program, program
from tnpeft.planning import OBJECTIVES
from tnpeft.testing import brute, networks, random_factors, sizes_for, tolerance

LINES = {
    "lora": "B[out r] A[r inp] -> out inp",
    "cp": "w[r] A[o1 r] B[o2 r] C[i1 r] D[i2 r] -> (o1 o2) (i1 i2)",
    "tucker": "G[a b c d] U[o1 a] V[o2 b] X[i1 c] Y[i2 d] -> (o1 o2) (i1 i2)",
    "train": "G1[o1 a] G2[a o2 b] G3[b i1 c] G4[c i2] -> (o1 o2) (i1 i2)",
    "loha": "B1[out r] A1[r inp] B2[out s] A2[s inp] -> out inp",
    "vera": "b[out] ~B[out r] d[r] ~A[r inp] -> out inp",
    "ia3": "v[out] ^W[out inp] -> out inp",
    "sum": "B[out r] A[r inp] - C[out k] D[k inp] -> out inp",
    "twins": "G[out inp] - ~G[out inp] -> out inp",
    "tied": "U[out a] U[inp a] -> out inp",
    "kron": "A[o1 i1] B[o2 i2] -> (o1 o2) (i1 i2)",
    "monarch": "B[c o k] A[k c i] -> (c o) (k i)",
}
SIZES = {
    **dict.fromkeys(("out", "inp"), 12),
    **{"o1": 4, "o2": 3, "i1": 4, "i2": 3, "o": 6, "i": 6},
    **dict.fromkeys(("r", "s", "k", "a", "b", "c", "d"), 2),
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Network, dict[str, int]]:
    net = draw(networks(tied=True, twins=True, stack=()))
    return net, draw(sizes_for(net))


def tensors(net: Network, sizes: dict[str, int], run: Program) -> list[torch.Tensor]:
    factors = random_factors(net, sizes)
    kinds = {net.label(factor): factor.kind for factor in net.factors}
    return [torch.from_numpy(factors[name]).requires_grad_(kinds[name] == "trainable") for name in run.labels]


def named(name: str, tokens: int, **options: object) -> tuple[Network, dict[str, int], Program]:
    net = network(LINES[name])
    return net, {i: SIZES[i] for i in net.indices}, program(net, SIZES, tokens=tokens, **options)  # type: ignore[arg-type]


@settings(max_examples=300)
@given(cases(), st.sampled_from(OBJECTIVES), st.sampled_from((1, 30, 10**6)), st.booleans(), st.booleans())
def test_programs_are_brute_force(
    case: tuple[Network, dict[str, int]], minimize: str, tokens: int, training: bool, with_base: bool
) -> None:
    net, sizes = case
    run = program(net, sizes, tokens=tokens, minimize=minimize, training=training)
    factors = random_factors(net, sizes)
    update, size = brute(net, factors), brute(net, factors, absolute=True)
    generator = np.random.default_rng(0)
    x, base = generator.standard_normal((2, 3, run.cols)), generator.standard_normal((2, 3, run.rows))
    operands = [torch.from_numpy(factors[label]) for label in run.labels]
    got = run(torch.from_numpy(x), operands, torch.from_numpy(base) if with_base else None, -1.5).numpy()
    base = base if with_base else np.zeros_like(base)
    scale = np.abs(base) + 1.5 * np.abs(x) @ size.T
    allowed = tolerance(net, sizes) + 2 * np.finfo(float).eps * (run.cols + 4)
    assert got.shape == base.shape
    assert (np.abs(got - (base - 1.5 * x @ update.T)) <= allowed * scale).all()
    delta = run.delta(operands, -1.5).numpy()
    assert (np.abs(delta + 1.5 * update) <= allowed * 1.5 * size).all()


@settings(max_examples=60)
@given(cases(), st.sampled_from((1, 30, 10**6)))
def test_the_flop_counter_agrees(case: tuple[Network, dict[str, int]], tokens: int) -> None:
    """Forward and backward; the counter sees matrix products only, so steps that sum nothing are left out.

    It is the one that counts products accumulated in place as well.
    """
    net, sizes = case
    run = program(net, sizes, tokens=tokens)
    rows = 5
    plan = run.plan.resized(tokens=rows)
    summed = [s for s in plan.steps if s.kind == "contract" and set(s.uses[0]) & set(s.uses[1]) - set(s.indices)]
    x = torch.randn(rows, run.cols, dtype=torch.float64, requires_grad=True)
    operands = tensors(net, sizes, run)
    with meters.flop_counter() as counter:
        result = run(x, operands, torch.zeros(rows, run.rows, dtype=torch.float64))
        forward = counter.get_total_flops()
        result.sum().backward()
    assert forward == 2 * sum(step.macs for step in summed)
    again = sum(step.macs for step in summed if step.result in run.recomputed)
    assert counter.get_total_flops() - forward == 2 * (again + sum(step.backward_macs for step in summed))


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("tokens", [3, 4000])
def test_autograd_keeps_what_the_plan_says(name: str, tokens: int) -> None:
    """Elements of all distinct storages kept for backward, factors left out; never more than the plan's."""
    net, sizes, run = named(name, tokens)
    x = torch.randn(tokens, run.cols, dtype=torch.float64, requires_grad=True)
    operands = tensors(net, sizes, run)
    kept: dict[int, torch.Tensor] = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        run(x, operands, torch.zeros(tokens, run.rows, dtype=torch.float64), 0.5)
    for operand in operands:
        kept.pop(operand.untyped_storage().data_ptr(), None)
    copies = sum(operand.numel() for operand in operands)  # a factor whose axes are fused in another order is copied
    elements = sum(tensor.untyped_storage().nbytes() // 8 for tensor in kept.values())
    assert elements <= run.plan.saved + copies


def test_no_wide_tensor_is_kept_for_lora_like_networks() -> None:
    for name in ("lora", "cp", "tucker", "train", "vera", "kron"):
        net = network(LINES[name])
        big = {**SIZES, "out": 256, "inp": 256, "o1": 16, "o2": 16, "i1": 16, "i2": 16}
        run = program(net, big, tokens=64)
        wide = prod(big[index] for index in (*net.rows, *net.cols))
        assert run.plan.form == "factored"
        assert all(
            prod(run.plan.sizes[i] for i in step.indices) < wide for step in run.plan.steps if step.result != "y"
        )


@pytest.mark.parametrize("name", LINES)
def test_one_graph_for_all_batch_sizes(name: str) -> None:
    net, sizes, run = named(name, 64)
    operands = [torch.nn.Parameter(t.detach(), t.requires_grad) for t in tensors(net, sizes, run)]
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, base: run(x, operands, base, 0.5), backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 8, 13):
        x, base = (torch.randn(batch, 4, 12, dtype=torch.float64) for _ in range(2))
        for rows in (x, base):  # a model with dynamic=True is compiled in tests/adapters/test_training.py
            torch._dynamo.mark_dynamic(rows, 0)
        torch.testing.assert_close(compiled(x, base), run(x, operands, base, 0.5), rtol=0, atol=1e-12)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", LINES)
def test_differentiable_twice(name: str) -> None:
    net, sizes, run = named(name, 3)
    operands = tensors(net, sizes, run)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    base = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, base: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return run(x, given, base, 0.5)

    assert torch.autograd.gradcheck(function, (x, base, *operands))
    assert torch.autograd.gradgradcheck(function, (x, base, *operands), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype) -> None:
    net, sizes, run = named("train", 64)
    operands = [operand.detach().to(dtype) for operand in tensors(net, sizes, run)]
    x, base = torch.ones(2, 12, dtype=dtype), torch.zeros(2, 12, dtype=dtype)
    assert run(x, operands, base).dtype == run(x, operands).dtype == run.delta(operands).dtype == dtype
    assert base.abs().max() == 0  # out of place


def test_no_rows_at_all() -> None:
    net, sizes, run = named("cp", 64)
    x = torch.zeros(0, 12, dtype=torch.float64)
    assert run(x, tensors(net, sizes, run), torch.zeros(0, 12, dtype=torch.float64)).shape == (0, 12)


def test_programs_are_kept_by_value() -> None:
    first = program(network(LINES["cp"]), SIZES, tokens=64)
    assert program(network(LINES["cp"]), dict(SIZES), tokens=64) is first
    assert program(network(LINES["cp"]), SIZES, tokens=65) is not first


def test_open_stack_indices_are_refused() -> None:
    with pytest.raises(NetworkError, match="layer"):
        program(network("A[layer out inp] -> layer out inp"), {"layer": 2, "out": 3, "inp": 4})
