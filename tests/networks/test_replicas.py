"""Programs of many adapters side by side: block k of the rows meets replica k, outputs and both gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tnpeft import families
from tnpeft.layout import layout
from tnpeft.networks import Factorization, NetworkError, Site, network, replicated
from tnpeft.nn.executor.program import Program, program

K = 3
SITE = Site(0, "q_proj", 12, 12, heads=3, module="q")
LINES = {
    "own": "U[out a] G[layer a b] V[b inp] + c[out s] ~D[s inp] -> layer out inp",
    "signed": "A[out r] C[r inp] - ~A[out r] ~C[r inp] -> out inp",
    "split": "A[o1 r] B[o2 r] C[i1 r] D[i2 r] -> (o1 o2) (i1 i2)",
    "stretched": "g[out] ^W[out inp] -> out inp",
    "hyper": "A[o1 r] B[o2 r i2] C[i1 r] w[r] -> (o1 o2) (i1 i2)",
}
RANKS = {"a": 3, "b": 2, "s": 2, "r": 3}


def factorizations() -> dict[str, Factorization]:
    found = {}
    for name, line in LINES.items():
        net = network(line)
        found[name] = Factorization.of(net, ranks={bond: RANKS[bond] for bond in net.bonds})
    for name in families.names():
        found[name] = families.get(name)()
    return found


FACTORIZATIONS = factorizations()


def placed(f: Factorization) -> tuple[Any, Any]:
    if "expert" in f.network.stack:
        pytest.skip("one program serves one matrix; experts are chosen inside their owner")
    try:
        alone = layout(f, [SITE]).site_layouts[0]
    except NetworkError as error:
        pytest.skip(f"does not fit a 12 x 12 site: {error.problem}")
    return alone, layout(replicated(f), [SITE], stack={"replica": K}).site_layouts[0]


def drawn(many: Program, site_layout: Any, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [site_layout.parameters[label].shape for label in many.labels]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def blocks(run: Any, x: Tensor, values: list[Tensor], site_layout: Any, base: Tensor) -> Tensor:
    """The oracle: every block through the program of one adapter."""
    own = ["replica" in site_layout.parameters[label].indices for label in run.labels]
    parts = []
    for k, (rows, under) in enumerate(zip(x.chunk(K), base.chunk(K), strict=True)):
        parts.append(run(rows, [v[k] if mine else v for v, mine in zip(values, own, strict=True)], under, 0.5))
    return torch.cat(parts)


def agree(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    found, wanted = found.detach(), wanted.detach()
    assert float((found - wanted).abs().max()) <= 1e-12 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("name", FACTORIZATIONS)
def test_every_block_meets_its_own_replica(name: str, tokens: int) -> None:
    alone, site_layout = placed(FACTORIZATIONS[name])
    many = program(site_layout.network, site_layout.sizes, tokens=tokens)
    one = program(alone.network, alone.sizes, tokens=tokens)
    assert many.labels == one.labels
    values = drawn(many, site_layout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * K, 5, alone.site.inp, generator=generator, dtype=torch.float64, requires_grad=True)
    base = torch.randn(2 * K, 5, alone.site.out, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(base.shape, generator=generator, dtype=torch.float64)
    found, wanted = many(x, values, base, 0.5), blocks(one, x, values, site_layout, base)
    agree(found, wanted)
    agree(many(x, values, None, 0.5), wanted - base)
    variables = [x, *values]
    mine = torch.autograd.grad((found * cotangent).sum(), variables, allow_unused=True)
    theirs = torch.autograd.grad((wanted * cotangent).sum(), variables, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            agree(a, b)
    weight = torch.randn(alone.site.out, alone.site.inp, generator=generator, dtype=torch.float64)
    bias = torch.randn(alone.site.out, generator=generator, dtype=torch.float64)
    joined = many.with_linear(x, values, weight, bias, 0.5)
    plain = many.apply(x, many.prepare(values), torch.nn.functional.linear(x, weight, bias), 0.5)
    agree(joined, plain)
    mine, theirs = (torch.autograd.grad((found * cotangent).sum(), variables) for found in (joined, plain))
    for a, b in zip(mine, theirs, strict=True):
        agree(a, b)
    deltas = many.delta([value.detach() for value in values], 0.5)
    for k in range(K):
        own = [
            v[k] if "replica" in site_layout.parameters[m].indices else v
            for v, m in zip(values, many.labels, strict=True)
        ]
        agree(deltas[k], one.delta([value.detach() for value in own], 0.5))


@pytest.mark.parametrize("name", ["own", "split", "hyper"])
def test_a_pass_costs_what_its_replicas_cost(name: str) -> None:
    alone, site_layout = placed(FACTORIZATIONS[name])
    many = program(site_layout.network, site_layout.sizes, tokens=64)
    one = program(alone.network, alone.sizes, tokens=64)
    for cost in ("macs", "backward_macs", "written", "saved"):
        assert getattr(many.plan, cost) == K * getattr(one.plan, cost)
    assert len(many.recomputed) == len(one.recomputed)
    assert len(many.update.training.saved) == len(one.update.training.saved)


@pytest.mark.parametrize("name", ["lora", "signed", "stretched", "hyper"])
def test_the_second_derivative_of_the_joined_operation(name: str) -> None:
    _, site_layout = placed(FACTORIZATIONS[name])
    many = program(site_layout.network, site_layout.sizes, tokens=64)
    weight = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = torch.randn(K, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return many.with_linear(x, list(values), weight, None, 0.5).square()

    assert torch.autograd.gradcheck(run, (x, *drawn(many, site_layout)), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *drawn(many, site_layout)), fast_mode=True)


def test_rows_that_are_no_equal_blocks_are_refused() -> None:
    _, site_layout = placed(families.lora(rank=1))
    many = program(site_layout.network, site_layout.sizes)
    with pytest.raises(NetworkError, match="batch size 4 is not divisible by 3 replicas"):
        many(torch.ones(4, 12, dtype=torch.float64), drawn(many, site_layout))


def test_a_line_with_a_replica_is_not_replicated_again() -> None:
    with pytest.raises(NetworkError, match="carries 'replica' already"):
        replicated(Factorization.of("A[replica out inp] -> replica out inp"))


@pytest.mark.parametrize("line", LINES.values())
def test_selecting_a_replica_gives_the_line_back(line: str) -> None:
    f = Factorization.of(line, ranks=dict.fromkeys(network(line).bonds, 2))
    assert replicated(f).network.select("replica") == f.network


def test_ranks_and_scales_become_constants_where_they_differ() -> None:
    f = Factorization.of("U[out a] G[a b] V[b inp] + c[out] d[inp] -> out inp", ranks={"a": 2, "b": 3}, scale=3.0)
    both = replicated(f, replace(f.with_ranks(a=1), scale=2.0))
    assert str(both.network) == (
        "U[replica out a] G[replica a b] V[replica b inp] ^mask_a[replica a] ^scales[replica] "
        "+ c[replica out] d[replica inp] ^scales[replica] -> replica out inp"
    )
    assert (both.ranks, both.scale) == ({"a": 2, "b": 3}, 1.0)
    assert both.init == {"mask_a": [[1, 1], [1, 0]], "scales": [3.0, 2.0]}
    assert replicated(f, f) == replicated(f)
    with pytest.raises(NetworkError, match="may differ in scale, and in ranks"):
        replicated(f, Factorization.of("A[out inp] -> out inp"))
    g = replace(f, ranks={"a": 2, "b": "min(a, inp)"})
    with pytest.raises(NetworkError, match="from which no rule derives"):
        replicated(g, g.with_ranks(a=3))


def test_a_factor_may_be_called_as_a_mask() -> None:
    f = Factorization.of("mask_r[out r] A[r inp] -> out inp", ranks={"r": 2})
    assert "^mask_r_[replica r]" in str(replicated(f, f.with_ranks(r=1)).network)
