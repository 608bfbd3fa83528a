"""Small functions that the tests of whole adapters do not meet in all their cases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import tnpeft
from tnpeft.adapters.attach import check_name
from tnpeft.adapters.config_validation import shown
from tnpeft.adapters.layer.bank import AdaptedLayer, FactorBank, FactorStore, find_bank
from tnpeft.adapters.layer.binding import SiteUpdate, as_base_factor
from tnpeft.adapters.layer.merging import rescaling, wide
from tnpeft.adapters.layer.mixed_batch import BatchAdapterNames, check_names, rows_for_each
from tnpeft.adapters.layer.snapshot import WeightSnapshot
from tnpeft.adapters.layer.weight_cache import versions
from tnpeft.adapters.placement import check_patterns, extract_replica, match_parameters
from tnpeft.adapters.replicas.batch import expect_blocks
from tnpeft.adapters.rollback import or_as_before, outside
from tnpeft.adapters.sites.selection import choose, described
from tnpeft.adapters.sites.weight import features
from tnpeft.adapters.state import entries
from tnpeft.adapters.targets import names_by_path
from tnpeft.adapters.weighted_sum import carriers, direct_sum
from tnpeft.layout import layout
from tnpeft.networks import ConfigError, Factorization, NetworkError, Site, replicated

LORA = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2})
SITE = Site(0, "q", 3, 4)


def test_a_value_is_shown_short_and_whatever_it_is() -> None:
    assert [shown(value) for value in (5, "", 10**5000)] == ["5", "''", "a number of more than 4,300 digits"]
    with pytest.raises(ConfigError, match="target_modules is 5\npass a list of names, a regular expression, or None"):
        tnpeft.TensorNetworkConfig(target_modules=5)


def test_the_end_of_a_path_that_tells_modules_of_a_layer_apart_is_the_projection() -> None:
    names = names_by_path(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc"])
    assert names["h.0.mlp.c_proj"] == ("h.0", "mlp_c_proj")
    assert names["h.0.mlp.c_fc"] == ("h.0", "c_fc")


def test_features_of_an_embedding_and_of_a_grouped_convolution() -> None:
    assert features(nn.Embedding(7, 2)) == (2, 7)
    assert features(nn.Conv2d(8, 6, 3, groups=2)) == (6, 36)


def test_an_adapter_is_not_called_as_one_of_its_factors() -> None:
    with pytest.raises(NetworkError, match="the adapter 'A' is called as one of the factors"):
        check_name("A", layout(LORA, [SITE]), None)


def test_an_entry_of_a_rank_pattern_names_projections_that_are_adapted() -> None:
    with pytest.raises(NetworkError, match="the rank pattern names 'v', and no adapted projection is called so"):
        check_patterns(LORA, ["v"], [SITE])


def test_a_sum_has_a_term_of_each_and_a_factor_that_takes_its_weight() -> None:
    total = direct_sum([LORA, LORA.with_ranks(r=4)], [[SITE]] * 2)
    assert str(total.network) == "B_1[out r_1] A_1[r_1 inp] + B_2[out r_2] A_2[r_2 inp] -> out inp"
    assert carriers(total) == ("B_1", "B_2")


def test_an_array_at_chosen_values() -> None:
    array, rows = torch.arange(6).reshape(2, 3), torch.tensor([2, 2, 0])
    assert choose(array, ((0, "scene"),), {"scene": torch.tensor(1)}).tolist() == [3, 4, 5]
    assert choose(array, ((1, "scene"),), {"scene": rows}).T.tolist() == [[2, 2, 0], [5, 5, 3]]
    assert described(("scene", "env"), {"scene": torch.tensor(3)}) == "scene = 3, env is not chosen"


def test_names_and_axes_of_the_stacks_of_a_factor() -> None:
    shared = Factorization.of("B[layer out r] A[r inp] -> layer out inp", ranks={"r": 2})
    found = [(name, len(pieces), grid) for name, pieces, grid in entries(layout(shared, [SITE]))]
    assert found == [("B", 1, (True, False)), ("A", 1, (False, False))]


def test_parameters_of_replicas_are_those_of_one_with_an_axis_more() -> None:
    many = layout(replicated(LORA, LORA.with_ranks(r=1)), [SITE], stack={"replica": 2})
    pairs = match_parameters(many, extract_replica(many, LORA))
    assert [(a.label, a.shape, b.shape) for a, b in pairs] == [("B", (2, 3, 2), (3, 2)), ("A", (2, 2, 4), (2, 4))]


def test_batches_of_replicas_are_checked_once() -> None:
    model = nn.Linear(2, 2)
    expect_blocks(model)
    expect_blocks(model)
    assert len(model._forward_pre_hooks) == 1


def test_what_fails_leaves_a_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2))

    @or_as_before(model)
    def failing() -> None:
        model.more = nn.Linear(2, 2)
        del model[0]
        raise KeyError("planned")

    with pytest.raises(KeyError, match="planned"):
        failing()
    assert [name for name, _ in outside(model)] == ["", "0"]


# ---- adapted layers


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
def test_versions_are_the_same_until_a_tensor_changes(change: object) -> None:
    factor = nn.Parameter(torch.ones(1))
    before = versions([factor])
    assert versions([factor]) == before
    assert versions([factor, factor]) != before
    with torch.no_grad():
        change(factor)  # type: ignore[operator]
    assert versions([factor]) != before
