"""PEFT's LoRA of ``target_parameters`` and adapters of experts: the same weights, outputs, gradients and files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import shake
from expert_models import EXPERTS, KeepDouble, attached, logits, mixture, tokens
from safetensors.torch import load_file
from torch import nn

import tnpeft
from tnpeft.networks import ConfigError

KINDS = ["mixtral", "gpt_oss", "deepseek_v3"]
RANK = 3
WHOLE = ("experts_gate_up_proj", "experts_down_proj")
OURS = tnpeft.families.expert_lora(rank=RANK, alpha=2 * RANK)
NAMES = {"gate_up_proj": ".base_layer", "down_proj": ""}  # PEFT's wrappers of one module stand one inside the other


def theirs(base: nn.Module) -> peft.PeftModel:
    parameters = [f"mlp.experts.{name}" for name in NAMES]
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=parameters)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return model


def unpacked(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of A count experts slowest, columns of B fastest: ``A[expert r inp]``, ``B[expert out r]``."""
    return a.reshape(EXPERTS, -1, a.shape[1]), b.reshape(b.shape[0], -1, EXPERTS).permute(2, 0, 1)


def pairs(lora: nn.Module, own: nn.Module) -> Any:
    """The experts' modules of both, weight by weight: PEFT's A and B, and our factors."""
    held = dict(lora.named_parameters())
    for path, module in own.base_model.model.named_modules():
        name = path.rpartition(".")[2]
        if name in NAMES and hasattr(module, "tnpeft_factors"):
            place = f"base_model.model.{path.rpartition('.')[0]}{NAMES[name]}"
            a, b = (held[f"{place}.lora_{side}.default.weight"] for side in "AB")
            factors = module.tnpeft_factors["default"]
            yield (a, b), (factors.get("A"), factors.get("B"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_give_the_same_outputs_and_gradients(kind: str) -> None:
    base = mixture(kind).double()
    lora, own = theirs(base).double(), attached(base, OURS, targets=WHOLE).double()
    with torch.no_grad():
        for packed, factors in pairs(lora, own):
            for value, factor in zip(unpacked(*packed), factors, strict=True):
                factor.copy_(value)
    with KeepDouble():
        outputs = [model(tokens()).logits for model in (lora, own)]
        plain = base(tokens()).logits
        for output in outputs:
            output.square().mean().backward()
    assert (outputs[0] - plain).abs().max() > 1e-3
    assert torch.allclose(*outputs, rtol=0, atol=1e-10)
    found = [*pairs(lora, own)]
    assert len(found) == 2 * (1 if kind == "deepseek_v3" else 2)
    for packed, factors in found:
        for value, factor in zip(unpacked(*(p.grad for p in packed)), factors, strict=True):
            assert (value - factor.grad).norm() <= 1e-9 * value.norm() + 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_folder_is_attached_and_converted_back(kind: str, tmp_path: Path) -> None:
    base = mixture(kind)
    lora = theirs(base)
    lora.save_pretrained(tmp_path / "peft")
    tnpeft.convert(tmp_path / "peft", tmp_path / "own", to="tnpeft", model=base)
    own = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own", is_trainable=True).eval()
    assert {row.site for row in tnpeft.explain(own).rows} == {*WHOLE}
    assert torch.allclose(logits(own), logits(lora), atol=1e-4)
    own.save_pretrained(tmp_path / "again")
    tnpeft.convert(tmp_path / "again", tmp_path / "back", to="peft", model=base)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # of modules; PEFT uses them
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("network", "exact"),
    [
        (tnpeft.families.shared_outer_lora(rank=2), True),
        (tnpeft.families.expert_tucker(3), True),
        (tnpeft.families.get("lotr")(), True),
    ],
    ids=["shared", "tucker", "train"],
)
def test_exported_as_lora_of_parameters(kind: str, network: Any, exact: bool, tmp_path: Path) -> None:
    base = mixture(kind)
    model = attached(base, network)
    shake(model)
    report = tnpeft.export_lora(model, tmp_path)
    assert all(row.exact for row in report.rows) == exact
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.allclose(logits(read), logits(model), atol=1e-4 * (1 + float(logits(model).abs().max())))
    assert not torch.allclose(logits(read), logits(base), atol=1e-2)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_exported_with_a_stated_error(tmp_path: Path) -> None:
    base = mixture("gpt_oss")
    model = attached(base, tnpeft.families.expert_tucker(6), dora=True)
    shake(model)
    near = tnpeft.export_lora(model, tmp_path / "near", rank=32)
    far = tnpeft.export_lora(model, tmp_path / "far", rank=2)
    assert near.error < 1e-5 < far.error
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "near").eval()
    assert torch.allclose(logits(read), logits(model), atol=1e-3)


def test_slices_in_a_folder_are_refused_with_the_remedy(tmp_path: Path) -> None:
    base = mixture()
    attached(base, OURS).save_pretrained(tmp_path / "own")
    with pytest.raises(ConfigError, match=r"slice by slice") as error:
        tnpeft.convert(tmp_path / "own", tmp_path / "peft", to="peft", model=base)
    assert "export_lora" in str(error.value)
    assert not (tmp_path / "peft").exists()
