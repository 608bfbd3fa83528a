"""What a batch shows of every kind of weight: the measured change is that of a finite step; rates follow from it."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from weight_kinds import CALLED, LISTED, RAW, Kind, shake

import tnpeft
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.sites.parameter import TensorNetworkParameter
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.networks import NetworkError

KINDS = {**CALLED, **RAW, **LISTED}
LINES: dict[str, dict[str, Any]] = {
    "tucker": {"network": tnpeft.families.tucker(2)},
    "cp": {"network": tnpeft.families.cp(3)},  # columns of length one
    "square": {"network": tnpeft.families.cara()},  # slices
}


def adapted(kind: Kind, **options: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    config = tnpeft.TensorNetworkConfig(target_modules=[*kind.targets], axes=dict(kind.axes), **options)
    return peft.get_peft_model(copy.deepcopy(kind.make().double()), config).double().eval()


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_measured_change_is_that_of_a_finite_step(kind: str, line: str) -> None:
    its = KINDS[kind]
    model, x = adapted(its, **LINES[line]), its.example()[:2]
    shake(model, its.spread)
    check = tnpeft.coordinate_check(model, x)
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
    model, x = adapted(its, **LINES["tucker"]), its.example()
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
    model = adapted(its, network=line, ranks={"r": 2}, stack={"scene": 2})
    tnpeft.select(model, scene=1)
    assert tnpeft.coordinate_check(model, its.example()).rows
    tnpeft.select(model, scene=[0, 1])
    with pytest.raises(NetworkError, match="a value of 'scene' for each row, not one update"):
        tnpeft.coordinate_check(model, its.example())


def test_an_adapter_beside_the_active_one_is_not_measured() -> None:
    model = adapted(KINDS["embedding"], **LINES["tucker"])
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(NetworkError, match="moves no factor of 'other' at any of 2 sites\nactivate the adapter"):
        tnpeft.coordinate_check(model, KINDS["embedding"].example(), "other")
