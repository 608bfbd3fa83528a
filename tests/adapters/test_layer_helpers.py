"""Small functions of adapted layers that the tests of whole adapters do not meet in all their cases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tnpeft.adapters.layer.bank import AdaptedLayer, FactorBank, FactorStore, find_bank
from tnpeft.adapters.layer.binding import SiteUpdate, as_base_factor
from tnpeft.adapters.layer.merging import rescaling, wide
from tnpeft.adapters.layer.mixed_batch import BatchAdapterNames, check_names, rows_for_each
from tnpeft.adapters.layer.snapshot import WeightSnapshot
from tnpeft.adapters.layer.weight_cache import VersionStamp
from tnpeft.layout import layout
from tnpeft.networks import ConfigError, Factorization, NetworkError, Site


def test_what_is_trained_is_a_parameter_and_the_rest_a_buffer() -> None:
    own = FactorStore()
    own.add("B", torch.zeros(2), trained=True)
    own.add("A", torch.zeros(2), trained=False, kept=False)
    assert [*own.state_dict()] == ["B"]
    assert own.get("B").requires_grad
    assert own.table("A") is own._buffers
    with pytest.raises(NetworkError, match="a factor of a model cannot be called 'half'"):
        own.add("half", torch.zeros(2), trained=True)


def test_the_bank_is_found_and_is_no_layer_to_convert() -> None:
    bank = FactorBank()
    assert find_bank(nn.Sequential(nn.Linear(2, 2), bank)) is bank
    assert find_bank(nn.Linear(2, 2)) is None
    assert isinstance(bank, BaseTunerLayer)
    assert not isinstance(bank, AdaptedLayer)
    with pytest.raises(ConfigError, match="the model is '5'"):
        find_bank(5)


def test_operands_have_owners_and_constants_the_shape_of_their_factor() -> None:
    line = Factorization.of("d[layer proj out] ^W[out inp] A[r inp] C[out r] -> layer proj out inp", ranks={"r": 2})
    item = SiteUpdate(layout(line, [Site(0, "q", 2, 3, module="q")]).site_layouts[0], (), ("W",), 1.0, 64)
    found = {operand.key: operand.source for operand in item.operands}
    assert found == {"d": "site", "W": "base", "A": "bank", "C": "bank"}
    assert as_base_factor(item, "W", torch.ones(2, 3)).shape == (2, 3)


def test_rows_of_zeros_have_no_direction_and_half_precision_is_widened() -> None:
    assert rescaling(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 0.0])).tolist() == [0.5, 1.0]
    assert wide(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert wide(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_a_restored_module_has_the_very_parameters() -> None:
    linear = nn.Linear(2, 2)
    kept = WeightSnapshot.of(linear)
    linear.weight = nn.Parameter(linear.weight * 2)
    assert kept.restore().weight is kept.parameters["weight"]


def test_names_of_rows_and_of_tokens_as_rows() -> None:
    named = BatchAdapterNames(["a", "b"])
    named.enter(nn.Identity(), (torch.ones(2, 3, 5),), {})
    assert named.of(torch.ones(2, 3, 5)) == named.of(torch.ones(3, 2, 5)) == ["a", "b"]
    assert named.of(torch.ones(6, 5)) == ["a", "a", "a", "b", "b", "b"]
    assert rows_for_each({"num_beams": 2}, nn.Identity()) == 2
    for names, message in (([], "adapter_names is empty"), (["a", "__base__"], "unknown adapter 'a'\nthe adapters")):
        with pytest.raises(NetworkError, match=message):
            check_names(names, {"b": SimpleNamespace(replicas=1)})


def _added(factor: Tensor) -> None:
    factor.add_(1)


def _moved(factor: Tensor) -> None:
    factor.data = factor.data.clone()


def _frozen(factor: Tensor) -> None:
    factor.requires_grad_(False)


def _cast(factor: Tensor) -> None:
    factor.data = factor.data.double()


def _stepped(factor: Tensor) -> None:
    torch.optim.SGD([torch.ones(1)]).step()


@pytest.mark.parametrize("change", [_added, _moved, _frozen, _cast, _stepped])
def test_a_stamp_holds_until_a_tensor_changes(change: object) -> None:
    factor = nn.Parameter(torch.ones(1))
    stamp = VersionStamp([factor])
    assert stamp.holds([factor])
    assert not stamp.holds([factor, factor])
    with torch.no_grad():
        change(factor)  # type: ignore[operator]
    assert not stamp.holds([factor])
