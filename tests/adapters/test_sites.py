"""Modules to sites: the same sites as the model cards count, on every architecture, and any tree by pattern."""

from __future__ import annotations

import peft
import pytest
import torch
from adapter_models import MODELS, opt
from expert_models import mixture
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

import tnpeft
from tnpeft.adapters.placement import check_memory
from tnpeft.adapters.sites.weight import Weight
from tnpeft.adapters.state import bank_of
from tnpeft.adapters.targets import resolve, select
from tnpeft.layout import layout
from tnpeft.models import cards
from tnpeft.networks import Factorization, NetworkError, Site

CASES = {
    "opt": ["v_proj", "q_proj", "k_proj", "out_proj", "fc2", "fc1"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn_c_proj", "c_fc", "mlp_c_proj"],
    "bert": ["query", "key", "value", "attn_output", "intermediate", "output"],
    "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
}


def chosen(model: nn.Module, targets: list[str]) -> dict[str, Weight]:
    found, _ = resolve(model, targets)
    return {n: Weight.of(m) for n, m in model.named_modules() if any(f".{n}".endswith(f".{t}") for t in found)}


@pytest.mark.parametrize("name", sorted(CASES))
def test_sites_are_those_that_the_card_counts(name: str) -> None:
    model = MODELS[name]()
    targets = CASES[name]
    found = select(model, chosen(model, targets), resolve(model, targets)[1])
    wanted = cards.sites(model.config, targets)
    ours = {(s.layer, s.proj, s.out, s.inp, s.heads, s.start) for s in found.sites}
    assert ours == {(s.layer, s.proj, s.out, s.inp, s.heads, s.start) for s in wanted}
    by_place = {(s.layer, s.proj): s.module for s in wanted}
    assert all(s.module.endswith(by_place[s.layer, s.proj]) for s in found.sites)
    assert set(found.layers.values()) == {0, 1}


def test_users_order_comes_first() -> None:
    model = opt()
    modules = chosen(model, ["v_proj", "q_proj"])
    assert select(model, modules, ["v_proj", "q_proj"]).projections == {"v_proj": 0, "q_proj": 1}
    assert select(model, modules).projections == {"q_proj": 0, "v_proj": 1}


def test_layers_are_counted_as_numbers() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(4, 4)}) for _ in range(12))})
    modules = {n: Weight.of(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = select(model, modules)
    assert [s.module for s in found.sites] == [f"blocks.{k}.lin" for k in range(12)]
    assert [s.layer for s in found.sites] == [*range(12)]


def test_unknown_trees_tell_modules_of_a_layer_apart() -> None:
    block = {"self": nn.ModuleDict({"q": nn.Linear(4, 4)}), "cross": nn.ModuleDict({"q": nn.Linear(4, 4)})}
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(block)]), "head": nn.Linear(4, 2)})
    modules = {n: Weight.of(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = select(model, modules)
    assert {(s.proj, s.module) for s in found.sites} == {
        ("self_q", "blocks.0.self.q"), ("cross_q", "blocks.0.cross.q"), ("head", "head"),
    }  # fmt: skip


def test_targets_by_role_default_and_all_linear() -> None:
    def projections(target: object) -> set[str]:
        config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 1}, target_modules=target)
        model = peft.get_peft_model(MODELS["gpt2"](), config)
        return set(model.peft_config["default"].projections)

    assert projections(None) == {"c_attn/out:0", "c_attn/out:2"}
    assert projections(["q", "v"]) == {"c_attn/out:0", "c_attn/out:2"}
    assert projections("all-linear") == {
        "c_attn/out:0", "c_attn/out:1", "c_attn/out:2", "attn_c_proj", "c_fc", "mlp_c_proj",
    }  # fmt: skip
    assert projections(r".*\.c_fc") == {"c_fc"}


@pytest.mark.parametrize("excluded", [None, ["v_proj"]])
def test_the_default_targets_of_a_model_with_experts(excluded: list[str] | None) -> None:
    import peft

    model = peft.get_peft_model(mixture(), tnpeft.TensorNetworkConfig(network="lora", exclude_modules=excluded))
    assert [*model.peft_config["default"].projections] == ["q_proj", "v_proj"][: 2 - bool(excluded)]


