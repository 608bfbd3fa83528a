"""What a batch shows of every kind of weight: the measured change is that of a finite step; rates follow from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from failing_steps import assert_same, fingerprint
from torch import Tensor, nn
from weight_kinds import CALLED, LISTED, PLAIN, RAW, attached, shake

import tnpeft
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.sites.parameter import TensorNetworkParameter
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.networks import NetworkError

KINDS = {**CALLED, **RAW, **LISTED, **PLAIN}
LINES: dict[str, dict[str, Any]] = {
    "tucker": {"network": tnpeft.families.tucker(2)},
    "cp": {"network": tnpeft.families.cp(3)},  # columns of length one
    "square": {"network": tnpeft.families.cara()},  # slices
}
OF_LINEARS = {name: {"network": tnpeft.families.get(name)()} for name in ("lora", "moslora", "lotr", "vera", "hira")}
CASES = [*((kind, line) for kind in KINDS for line in LINES), *(("linear", line) for line in OF_LINEARS)]


@pytest.mark.parametrize(("kind", "line"), CASES)
def test_the_measured_change_is_that_of_a_finite_step(kind: str, line: str) -> None:
    its = KINDS[kind]
    (_, model), x = attached(kind, **(LINES | OF_LINEARS)[line]), its.example()[:2]
    model.train()
    at_start = tnpeft.coordinate_check(model, x)
    assert kind != "linear" or all(row.predicted == 0 or 0.05 < row.ratio < 5 for row in at_start.rows), at_start
    shake(model, its.spread)
    before = fingerprint(model)
    check = tnpeft.coordinate_check(model, x)
    assert_same(fingerprint(model), before)  # and it trains on
    assert all(p.grad is None for p in model.parameters())
    assert "predicted" in str(check)
    model.eval()
    measured = {(row.layer, row.proj, row.factor): row.measured for row in check.rows}
    reached = {row.site for row in tnpeft.explain(model).rows} - {"embed/inp:1"}  # whose tokens the batch lacks
    assert all(row.measured > 0 for row in check.rows if row.proj in reached)
    layers = [module for module in model.modules() if isinstance(module, DenseLinear)]
    inputs: dict[nn.Module, Any] = {}
    hooks = [layer.register_forward_pre_hook(lambda m, args: inputs.setdefault(m, args[0])) for layer in layers]
    model(x).float().square().mean().backward()
    for hook in hooks:
        hook.remove()
    held, step = arrays(model, bank_of(model), "default"), 1e-5

    def outputs(site: Any) -> Tensor:
        found = []
        for layer in layers:
            for item in (item for item in layer.updates["default"] if item.site_layout.site == site):
                if isinstance(layer, TensorNetworkParameter):
                    delta = layer.get_delta_weight("default")
                    found.append(delta[:, :1024] if not item.side else delta[item.start : item.start + item.length])
                elif layer in inputs:
                    found.append(layer(inputs[layer]))
        return torch.cat([part.flatten() for part in found])

    places = bank_of(model).layouts["default"].site_layouts
    for place in places:
        others = [p for p in places if p.site.module == place.site.module and p is not place]  # slices of one layer
        for label, param in place.parameters.items():
            if param.kind != "trainable" or any(param in other.parameters.values() for other in others):
                continue
            array, sign = held[param], held[param].grad.sign()
            with torch.no_grad():
                before = outputs(place.site)
                array += step * sign
                moved = (outputs(place.site) - before) / step
                array -= step * sign
            size = float(moved.square().mean().sqrt())
            assert measured[place.site.layer, place.site.proj, label] == pytest.approx(size, rel=1e-3), label


@pytest.mark.parametrize("kind", KINDS)
def test_rates_by_rule_move_every_kind(kind: str) -> None:
    its = KINDS[kind]
    (_, model), x = attached(kind, **LINES["tucker"]), its.example()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for rule, more in {"gain": {}, "structure": {}, "measured": {"batch": x}}.items():
        groups = tnpeft.parameter_groups(model, relative_step=1e-2, rule=rule, **more)
        count = sum(p.numel() for group in groups for p in group["params"])
        assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert all(0 < group["lr"] < 100 for group in groups)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_updates_are_not_one_to_be_measured() -> None:
    its = KINDS["embedding"]
    line = "B[layer proj scene out r] A[layer proj r inp] -> layer proj scene out inp"
    _, model = attached("embedding", network=line, ranks={"r": 2}, stack={"scene": 2})
    tnpeft.select(model, scene=1)
    assert tnpeft.coordinate_check(model, its.example()).rows
    tnpeft.select(model, scene=[0, 1])
    with pytest.raises(NetworkError, match="a value of 'scene' for each row, not one update"):
        tnpeft.coordinate_check(model, its.example())


def test_an_adapter_beside_the_active_one_is_not_measured() -> None:
    _, model = attached("embedding", **LINES["tucker"])
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(NetworkError, match="moves no factor of 'other' at any of 2 sites\nactivate the adapter"):
        tnpeft.coordinate_check(model, KINDS["embedding"].example(), "other")
