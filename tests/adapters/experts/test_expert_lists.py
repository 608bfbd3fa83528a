"""Experts in lists of modules, as in mixtures before transformers 5: the index ``expert`` runs over the list."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_models import CONFIGS, mixture
from torch import nn
from transformers import AutoConfig
from weight_kinds import Mixtures, attached, sequence, shake

import tnpeft
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.networks import NetworkError

NETWORKS: dict[str, dict[str, Any]] = {
    "shared_outer": {"network": tnpeft.families.shared_outer_lora(rank=2)},
    "cp": {"network": tnpeft.families.expert_cp(3)},
}


def adapted(key: str = "shared_outer", **options: Any) -> tuple[nn.Module, peft.PeftModel]:
    base, model = attached("list of experts", **{**NETWORKS[key], **options})
    shake(model)
    return base, model


def test_exported_as_lora(tmp_path: Path) -> None:
    base, model = adapted("cp")
    report = tnpeft.export_lora(model, tmp_path)
    assert len(report.rows) == 2 * 4 * 3
    assert {(row.rank, row.error) for row in report.rows} == {(3, 0.0)}
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = sequence()
    assert torch.allclose(other(x), model(x), rtol=0, atol=1e-4)


def test_what_targets_mean() -> None:
    def sites(network: Any, targets: Any, **options: Any) -> list[tuple[str, int]]:
        config = tnpeft.TensorNetworkConfig(network=network, target_modules=targets, **options)
        model = peft.get_peft_model(Mixtures(), config)
        return [*dict.fromkeys((row.site, row.experts) for row in tnpeft.explain(model).rows)]

    whole = [("w1", 4), ("w3", 4), ("w2", 4)]
    assert sites("expert_cp", ["experts"]) == sites("expert_cp", r".*\.w\d") == whole
    assert sites("lora", ["experts"]) == whole
    assert sites("expert_cp", ["w3"]) == [("w3", 4)]
    assert sites("expert_cp", ["experts"], exclude_modules=["w3"]) == [("w1", 4), ("w2", 4)]
    assert len(sites("lora", ["w1"])) == 4  # without the index, linears by name are sites of their own
    assert sites("expert_cp", ["gate", "w1"]) == [("gate", 0), ("w1", 4)]  # beside experts, a linear is one expert


def test_a_named_stack_over_a_list() -> None:
    line = "B[layer proj scene expert out r] A[layer proj r inp] -> layer proj scene expert out inp"
    _, model = adapted(network=line, ranks={"r": 2}, stack={"scene": 2})
    x, outputs = sequence(), []
    for scene in (0, 1):
        tnpeft.select(model, scene=scene)
        outputs.append(model(x))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    with pytest.raises(NetworkError, match="its rows are sorted by expert"):
        tnpeft.select(model, scene=[0, 1])


def test_an_architecture_whose_card_knows_fused_experts() -> None:
    class Old(nn.Module):
        """DeepSeek-V3 as its own code has it, with a dense layer and a shared expert."""

        def __init__(self) -> None:
            super().__init__()
            self.config = AutoConfig.for_model("deepseek_v3", **CONFIGS["deepseek_v3"])
            self.model = nn.Module()
            dense, moe = nn.Module(), nn.Module()
            dense.mlp, moe.mlp = self.mlp(48), nn.Module()
            moe.mlp.experts = nn.ModuleList(self.mlp(16) for _ in range(4))
            moe.mlp.shared_experts = self.mlp(16)
            self.model.layers = nn.ModuleList([dense, moe])

        @staticmethod
        def mlp(width: int) -> nn.Module:
            sizes = {"gate_proj": (32, width), "up_proj": (32, width), "down_proj": (width, 32)}
            return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})

    config = tnpeft.TensorNetworkConfig(network="shared_outer_lora", target_modules=["experts"])
    model = peft.get_peft_model(Old(), config)
    assert {(row.site, row.experts) for row in tnpeft.explain(model).rows} == {
        (name, 4) for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}


POOL = "B[layer proj pool out r] ^M[expert pool] A[layer proj pool r inp] -> layer proj expert out inp"
OWNERS = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]  # two experts share an adapter, the last has none


@pytest.mark.parametrize("make", [Mixtures, mixture])
def test_a_pool_of_adapters_for_some_of_the_experts(make: Any) -> None:
    torch.manual_seed(0)
    base = make()
    f = tnpeft.Factorization.of(POOL, ranks={"r": 2, "pool": 2}, init={"M": OWNERS})
    config = tnpeft.TensorNetworkConfig(network=f, target_modules=["experts"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    shake(model)
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight") and layer.updates]
    if make is Mixtures:
        deltas = torch.stack([layer.get_delta_weight("default") for layer in layers[:12:3]])
    else:
        deltas = layers[0].get_delta_weight("default")
    held, params = arrays(model, bank_of(model), "default"), layers[0].updates["default"][0].site_layout.parameters
    assert params["B"].shape[0] == params["A"].shape[0] == 2
    own = torch.einsum("por,pri->poi", held[params["B"]].detach(), held[params["A"]].detach())
    rows = own.shape[1]
    for delta, owner in zip(deltas, [own[0], own[1], own[1], 0 * own[0]], strict=True):
        assert torch.allclose(delta[:rows], owner, atol=1e-5)
