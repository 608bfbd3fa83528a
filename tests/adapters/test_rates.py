"""Groups for an optimizer by rule, and measured steps beside the predicted."""

from __future__ import annotations

from math import sqrt

import peft
import pytest
import torch
from torch import nn

import tnpeft
from tnpeft import families
from tnpeft.adapters.state import bank_of
from tnpeft.networks import NetworkError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(torch.tanh(self.q_proj(x)) * self.v_proj(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.score = nn.Linear(8, 2)

    def forward(self, x):
        return self.score(sum(layer(x) for layer in self.layers))


def attached(network="lora", targets=("q_proj", "v_proj"), **fields):
    torch.manual_seed(0)
    config = tnpeft.TensorNetworkConfig(network=network, target_modules=list(targets), **fields)
    return peft.get_peft_model(Stack(), config)


def rate_of(groups, parameter):
    (rate,) = [g["lr"] for g in groups if any(p is parameter for p in g["params"])]
    return rate


def first_steps(model, groups):
    """The RMS change of every site's update after one signed step at the groups' rates, over the base weight's."""
    x = torch.randn(64, 16)
    torch.nn.functional.cross_entropy(model(x), torch.arange(64) % 2).backward()
    before = {m: m.get_delta_weight("default").clone() for m in model.modules() if hasattr(m, "updates")}
    with torch.no_grad():
        for group in groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()
    tnpeft.refresh(model)
    return {
        m: float(((m.get_delta_weight("default") - old).square().mean() / m.base_layer.weight.square().mean()).sqrt())
        for m, old in before.items()
    }


@pytest.mark.parametrize("name", ["lora", "moslora", "tucker", "cp", "tensor_train", "lotr", "vera", "fact_tk"])
def test_the_first_step_is_the_relative_step(name):
    """Signs of a gradient are not independent, so this holds in size only; the mean over signs is tested exactly."""
    model = attached(families.get(name)())
    moved = first_steps(model, tnpeft.parameter_groups(model, relative_step=1e-3))
    assert all(2e-4 < step < 5e-3 for step in moved.values()), moved


def test_rates_are_those_of_each_site():
    model = attached(families.lora(rank=4), ("q_proj", "fc2"))
    groups = tnpeft.parameter_groups(model, relative_step=1e-2)
    for linear in [m for m in model.modules() if hasattr(m, "updates")]:
        base = float(linear.base_layer.weight.square().mean().sqrt())
        own = linear.tnpeft_factors["default"]
        assert rate_of(groups, own.B) == pytest.approx(1e-2 * base / sqrt(4 / (3 * 16)))
        assert rate_of(groups, own.A) == pytest.approx(1e-2 * tnpeft.scaling.KAPPA / sqrt(3 * 16))


def test_a_shared_factor_learns_at_the_mean_of_its_sites():
    model = attached("A[layer proj r inp] B[out r] -> layer proj out inp", ranks={"r": 4}, init={"A": "kaiming"})
    groups = tnpeft.parameter_groups(model, relative_step=1e-2)
    bases = [float(m.base_layer.weight.square().mean().sqrt()) for m in model.modules() if hasattr(m, "updates")]
    assert len(bases) == 4
    expected = 1e-2 * sum(bases) / 4 / sqrt(4 / (3 * 16))
    assert rate_of(groups, bank_of(model).tnpeft_factors["default"].B) == pytest.approx(expected)


def test_every_parameter_once_and_the_rest_at_lr():
    model = attached(families.lora(), modules_to_save=["score"], dora=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = tnpeft.parameter_groups(model, lr=0.5, relative_step=1e-2, weight_decay=0.1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, trained))
    by_name = {g["name"]: g for g in groups}
    assert by_name["rest"]["lr"] == 0.5
    assert by_name["magnitude"]["lr"] < 0.1
    assert {g["weight_decay"] for g in groups} == {0.1}


def test_the_configuration_has_a_relative_step():
    model = attached(families.lora(), relative_step=1e-2)
    expected = [g["lr"] for g in tnpeft.parameter_groups(model, relative_step=1e-2)]
    assert [g["lr"] for g in tnpeft.parameter_groups(model)] == expected
    assert {g["lr"] for g in tnpeft.parameter_groups(model, lr=0.25)} == {0.25}
    with pytest.raises(NetworkError, match="no learning rate"):
        tnpeft.parameter_groups(attached())


def test_structure_rule_on_a_model():
    model = attached(families.lora(rank=4))
    groups = {g["name"]: g["lr"] for g in tnpeft.parameter_groups(model, relative_step=1e-3, rule="structure")}
    assert groups["B"] / groups["A"] == pytest.approx(16 / 4)
    with pytest.raises(NetworkError, match="rule='best' is unknown"):
        tnpeft.parameter_groups(model, relative_step=1e-3, rule="best")


# ---- measured


def test_a_coordinate_check_has_a_picture_and_refuses(tmp_path):
    model = attached()
    tnpeft.coordinate_check(model, {"x": torch.randn(4, 16)}).plot(tmp_path / "steps.svg")
    assert (tmp_path / "steps.svg").stat().st_size > 1000
    model.merge_adapter()
    with pytest.raises(NetworkError, match="merged"):
        tnpeft.coordinate_check(model, torch.randn(4, 16))
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(NetworkError, match="moves no factor"):
        tnpeft.coordinate_check(model, torch.randn(4, 16))


def test_measured_rates_move_outputs_by_the_relative_step():
    model, x = attached(families.lora(rank=4)), torch.randn(64, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    groups = tnpeft.parameter_groups(model, relative_step=1e-2, rule="measured", batch=x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rows = [row for row in tnpeft.coordinate_check(model, x).rows if row.factor == "B"]
    linears = [m for m in model.modules() if hasattr(m, "updates")]
    seen = {}
    hooks = [m.base_layer.register_forward_hook(lambda m, i, o: seen.setdefault(m, o.detach())) for m in linears]
    model(x)
    for hook in hooks:
        hook.remove()
    for linear, row in zip(linears, rows, strict=True):
        bias = linear.base_layer.bias.detach()
        size = float((seen[linear.base_layer] - bias).square().mean().sqrt())
        assert rate_of(groups, linear.tnpeft_factors["default"].B) * row.measured == pytest.approx(
            0.5e-2 * size, rel=1e-4
        )
    with pytest.raises(NetworkError, match="on a batch"):
        tnpeft.parameter_groups(model, relative_step=1e-2, rule="measured")
