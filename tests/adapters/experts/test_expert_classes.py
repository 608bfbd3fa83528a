"""Classes of experts that store their weights in other ways: each says how, and adapting them takes no more."""

from __future__ import annotations

import copy
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from adapter_models import shake
from torch import Tensor, nn

import tnpeft

HIDDEN, WIDTH, EXPERTS, ACTIVE = 16, 12, 4, 3
SIZES = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"),
    **{
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "moe_latent_size": None,
        "rms_norm_eps": 1e-6,
        "post_norm_eps": 1e-6,
    },
    **{"swiglu_alpha": 1.7, "swiglu_limit": 7.0, "num_experts_per_tok": ACTIVE},
}
GATED = {"gate_up_proj/out:0", "gate_up_proj/out:1", "down_proj"}
CLASSES = {
    "mixtral.MixtralExperts": GATED,
    "gpt_oss.GptOssExperts": GATED,  # transposed, gate and up in turn, biases
    "aria.AriaExperts": GATED,  # transposed
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": GATED,  # transposed, biases
    "nemotron_h.NemotronHExperts": {"up_proj", "down_proj"},  # no gate
    "muse_spark.MuseSparkExperts": GATED,  # a norm behind
    "gemma4.Gemma4TextExperts": GATED,
}


class Layers(nn.Module):
    """A model that is nothing but a module of experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": experts})])

    def forward(self, *args: Tensor) -> Tensor:
        result: Tensor = self.layers[0]["experts"](*args)
        return result


def built(name: str, implementation: str) -> nn.Module:
    module, _, cls = name.partition(".")
    torch.manual_seed(0)
    config: Any = SimpleNamespace(**SIZES, _experts_implementation=implementation)
    experts = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), cls)(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return Layers(experts).requires_grad_(False)


def routed() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:ACTIVE] for _ in range(9)])
    return torch.randn(9, HIDDEN, generator=generator), index, torch.rand(9, ACTIVE, generator=generator)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_how_it_stores_its_weights(name: str, implementation: str) -> None:
    base, batch = built(name, implementation), routed()
    config = tnpeft.TensorNetworkConfig(network=tnpeft.families.expert_cp(3), target_modules=["experts"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    assert {row.site for row in tnpeft.explain(model).rows} == CLASSES[name]
    plain = base(*batch)
    assert torch.allclose(model(*batch).detach(), plain, atol=1e-6 * float(plain.abs().max()))
    shake(model)
    output = model(*batch)
    adapted = output.detach()
    assert not torch.allclose(adapted, plain, atol=1e-2)
    model.merge_adapter()
    assert torch.allclose(model(*batch), adapted, atol=1e-5 * float(adapted.abs().max()))
    model.unmerge_adapter()
    output.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and bool(grad.any()) for grad in grads)
