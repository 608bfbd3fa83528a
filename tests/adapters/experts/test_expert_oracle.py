"""Fused experts: identity at the start, counts, and starts from the weight of every expert."""

from __future__ import annotations

import pytest
import torch
from expert_models import CONFIGS, attached, mixture, tokens

import tnpeft
from tnpeft.networks import Factorization


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_identity_at_the_start_and_counts(kind: str, implementation: str) -> None:
    base = mixture(kind, implementation)
    for f in (tnpeft.families.shared_outer_lora(rank=2), tnpeft.families.expert_cp(3), tnpeft.families.tucker()):
        model = attached(base, f)
        exact = implementation == "grouped_mm"  # the others multiply the same rows one by one, or elsewhere in memory
        for grad in (False, True):
            with torch.set_grad_enabled(grad), torch.no_grad() if not grad else torch.enable_grad():
                found, plain = model(tokens()).logits, base(tokens()).logits
            assert torch.equal(found, plain) if exact else torch.allclose(found, plain, atol=1e-5)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        stored = sum(p.numel() for p in model.state_dict().values() if p.dtype) and sum(
            value.numel() for name, value in model.state_dict().items() if ".tnpeft_" in name
        )
        assert trained == stored == tnpeft.parameters(f, model=base.config, targets=["experts"])
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, base(tokens()).logits)


@pytest.mark.parametrize("start", ["svd", "tt_svd"])
def test_a_start_from_the_weight_of_every_expert(start: str) -> None:
    line = "U[layer proj expert out r] V[layer proj expert r inp] -> layer proj expert out inp"
    base = mixture("gpt_oss")
    f = Factorization.of(line, ranks={"r": "min(out, inp)"}, init=dict.fromkeys("UV", start))
    model = attached(base, f)
    down = base.get_parameter("model.layers.1.mlp.experts.down_proj").mT
    for name, weight in (("down_proj", down), ("gate_up_proj", base.model.layers[1].mlp.experts.gate_up_proj.mT)):
        adapted = model.base_model.model.model.layers[1].mlp.experts.get_submodule(name)
        assert torch.allclose(adapted.get_delta_weight("default").mT, weight, atol=1e-5)