def test_layers_to_transform_and_exclusions() -> None:
    config = tnpeft.TensorNetworkConfig(
        network="lora", target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=["v_proj"]
    )
    model = peft.get_peft_model(opt(layers=3), config)
    saved = model.peft_config["default"]
    assert saved.layers == {"model.decoder.layers.1": 0}
    assert saved.projections == {"q_proj": 0}
    config = tnpeft.TensorNetworkConfig(
        network="lora", target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers"
    )
    saved = peft.get_peft_model(opt(layers=3), config).peft_config["default"]
    assert saved.layers == {"model.decoder.layers.0": 0, "model.decoder.layers.2": 1}


def test_start_values_do_not_depend_on_order_dtype_or_depth() -> None:
    def start(model: nn.Module, targets: list[str]) -> dict[str, torch.Tensor]:
        config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=targets, seed=7)
        state = peft.get_peft_model(model, config).state_dict()
        return {name: value for name, value in state.items() if "tnpeft" in name}

    one = start(opt(layers=3), ["q_proj", "v_proj"])
    for other in (start(opt(layers=3), ["v_proj", "q_proj"]), start(opt(layers=3).bfloat16(), ["q_proj", "v_proj"])):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    two = start(opt(layers=2), ["q_proj"])
    assert all(torch.equal(value, one[name]) for name, value in two.items())


@pytest.mark.parametrize("family", ["c3a", "dota", "kradapter", "lora", "randlora", "tt_matrix"])
def test_families_at_their_defaults_are_far_from_the_limit_on_memory(family: str) -> None:
    for out, inp in ((4096, 4096), (768, 768), (3072, 768)):
        sites = [Site(0, "q_proj", out, inp)]
        check_memory(layout(tnpeft.families.get(family)(), sites), tokens=64)  # no error, no warning


def test_a_plan_hundreds_of_times_as_large_as_the_linear_is_warned_of_or_refused() -> None:
    # Every two factors share a bond: whichever product comes first, its result has four of them.
    line = "A[out a b c] B[a d e] C[b d f] D[c e f inp] -> out inp"
    found = layout(Factorization.of(line, ranks=dict.fromkeys("abcdef", 64)), [Site(0, "q_proj", 8, 8)])
    with pytest.raises(NetworkError, match=r"the update of q_proj \(8 x 8\) passes through [\d,]+ elements"):
        check_memory(found, tokens=64)
    with pytest.warns(UserWarning, match="passes through"):
        check_memory(found, tokens=64, refused=False)


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_pattern_of_layers_is_none(empty: object) -> None:
    given = {"network": "lora", "target_modules": ["q_proj"], "layers_to_transform": [1]}
    model = peft.get_peft_model(opt(), tnpeft.TensorNetworkConfig(**given, layers_pattern=empty))
    assert [*model.peft_config["default"].layers] == ["model.decoder.layers.1"]


def phi3() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Phi3ForCausalLM(Phi3Config(**sizes, **special, num_hidden_layers=1))


def test_squares_of_a_slice_are_where_the_slice_is() -> None:
    line = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
    config = tnpeft.TensorNetworkConfig(network=line, ranks={"r": 2}, square=True, target_modules=["gate_up_proj"])
    model = peft.get_peft_model(phi3(), config)
    projs = bank_of(model).layouts["default"].projs
    b = torch.zeros_like(tnpeft.factors(model)["B"])
    b[:, projs.index("gate_up_proj/out:1/out:1")] = 1.0
    tnpeft.set_factors(model, {"B": b})
    layer = model.base_model.model.model.layers[0].mlp.gate_up_proj
    x = torch.randn(3, 32)
    change = (layer(x) - layer.get_base_layer()(x)).abs().amax(0)
    assert change[:96].max() == 0 < change[96:].min()
    assert torch.allclose(x @ layer.get_delta_weight("default").T, layer(x) - layer.get_base_layer()(x), atol=1e-5)
    config = tnpeft.TensorNetworkConfig(network=line, ranks={"r": 2}, square=True, target_modules=["qkv_proj"])
    with pytest.raises(NetworkError, match="qkv_proj/out:1 is a slice of qkv_proj, and cut into squares it would be"):
        peft.get_peft_model(phi3(), config)
