"""What cannot be attached is refused with what is wrong and what to do, and leaves no trace in the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from adapter_models import LORA, adapted, config, opt
from expert_models import mixture
from failing_steps import refused
from torch import Tensor, nn
from transformers import OPTConfig, OPTForSequenceClassification
from weight_kinds import Attention, Gated, Mixtures

import tnpeft
from tnpeft.networks import NetworkError

LINE = {"network": LORA, "ranks": {"r": 3}, "target_modules": ["q_proj", "v_proj"]}
TUKA = {"network": tnpeft.families.tuka(ranks=(2, 3, 2, 2)), "ranks": {}}
SCENES = {"scene": 4, "env": 3}
TASK = "A[out r] B[r inp] T[task r] L[layer r] -> task layer out inp"


def replicas(**fields: Any) -> dict[str, Any]:
    return {"replicas": 2, **{f"replica_{name}": value for name, value in fields.items()}}


# ---- what no model could have


DECLARED: list[tuple[dict[str, Any], str]] = [
    ({"scale": float("nan")}, "scale is nan"),
    ({"scale": 0}, "zero for ever"),
    ({"scale": 10**5000}, "scale is a number of more than 4,300 digits"),
    ({"ranks": 4}, "ranks is 4"),
    ({"ranks": {"r": 0}}, "size of 'r' is 0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"seed": -1}, "seed is -1"),
    ({"bias": "some"}, "bias is some"),
    ({"relative_step": -1}, "relative_step is -1"),
    ({"network": 3}, "network= is int"),
    ({"network": "no_such_family"}, "no family is called 'no_such_family'"),
    ({"network": {"schema": 1}}, "lines"),
    ({"network": "A[layer proj out kh] -> layer proj out (inp kh)"}, "no factor carries the output index 'inp'"),
    ({"init": {"B": "zeros", "A": "zeros"}}, "both start at zero"),
    ({"rank_pattern": {"v_proj": 1}}, "rank pattern of 'v_proj' is 1"),
    ({"rank_pattern": {"v_proj": {"q": 1}}}, "not a bond"),
    ({"target_modules": 5}, "target_modules is 5\npass a list of names, a regular expression, or None"),
    ({"modules_to_save": ["(a+)+"]}, "modules_to_save"),
    ({"layers_pattern": ["(a+)+"], "layers_to_transform": [0]}, "layers_pattern"),
    ({"network": TASK, "ranks": {"r": 4}}, r"no row of a batch says which task it belongs to[\s\S]*adapter_names"),
    ({"replicas": 0}, "replicas is 0"),
    ({"replicas": True}, "replicas is True"),
    ({"replica_ranks": [{"r": 1}]}, "replica_ranks is for several replicas"),
    ({**replicas(), "dora": True}, "no magnitudes"),
    ({**replicas(), "bias": "all"}, "would share what bias trains"),
    ({**replicas(), "modules_to_save": ["lm_head"]}, "would share what modules_to_save trains"),
    (replicas(seeds=[1]), "1 entries for 2 replicas"),
    (replicas(seeds=[1, -1]), "replica_seeds is"),
    (replicas(ranks=[{"r": 1}]), "replica_ranks has 1 entries for 2 replicas"),
    (replicas(ranks=[{"r": 1}, {"r": 0}]), "replica_ranks is"),
    (replicas(ranks=[{"r": 1}, {"s": 2}]), "names 's', which is none of the bonds"),
    (replicas(scales=[1.0, float("inf")]), "replica_scales is"),
    ({**replicas(ranks=[{"r": 1}, {}]), "ranks": {"r": "min(out, 4)"}}, "may differ in scale, and in ranks"),
    ({**TUKA, "stack": {**SCENES, "user": 2}}, "stack declares 'user'"),
    ({**TUKA, "stack": {**SCENES, "layer": 2}}, "stack names 'layer'"),
    ({**TUKA, "stack": {"scene": 0, "env": 2}}, "stack is"),
    ({**TUKA, "stack": SCENES, "dora": True}, "a magnitude belongs to one update"),
    ({**TUKA, "stack": SCENES, "replicas": 2}, "replicas of a named stack"),
]


@pytest.mark.parametrize(("fields", "message"), DECLARED, ids=[message for _, message in DECLARED])
def test_a_configuration_that_no_model_could_have(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        tnpeft.TensorNetworkConfig(**{**LINE, **fields})


# ---- what a model cannot have


class Shifted(nn.Embedding):
    embed_scale = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


def of_one(make: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """A model of one layer, called 0, and another."""
    return lambda: nn.Sequential(make(*args, **options), nn.Linear(2, 2))


def beside_a_bank() -> nn.Module:
    return nn.ModuleDict({"factor_bank": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})


def classifier() -> nn.Module:
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
    return OPTForSequenceClassification(OPTConfig(**sizes))


def infinite() -> nn.Module:
    model = opt()
    model.model.decoder.layers[-1].self_attn.v_proj.weight.data[0, 0] = float("inf")
    return model


def experts(change: Callable[[Any], object], make: Callable[[], nn.Module] = mixture) -> Callable[[], nn.Module]:
    """A mixture whose last module of experts was changed."""

    def changed() -> nn.Module:
        model = make()
        change(model.layers[1].moe.experts if make is Mixtures else model.model.layers[1].mlp.experts)
        return model

    return changed


def quantised(its: Any) -> None:
    its.down_proj = nn.Parameter(its.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


ZERO, IN_PROJ = {"target_modules": ["0"]}, {"target_modules": ["in_proj"]}
OF_EXPERTS = {"network": "expert_cp", "ranks": {}, "target_modules": ["experts"]}
TIED = {"network": "B[layer proj out r] A[r inp] -> layer proj out inp", "ranks": {"r": 4}}
TIED |= {"rank_pattern": {"v_proj": {"r": 2}}}
RANDOM = {"network": "B[layer proj out r] ^A[r inp] -> layer proj out inp", "init": {"A": "normal"}}
PARTS = ("factors", "base_layer", "layer", "bank", "default")
ATTACHED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (opt, {"ranks": {"r": 10**12}}, "elements on this model, of which"),
    (opt, {"unit_norm": ["A", "B"]}, "unit norm, and starts at zero"),
    (opt, {"network": "~B[out r] ~A[r inp] -> out inp"}, "nothing to train"),
    (opt, {"network": LORA.replace("B[", "half["), "init": {}}, "factor of a model cannot be called 'half'"),
    (opt, {"rank_pattern": {"V_proj": {"r": 1}}}, "names 'V_proj'.*\n.*are q_proj, v_proj$"),
    (opt, {"rank_pattern": {"q_proj | k_proj": {"r": 1}}}, "names 'k_proj'"),
    (opt, {"rank_pattern": {"*_proj": {"r": 1}, "v_proj": {"r": 2}}}, "'v_proj' is never used"),
    (opt, {"rank_pattern": {"q_proj": {"r": 1}}, "square": True, "target_modules": ["fc1"]}, "are fc1/out:0"),
    (opt, {"target_modules": ["final_layer_norm"]}, "final_layer_norm is a LayerNorm, not a linear"),
    (opt, {"target_modules": ["no_such"]}, "no_such"),
    (opt, {**TUKA, "stack": {"scene": 4}}, "'env' has no meaning in a model"),
    (of_one(nn.Linear, 2, 2), {"target_modules": ["no_such"]}, "no_such"),
    *((opt, {"modules_to_save": [part]}, "a part of the adapter") for part in PARTS),
    (opt, {**TIED, **replicas(ranks=[{"r": 2}, {"r": 4}])}, "let projections share a factor"),
    (opt, {**RANDOM, **replicas()}, "replicas share constants"),
    (classifier, {**replicas(), "task_type": "SEQ_CLS"}, "would share what modules_to_save trains"),
    (infinite, {"init": {"A": "svd"}}, "finite"),
    (infinite, {"init": {"A": "normal(1e39)"}}, "finite"),
    (infinite, {"dora": True}, "finite"),
    (beside_a_bank, {"target_modules": ["q_proj"]}, "'factor_bank'"),
    (of_one(nn.Embedding, 8, 4, max_norm=1.0), ZERO, "0 has max_norm"),
    (of_one(nn.Embedding, 8, 4, scale_grad_by_freq=True), ZERO, "0 scales gradients by the frequency"),
    (of_one(nn.Embedding, 8, 4), {**ZERO, "dora": True}, "0 is an embedding, and the lengths that dora needs"),
    (of_one(Shifted, 8, 4), ZERO, "0 is a Shifted, which does more than look up rows"),
    (of_one(Standardised, 4, 4, 1), ZERO, "0 is a Standardised, which does more than convolve"),
    (of_one(nn.LazyConv2d, 4, 1), ZERO, "0 has no weight yet"),
    (of_one(nn.LazyLinear, 4), ZERO, "0 has no weight yet"),
    (
        of_one(nn.ConvTranspose2d, 4, 4, 1),
        ZERO,
        "ConvTranspose2d, and transposed convolutions are not adapted",
    ),
    (of_one(nn.LayerNorm, 4), ZERO, "0 is a LayerNorm, not a linear"),
    *(
        (of_one(cls, 64, 48, dtype=dtype), ZERO, f"0 is a {cls.__name__}, which does more than a linear")
        for cls in (Doubled, Pair)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    (Attention, {**IN_PROJ, "dropout": 0.1}, "in_proj is read by its module itself, and dropout needs the input"),
    (Attention, {**IN_PROJ, "replicas": 2}, "in_proj is read by its module itself, and replicas needs the input"),
    (
        Attention,
        {"target_modules": ["attn"]},
        "not a linear.*\ntarget its in_proj, which holds",
    ),
    (Attention, {"target_modules": ["out_proj"]}, "reads its weight without calling it"),
    (Attention, {**IN_PROJ, "ranks": {"r": 10**7}}, "elements on this model"),
    (of_one(nn.Linear, 6, 8), {**OF_EXPERTS, **ZERO}, r"'expert' has no meaning on 0 \(8 x 6\): it is one matrix"),
    (mixture, {**OF_EXPERTS, "replicas": 2}, "experts cannot be trained as several replicas"),
    (
        experts(lambda its: setattr(its, "_is_expert_parallel", True)),
        OF_EXPERTS,
        "layers.1.mlp.experts holds only some of the experts",
    ),
    (
        experts(lambda its: delattr(its, "is_transposed")),
        OF_EXPERTS,
        "layers.1.mlp.experts.gate_up_proj holds 4 matrices of 32 x 32, and nothing says which axis is",
    ),
    (experts(quantised), OF_EXPERTS, "layers.1.mlp.experts is a MixtralExperts, whose experts are quantised"),
    (
        experts(lambda its: its.__setitem__(2, Gated(16, 8)), Mixtures),
        OF_EXPERTS,
        r"the experts of layers.1.moe.experts.\*.w1 differ: 8 x 16 and 16 x 16",
    ),
    (experts(lambda its: setattr(its[2], "w1", Doubled(16, 16)), Mixtures), OF_EXPERTS, "Doubled"),
    (Mixtures, {"target_modules": ["layers"]}, "layers is a ModuleList, not a linear"),
    (Mixtures, {**OF_EXPERTS, "target_modules": ["gate"]}, "'expert' has no meaning on gate"),
]


@pytest.mark.parametrize(("make", "fields", "message"), ATTACHED, ids=[message for *_, message in ATTACHED])
def test_a_configuration_that_does_not_fit_its_model(
    make: Callable[[], nn.Module], fields: dict[str, Any], message: str
) -> None:
    model, its = make(), tnpeft.TensorNetworkConfig(**{**LINE, **fields})
    with refused(model, message):
        peft.get_peft_model(model, its)


NAMES = ["half", "train", "keys", "type", "forward", "base_layer", "__base__", "tnpeft_factors"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's
@pytest.mark.parametrize("name", [*NAMES, "a.b", "", "\0", "\ud800"])
def test_a_name_that_no_adapter_can_have(name: str) -> None:
    with refused(model := opt(), "adapter"):
        peft.get_peft_model(model, config(), adapter_name=name)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize(
    ("name", "message"),
    [("default", "has an adapter 'default' already"), ("B", "'B' is called as one of the factors")],
)
def test_a_name_that_is_taken(name: str, message: str) -> None:
    model = adapted()
    own, base = model.peft_config["default"], model.get_base_model()
    with refused(base, message):
        if name == "default":
            peft.get_peft_model(base, config(ranks={"r": 6}))
        else:
            model.add_adapter(name, config())
    assert [*model.peft_config] == ["default"]
    assert model.peft_config["default"] is own


@pytest.mark.parametrize("targets", [["nothing"], "nothing.*"])
def test_targets_that_match_nothing_are_a_value_error_with_the_remedy(targets: Any) -> None:
    model = adapted()
    with refused(model, "nothing", ValueError):
        model.add_adapter("other", config(target_modules=targets))
    assert [*model.peft_config] == ["default"]
