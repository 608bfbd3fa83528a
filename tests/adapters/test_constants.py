"""Constants of an adapter: the base weight is read where it lies, replicas or not."""

from __future__ import annotations

import peft
import torch
from adapter_models import opt
from torch import nn

import tnpeft

LINE = "d[layer proj out] ^W[layer proj out inp] -> layer proj out inp"


def attached(replicas: int = 1, seed: int = 0) -> nn.Module:
    config = tnpeft.TensorNetworkConfig(
        network=LINE, init={"W": "base", "d": "normal(0.1)"}, target_modules=["q_proj", "v_proj"], seed=seed,
        replicas=replicas,
    )  # fmt: skip
    return peft.get_peft_model(opt(), config).eval()


def test_replicas_read_the_base_weight_where_it_lies() -> None:
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        many = attached(2)(input_ids=torch.cat([ids, ids])).logits
        for k in range(2):
            torch.testing.assert_close(many[k : k + 1], attached(seed=k)(input_ids=ids).logits)
    model = attached(2)
    held = {
        name.rpartition(".")[2]
        for name, _ in [*model.named_parameters(), *model.named_buffers()]
        if "tnpeft_" in name
    }
    assert held == {"d"}
    assert {name: value.shape[0] for name, value in tnpeft.factors(model).items() if name == "d"} == {"d": 2}
