"""Factors with columns of length one: computed for all sites at once, with the values and gradients of each alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import reduce
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from watching import Watching

import tnpeft
from tnpeft.adapters.layer import columns
from tnpeft.adapters.layer.columns import UnitColumns, _forward


def model(base: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))) if base is None else base
    net = peft.get_peft_model(base, tnpeft.TensorNetworkConfig(network="cp", target_modules=["0", "1", "2"]))
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter, dtype=torch.float64)
    return net


def grads(net: Any) -> list[Tensor]:
    return [parameter.grad for parameter in net.parameters() if parameter.requires_grad]


X = torch.linspace(-1, 1, 5 * 16, dtype=torch.float64).reshape(5, 16)


def norms(act: Callable[[], Any]) -> tuple[int, Any]:
    """How often lengths of columns are computed, and what comes of it."""
    seen: list[str] = []
    with Watching(lambda name, *_: seen.append(name)):
        found = act()
    return seen.count("linalg_vector_norm"), found


def test_once_in_a_forward_and_once_in_its_backward() -> None:
    net = model()
    alone = copy.deepcopy(net)
    count, loss = norms(lambda: net(X).square().sum())
    assert (count, norms(loss.backward)[0]) == (1, 1)
    count, x = norms(lambda: reduce(lambda x, layer: layer(x), alone.base_model.model[:3], X))
    assert count == 12
    x.square().sum().backward()
    torch.testing.assert_close(grads(net), grads(alone), rtol=1e-12, atol=1e-12)


class Beside(nn.Module):
    """Three linears of one input, whose outputs are several."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x).sin().sum() for linear in self.linears]


def test_sites_may_run_backward_each_on_its_own() -> None:
    found = []
    for apart in (True, False):
        net = model(Beside())
        losses = net(X)
        for loss in losses if apart else [sum(losses)]:
            loss.backward()
        found.append(grads(net))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_nothing_is_left_of_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net, units = model(), list[Tensor]()
    original = UnitColumns.apply
    monkeypatch.setattr(UnitColumns, "apply", lambda *args: units.append(original(*args)) or units[-1])
    loss = net(X).square().sum()
    nodes = [results[0].grad_fn for results in units]
    loss.backward(retain_graph=True)
    assert len(nodes) == 1
    assert nodes[0].batch.known is None
    before = [grad.clone() for grad in grads(net)]
    loss.backward()
    torch.testing.assert_close(grads(net), [2 * grad for grad in before], rtol=1e-12, atol=1e-12)


def test_differentiable_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for _ in range(2):
        net = model()
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        first = torch.autograd.grad(net(X).sin().sum(), trained, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.sin().sum() for grad in first), trained))
        monkeypatch.setattr(columns, "_apart", lambda: False)
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_of_the_active_adapter_alone() -> None:
    net = model()
    net.add_adapter("wide", tnpeft.TensorNetworkConfig(network="cp", ranks={"r": 9}, target_modules=["1"]))
    net.set_adapter("wide")
    assert norms(lambda: net(X))[0] == 1
    net.set_adapter("default")
    net.delete_adapter("wide")
    assert set(net.base_model.model.factor_bank.unit_norm) == {"default"}


def test_nothing_is_left_of_a_forward_that_fails() -> None:
    net = model()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        net(torch.ones(2, 3, dtype=torch.float64))
    assert not _forward.units


def test_a_factor_changed_before_the_backward_is_an_error() -> None:
    net = model()
    loss = net(X).sum()
    with torch.no_grad():
        next(parameter for name, parameter in net.named_parameters() if name.endswith("A")).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_unloading_takes_the_hooks_along() -> None:
    base = model().unload()
    assert {**base._forward_pre_hooks, **base._forward_hooks, **base._forward_hooks_always_called} == {}
