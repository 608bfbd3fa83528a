"""Rebalancing: the update stays, Gram matrices become equal."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import tnpeft
from tnpeft import families
from tnpeft.networks import ConfigError, NetworkError

FAMILIES = {
    "lora": families.lora(rank=3),
    "moslora": families.moslora(3),
    "tucker": families.tucker(ranks=2),
    "block_term": families.block_term(ranks=2),
    "tensor_train": families.tensor_train(ranks=2),
    "tensor_ring": families.tensor_ring(ranks=2),
    "hierarchical_tucker": families.hierarchical_tucker(ranks=2),
    "lotr": families.lotr(3),
    "tenslora": families.tenslora(ranks=2),
    "cp": families.cp(rank=3, unit_norm=False),
    "cp, unit columns": families.cp(rank=3),
    "lorta": families.lorta(rank=3),
    "vera": families.vera(rank=8),
    "quanta": families.quanta(),
    "loha": families.loha(rank=2),
}


def attached(f):
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)))
    config = tnpeft.TensorNetworkConfig(network=f, target_modules=["0", "1"])
    model = peft.get_peft_model(base.double(), config).double()
    kinds = {f.network.label(factor): factor.kind for factor in f.network.factors}
    values = tnpeft.factors(model)
    for name in [name for name in values if kinds[name] == "trainable"]:
        scale = torch.rand(values[name].shape[-1]).double() * 5
        tnpeft.set_factors(model, {name: torch.randn(values[name].shape).double() * scale})
    return model


def updates(model):
    return torch.stack([m.get_delta_weight("default") for m in model.modules() if hasattr(m, "updates")])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_update_stays(name):
    model = attached(FAMILIES[name])
    before, old = updates(model), tnpeft.factors(model)
    tnpeft.rebalance(model)
    assert (updates(model) - before).abs().max() < 1e-11 * before.abs().max()
    changed = any(not torch.equal(old[key], value) for key, value in tnpeft.factors(model).items())
    assert changed == (name not in ("cp, unit columns", "vera", "quanta"))


def test_both_sides_of_a_bond_have_one_diagonal_gram():
    model = attached(FAMILIES["lora"])
    tnpeft.rebalance(model)
    B, A = tnpeft.factors(model)["B"].squeeze(), tnpeft.factors(model)["A"].squeeze()
    for b, a in zip(B, A, strict=True):
        gram = b.T @ b
        assert torch.allclose(gram, a @ a.T, rtol=1e-9, atol=1e-9 * float(gram.max()))
        assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-9 * float(gram.max()))


def test_inner_bonds_of_a_tree_see_whole_halves():
    model = attached(FAMILIES["moslora"])
    tnpeft.rebalance(model)
    B, M, A = (
        tnpeft.factors(model)[name].reshape(2, *shape)[0]
        for name, shape in zip("BMA", ((8, 3), (3, 3), (3, 8)), strict=True)
    )
    for left, right in ((B, M @ A), (B @ M, A)):
        assert torch.allclose(left.T @ left, right @ right.T, rtol=1e-8, atol=1e-8 * float((left.T @ left).max()))


def test_a_hyper_index_is_rescaled_to_equal_norms():
    model = attached(FAMILIES["cp"])
    tnpeft.rebalance(model)
    values = tnpeft.factors(model)
    norms = torch.stack([values[name][0, 0].reshape(-1, 3).square().mean(0) for name in ("w", "A", "B", "C", "D")])
    assert torch.allclose(norms, norms[:1].expand_as(norms))


def test_a_zero_start_is_left_alone_and_a_merged_adapter_refused():
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), tnpeft.TensorNetworkConfig(network="lora", target_modules=["0"])
    )
    before = tnpeft.factors(model)
    tnpeft.rebalance(model)
    assert all(torch.equal(value, before[name]) for name, value in tnpeft.factors(model).items())
    model.merge_adapter()
    with pytest.raises(NetworkError, match="merged"):
        tnpeft.rebalance(model)


@pytest.mark.parametrize("bad", [None, "folder", 5, {}])
def test_what_is_no_model_is_said_so(bad: Any) -> None:
    asked = (
        tnpeft.factors, tnpeft.rebalance, tnpeft.explain, tnpeft.refresh, tnpeft.select,
        lambda model: tnpeft.parameter_groups(model, lr=1e-3), lambda model: tnpeft.export_lora(model, "nowhere"),
        lambda model: tnpeft.set_factors(model, {}), lambda model: tnpeft.coordinate_check(model, None),
    )  # fmt: skip
    for ask in asked:
        with pytest.raises(ConfigError, match=r"the model is .*\npass a torch.nn.Module"):
            ask(bad)


@pytest.mark.parametrize("bad", [-1e-3, float("nan"), float("inf"), "x"])
@pytest.mark.parametrize("option", ["lr", "relative_step"])
def test_rates_that_are_no_rates_are_refused(option: str, bad: Any) -> None:
    with pytest.raises(NetworkError, match=f"{option} is "):
        tnpeft.parameter_groups(nn.Linear(2, 2), **{option: bad})


def test_rates_of_an_unknown_adapter_or_of_a_zero_weight_are_refused() -> None:
    config = tnpeft.TensorNetworkConfig(network="lora", target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    with pytest.raises(NetworkError, match="unknown adapter 'other'"):
        tnpeft.parameter_groups(model, lr=1e-3, adapter="other")
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight.zero_()
    with pytest.raises(NetworkError, match="the base weight of 0 has the RMS"):
        tnpeft.parameter_groups(model, relative_step=1e-3)
    assert [group["lr"] for group in tnpeft.parameter_groups(model, lr=1e-3)] == [1e-3, 1e-3]
