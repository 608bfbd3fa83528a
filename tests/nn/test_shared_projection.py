"""First steps taken together: outputs, both derivatives, any of the linears left out, passes one after the other."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from watching import Watching

from tnpeft import network
from tnpeft.nn.executor.program import Program, ProgramFunction, program
from tnpeft.nn.executor.shared_projection import project

TOKENS, WIDE, SCALE = 7, 12, -0.5
SIZES = {"out": WIDE, "inp": WIDE, "r": 2, "s": 3, "a": 2, "b": 3, "c": 2, "o1": 3, "o2": 4, "i1": 4, "i2": 3}
NETWORKS = {
    "lora": "B[out r] A[r inp] -> out inp",
    "scaled": "w[r] B[out r] A[r inp] -> out inp",
    "cp": "w[r] A[o1 r] B[o2 r] C[i1 r] D[i2 r] -> (o1 o2) (i1 i2)",
    "vera": "b[out] ~B[out r] d[r] ~A[r inp] -> out inp",
    "two gates": "B[out a] ~M[a b] ~A[b inp] -> out inp",
    "tied": "U[out r] G[r s] U[inp s] -> out inp",
    "hadamard": "B[out r] A[r inp] C[out s] D[s inp] -> out inp",
    "train": "G1[o1 a] G2[a o2 b] G3[b i1 c] G4[c i2] -> (o1 o2) (i1 i2)",
}
APART = {
    "one factor in two terms": "B[out r] M[r s] A[s inp] - C[out r] ~M[r s] A[s inp] -> out inp",
    "two terms": "B[out r] A[r inp] + C[out s] D[s inp] -> out inp",
    "wide": "B[out q] A[q inp] -> out inp",
    "kron": "A[o1 i1] B[o2 i2] -> (o1 o2) (i1 i2)",
}


def built(line: str, times: int = 1) -> Program:
    net = network(line)
    sizes = {**SIZES, "q": WIDE, "s": 2 if line == NETWORKS["tied"] else 3}
    sizes |= {index: times * sizes[index] for index in ("out", "inp", "o1", "i1")}
    return program(net, {index: sizes[index] for index in net.indices}, tokens=TOKENS)


class Group:
    """Three linears with an update each, of one network."""

    def __init__(self, name: str, times: int = 1, tokens: int = TOKENS) -> None:
        self.run = built(NETWORKS[name], times)
        net, generator = self.run.plan.network, torch.Generator().manual_seed(0)
        shapes = [tuple(self.run.plan.sizes[i] for i in net.factor(label).indices) for label in self.run.labels]
        kinds = [net.factor(label).kind for label in self.run.labels]

        def draw(shape: Any) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.weights = [draw((times * WIDE, times * WIDE)) for _ in range(3)]
        self.x = draw((tokens, times * WIDE)).requires_grad_()
        self.factors = [
            draw(shape).requires_grad_(kind == "trainable")
            for _ in range(3)
            for shape, kind in zip(shapes, kinds, strict=True)
        ]

    def shared(self, x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        own = self.parts(factors)
        assert self.run.prefix is not None
        x, narrow = project([self.run.prefix] * 3, own, x, range(3))
        return tuple(self.run.with_linear(x, own[k], self.weights[k], None, SCALE, narrow[k]) for k in range(3))

    def alone(self, x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        own = self.parts(factors)
        fused = self.run.fused
        return tuple(
            ProgramFunction.apply(fused, SCALE, x, None, self.weights[k], None, None, *own[k])[0] for k in range(3)
        )

    def parts(self, factors: Any) -> list[list[Tensor]]:
        count = len(factors) // 3
        return [[*factors[k * count : (k + 1) * count]] for k in range(3)]

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.x, *self.factors) if tensor.requires_grad]

    def gradients(self, way: str, used: Any, given: bool = True) -> list[Tensor | None]:
        x = self.x if given else self.x.detach()
        results = getattr(self, way)(x, *self.factors)
        loss = sum(results[k].sin().sum() for k in used)
        return [*torch.autograd.grad(loss, self.leaves, allow_unused=True)]


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_each_alone(name: str, used: Any, given: bool) -> None:
    group = Group(name)
    found, wanted = (
        [*getattr(group, way)(group.x, *group.factors), *group.gradients(way, used, given)]
        for way in ("shared", "alone")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_differentiable_twice(name: str) -> None:
    group = Group(name, tokens=2)  # every number is moved
    assert torch.autograd.gradcheck(group.shared, (group.x, *group.factors))
    assert torch.autograd.gradgradcheck(group.shared, (group.x, *group.factors), atol=1e-4)


def test_a_pass_over_a_kept_graph_gives_the_same_again() -> None:
    group = Group("cp")
    results = group.shared(group.x, *group.factors)
    loss = sum(result.sin().sum() for result in results)
    first, second = (torch.autograd.grad(loss, group.leaves, retain_graph=again) for again in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_factors_changed_before_the_backward_pass_are_noticed() -> None:
    group = Group("lora")
    loss = sum(result.sum() for result in group.shared(group.x, *group.factors))
    with torch.no_grad():
        group.factors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("same", "narrow"), [(False, 6), (True, 2)])
def test_one_narrow_product_for_all_and_one_of_each_kind_for_its_gradients(same: bool, narrow: int) -> None:
    group, shapes = Group("lora"), list[tuple[int, int, int]]()
    own, run = group.parts(group.factors), group.run
    assert run.prefix is not None
    if same:
        own = [[B, own[0][1]] for B, _ in own]

    def note(name: str, args: Any, result: Any) -> None:
        if name in ("mm", "addmm", "addmm_"):
            shapes.append((*args[-2].shape, args[-1].shape[1]))

    def over(summed: int, narrow: int) -> int:
        """Products with the input's or an output's features summed or made, and a side of this width."""
        return sum(sorted(shape) == sorted((TOKENS, summed, narrow)) for shape in shapes)

    with Watching(note):
        x, parts = project([run.prefix] * 3, own, group.x, ["A"] * 3 if same else "ABC")
    assert shapes == [(narrow, WIDE, TOKENS)]
    results = [run.with_linear(x, own[k], group.weights[k], None, 1.0, parts[k]) for k in range(3)]
    shapes.clear()
    with Watching(note):
        sum(result.sum() for result in results).backward()
    # the gradient of the input and that of the joined matrices, beside two for each linear's last step
    assert over(WIDE, narrow) == 2 + 6 * (narrow == 2)
    assert over(WIDE, WIDE) == 3
    assert len(shapes) == 2 + 6 + 3


@pytest.mark.parametrize("name", APART)
def test_programs_without_one_narrow_first_step_have_none(name: str) -> None:
    assert built(APART[name]).prefix is None


@pytest.mark.parametrize("name", ["lora", "scaled", "vera", "tied", "hadamard"])
def test_no_more_is_kept_than_by_each_alone(name: str) -> None:
    group = Group(name, times=10)  # as wide as linears are, so that narrow results are kept and not computed again
    kept = []
    for way in (group.shared, group.alone):
        found: dict[int, int] = {}
        note = partial(_note, found, {tensor.data_ptr() for tensor in (*group.factors, *group.weights)})
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            results = way(group.x, *group.factors)
        kept.append(sum(found.values()))
        del results
    assert kept[0] <= kept[1]


def _note(found: dict[int, int], own: set[int], tensor: Tensor) -> Tensor:
    pointer = tensor.untyped_storage().data_ptr()
    if pointer not in own:
        found[pointer] = tensor.untyped_storage().nbytes()
    return tensor
