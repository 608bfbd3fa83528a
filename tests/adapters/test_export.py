"""Export to LoRA: PEFT loads the same outputs, exactly where the cut allows, else with the stated error."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from adapter_models import bert, gpt2, logits, opt
from expert_models import attached
from oracles import close

import tnpeft
from tnpeft.networks import NetworkError, Site, network
from tnpeft.nn.init.philox import normal
from tnpeft.nn.lowrank import cut, cut_rank, sides

EPS = torch.finfo(torch.float32).eps


def random(shape, *key) -> torch.Tensor:
    return torch.from_numpy(normal(int(torch.Size(shape).numel()), *key).reshape(tuple(shape)))


def adapted(base: torch.nn.Module, network, targets=("q_proj", "v_proj"), **fields) -> peft.PeftModel:
    """A copy of the model with an adapter, all of whose trained parameters are random."""
    model = attached(base, network, targets, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * random(parameter.shape, 0, name))
    return model


def loaded(base: torch.nn.Module, folder) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


def alike(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    return close(logits(other), logits(model), least=0.0)


# families whose smallest cut, at width 32, leaves a thin exact pair: name -> fields, rank
EXACT = {
    "lora": ({"ranks": {"r": 3}, "scale": 2.0}, 3),
    "vera": ({"ranks": {"r": 5}}, 5),
    "cp": ({"ranks": {"r": 4}}, 4),
    "lotr": ({"ranks": {"a": 4, "b": 3}}, 3),
    "metatt_4d": ({"ranks": {"a": 4, "b": 3, "c": 4}}, 3),
    "miss": ({}, None),
    "loha": ({"ranks": {"r": 2, "s": 3}}, 6),
    "gralora": ({}, None),
}


@pytest.mark.parametrize("family", EXACT)
def test_an_exact_export_loads_in_peft_and_gives_the_same_outputs(family, tmp_path):
    fields, rank = EXACT[family]
    base = opt()
    model = adapted(base, family, **fields)
    report = tnpeft.export_lora(model, tmp_path, rank=32)
    assert all(row.exact and row.error == 0 for row in report.rows)
    assert rank is None or {row.rank for row in report.rows} == {rank}
    theirs = loaded(base, tmp_path)
    assert theirs.peft_config["default"].peft_type == "LORA"
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    assert alike(model, theirs)


def test_a_lora_gives_its_own_factors_back_bit_for_bit(tmp_path):
    model = adapted(opt(), "lora", ranks={"r": 3}, scale=1.0)
    tnpeft.export_lora(model, tmp_path)
    lora = loaded(opt(), tmp_path)
    own = tnpeft.factors(model)
    for name, module in lora.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            layer, proj = int(name.split(".")[3]), ("q_proj", "v_proj").index(name.rpartition(".")[2])
            assert torch.equal(module.lora_B["default"].weight, own["B"][layer, proj])
            assert torch.equal(module.lora_A["default"].weight, own["A"][layer, proj])
            assert module.scaling["default"] == 1.0


def test_a_truncated_export_is_the_best_and_states_its_error(tmp_path):
    model = adapted(opt(), "loha", ranks={"r": 4, "s": 4})
    report = tnpeft.export_lora(model, tmp_path, rank=5)
    lora = loaded(opt(), tmp_path)
    for row in report.rows:
        layer = model.get_base_model().get_submodule(row.module)
        delta = layer.get_delta_weight("default").double()
        found = lora.get_base_model().get_submodule(row.module).get_delta_weight("default").double()
        values = torch.linalg.svdvals(delta)
        best = float(values[5:].norm() / values.norm())
        assert not row.exact
        assert (row.rank, row.cut) == (5, 16)
        assert abs(row.error - best) < 1e-6
        assert abs(float((found - delta).norm() / delta.norm()) - best) < 1e-6
    assert report.error == max(row.error for row in report.rows)
    assert "at most" in str(report)
    assert "0 exact" in str(report)


def test_an_update_of_full_cut_is_cut_where_two_factors_are_no_larger(tmp_path):
    model = adapted(opt(), "krona", ("fc1",))
    report = tnpeft.export_lora(model, tmp_path)
    assert {(row.rank, row.cut) for row in report.rows} == {(64 * 32 // 96, 0)}
    whole = tnpeft.export_lora(model, tmp_path, rank=32)
    assert {row.rank for row in whole.rows} == {32}
    assert whole.error < 1e-6


def test_ranks_that_differ_and_slices_of_a_fused_linear(tmp_path):
    base = gpt2()
    line = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
    targets = ["c_attn/out:0", "c_attn/out:2", "c_fc"]
    model = adapted(base, line, targets, ranks={"r": 3}, rank_pattern={"c_fc": {"r": 2}})
    report = tnpeft.export_lora(model, tmp_path)
    assert {row.module.rpartition(".")[2]: row.rank for row in report.rows} == {"c_attn": 6, "c_fc": 2}
    assert all(row.exact for row in report.rows)
    assert alike(model, loaded(base, tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_square_slices(tmp_path):
    base = opt()
    model = adapted(base, "fact_tt", ("q_proj", "fc1", "fc2"))
    tnpeft.export_lora(model, tmp_path, rank=32)
    assert alike(model, loaded(base, tmp_path))


def test_dora_is_exported_from_its_dense_change(tmp_path):
    model = adapted(opt(), "lora", ranks={"r": 2}, dora=True)
    report = tnpeft.export_lora(model, tmp_path, rank=32)
    lora = loaded(opt(), tmp_path)
    for row in report.rows:
        delta = model.get_base_model().get_submodule(row.module).get_delta_weight("default")
        found = lora.get_base_model().get_submodule(row.module).get_delta_weight("default")
        assert torch.allclose(found, delta, rtol=0, atol=64 * EPS * delta.norm())


def test_a_classifier_trained_in_full_goes_along(tmp_path):
    base = bert()
    model = adapted(base, "lora", ("query", "value"), ranks={"r": 2}, task_type="SEQ_CLS")
    tnpeft.export_lora(model, tmp_path)
    assert alike(model, loaded(base, tmp_path))
    assert (logits(model) - logits(base)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("line", "sizes", "size", "indices"),
    [
        ("B[o r] A[r i] -> o i", {"o": 9, "i": 8, "r": 3}, 3, {"r"}),
        ("b[o] ~B[o r] d[r] ~A[r i] -> o i", {"o": 9, "i": 8, "r": 3}, 3, {"r"}),
        ("w[r] A[o r] B[p r] C[i r] D[j r] -> (o p) (i j)", dict.fromkeys("opij", 4) | {"r": 5}, 5, {"r"}),
        ("B[o i a p] A[o i a j] -> (o p) (i j)", {"o": 2, "i": 2, "a": 2, "p": 9, "j": 8}, 8, {"a", "o", "i"}),
        ("D[o g] ^J[h] -> o (h g)", {"o": 9, "g": 2, "h": 6}, 2, {"g"}),
        ("a[o] b[i] -> o i", {"o": 9, "i": 8}, 1, set()),
        ("C[o1 i1] K[o2 i2] -> (o1 o2) (i1 i2)", {"o1": 2, "o2": 9, "i1": 3, "i2": 8}, 16, None),
        ("P[i a] Q[a o p b] R[b j] -> (o p) (i j)", {"i": 6, "a": 2, "o": 5, "p": 5, "b": 3, "j": 7}, 6, {"a", "b"}),
    ],
)  # fmt: skip
def test_the_sides_of_the_smallest_cut_multiply_to_the_matrix(line, sizes, size, indices):
    net = network(line)
    found = cut(net, net.terms[0], sizes)
    assert found.size == size == tnpeft.rank_bound(net, sizes)
    assert indices is None or set(found.indices) == indices
    arrays = {net.label(f): random([sizes[i] for i in f.indices], 1, f.name) for f in net.factors}
    left, right = sides(net, sizes, arrays)
    assert left.shape[1] == right.shape[0] == size
    dense = tnpeft.dense(net, arrays)
    assert torch.allclose(left @ right, dense, rtol=0, atol=64 * torch.finfo(torch.float64).eps * dense.abs().max())


@pytest.mark.filterwarnings("ignore::tnpeft.counting.cuts.RankWarning")  # default ranks on a narrow matrix
@pytest.mark.parametrize("family", tnpeft.families.names())
def test_the_cut_of_every_family_is_its_rank_bound(family):
    """Two programs for one number: partitions here, maximal flow in the counting."""
    f = tnpeft.families.get(family)()
    site = Site(0, "q_proj", 64, 64, 4)
    net = f.rule_for(site).network
    sizes = f.sizes({"layer": 2, "proj": 1, "basis": 2, "out": 64, "inp": 64, "heads": 4}, line=f.rule_for(site))
    alone = net.select(*net.stack)
    sizes = {index: sizes[index] for index in alone.indices}
    assert min(cut_rank(alone, sizes), 64) == tnpeft.rank_bound(alone, sizes)


def test_sums_twins_and_signs():
    net = network("G[o a] H[a i] - ~G[o a] ~H[a i] + u[o] v[i] -> o i")
    sizes = {"o": 9, "i": 8, "a": 2}
    arrays = {net.label(f): random([sizes[i] for i in f.indices], 1, net.label(f)) for f in net.factors}
    assert cut_rank(net, sizes) == 5
    left, right = sides(net, sizes, arrays)
    assert torch.allclose(left @ right, tnpeft.dense(net, arrays), atol=1e-13)


def test_a_chain_of_many_factors_is_cut_in_the_order_of_its_line():
    names = [f"g{k}" for k in range(18)]
    bonds = [f"b{k}" for k in range(17)]
    cores = [f"{n}[{' '.join([*bonds[max(k - 1, 0) : k], f'x{k}', *bonds[k : k + 1]])}]" for k, n in enumerate(names)]
    rows, cols = (" ".join(f"x{k}" for k in half) for half in (range(9), range(9, 18)))
    net = network(f"{' '.join(cores)} -> ({rows}) ({cols})")
    sizes = dict.fromkeys(net.indices, 2) | {"b8": 3}
    assert cut(net, net.terms[0], sizes).indices == ("b8",)


@pytest.mark.parametrize(
    ("change", "text"), [({"rank": 0}, "rank is 0"), ({"adapter": "other"}, "unknown adapter 'other'")]
)
def test_what_cannot_be_exported_is_refused(change, text, tmp_path):
    model = adapted(opt(), "lora", ranks={"r": 2})
    with pytest.raises(NetworkError, match=text):
        tnpeft.export_lora(model, tmp_path / "lora", **change)
    assert not (tmp_path / "lora").exists()


def test_a_value_for_each_row_is_not_one_lora(tmp_path):
    line = "B[scene layer proj out r] A[layer proj r inp] -> scene layer proj out inp"
    model = adapted(opt(), line, ranks={"r": 2}, stack={"scene": 2})
    tnpeft.select(model, scene=[0, 1])
    with pytest.raises(NetworkError, match="a value of 'scene' for each row, not one update"):
        tnpeft.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    tnpeft.select(model, scene=1)
    assert tnpeft.export_lora(model, tmp_path / "lora").rows
