"""A refused or failed attachment or load leaves no trace: failures at every step, in turn."""

from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from adapter_models import opt, shake
from failing_steps import check_every_step, fingerprint
from peft import PeftModel
from torch import nn

import tnpeft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
LINES = {
    "lora": {"network": "lora"},
    "shared factors": {"network": "vera", "modules_to_save": ["lm_head"], "bias": "tensor_network_only"},
    "magnitudes": {"network": "lora", "dora": True, "trainable_token_indices": [3, 5]},
    "replicas": {"network": "lora", "replicas": 2},
}


def config(**options: object) -> tnpeft.TensorNetworkConfig:
    return tnpeft.TensorNetworkConfig(target_modules=["q_proj", "v_proj"], **options)


def trained(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", LINES.values(), ids=LINES)
def test_first_attachment(options: dict[str, object]) -> None:
    make = partial(peft.get_peft_model, peft_config=config(**options))
    after = check_every_step(opt, make)
    fresh = opt()
    make(fresh)
    assert trained(after) == trained(fresh)


def adapted(**options: object) -> PeftModel:
    return peft.get_peft_model(opt(), config(**(options or {"network": "lora"})), adapter_name="first")


@pytest.mark.parametrize("options", LINES.values(), ids=LINES)
def test_second_attachment(options: dict[str, object]) -> None:
    after = check_every_step(adapted, lambda model: model.add_adapter("second", config(**options)))
    fresh = adapted()
    fresh.add_adapter("second", config(**options))
    assert trained(after) == trained(fresh)


@pytest.mark.parametrize("options", list(LINES.values())[:3], ids=[*LINES][:3])
def test_loading(options: dict[str, object], tmp_path: Path) -> None:
    adapted(**options).save_pretrained(str(tmp_path))
    folder = str(tmp_path / "first")
    check_every_step(opt, lambda model: PeftModel.from_pretrained(model, folder), 12)
    check_every_step(partial(adapted, network="lora"), lambda model: model.load_adapter(folder, "second"), 12)


def test_loading_over_an_adapter(tmp_path: Path) -> None:
    model = adapted()
    tnpeft.set_factors(model, {k: torch.randn_like(v) for k, v in tnpeft.factors(model, "first").items()}, "first")
    model.save_pretrained(str(tmp_path))
    check_every_step(adapted, lambda model: model.load_adapter(str(tmp_path / "first"), "first"), 12)


def test_the_models_own_methods(tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path))
    check_every_step(opt, lambda model: model.add_adapter(config(network="vera"), "first"), 15)
    check_every_step(opt, lambda model: model.load_adapter(str(tmp_path / "first"), "first"), 15)


BESIDE = {
    "lora": {"network": "lora"},
    "shared factors": {"network": "vera", "modules_to_save": ["lm_head"]},
    "magnitudes": {"network": "lora", "dora": True, "trainable_token_indices": [3, 5]},
}
ACTS = {
    "merging": lambda model: model.merge_adapter(),
    "unmerging": lambda model: model.unmerge_adapter(),
    "merging for good": lambda model: model.merge_and_unload(safe_merge=True),
    "unloading": lambda model: model.unload(),
    "deleting": lambda model: model.base_model.delete_adapter("first"),
    "adding up": lambda model: model.add_weighted_adapter(["first", "second"], [1.0, -2.0], "sum"),
}


def two(options: dict[str, object], merged: bool) -> PeftModel:
    """A model with two adapters, the first of them active."""
    model = adapted(**options)
    model.add_adapter("second", config(**{**options, "trainable_token_indices": None}))
    shake(model, adapter="first")
    if merged:
        model.merge_adapter()
    return model


@pytest.mark.parametrize("options", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize(
    ("act", "merged"),
    [
        ("merging", False), ("unmerging", True), ("merging for good", False), ("merging for good", True),
        ("unloading", False), ("unloading", True), ("deleting", False), ("adding up", False),
    ],
)  # fmt: skip
def test_merging_unloading_deleting_and_adding_up(act: str, merged: bool, options: dict[str, object]) -> None:
    if act == "adding up" and len(options) > 1:
        return  # refused
    check_every_step(partial(two, options, merged), ACTS[act], 15)


def test_a_linear_that_fails_to_merge_leaves_the_embedding_unmerged() -> None:
    model = two(BESIDE["magnitudes"], False)
    ids = torch.tensor([[3, 5, 7]])
    before, wanted = fingerprint(model), model(ids).logits
    with torch.no_grad():
        last = model.base_model.model.model.decoder.layers[-1].self_attn.q_proj
        last.merge = None  # called by PEFT last of all
    with pytest.raises(TypeError):
        model.merge_adapter()
    del last.merge
    assert fingerprint(model) == before
    assert torch.equal(model(ids).logits, wanted)


def test_a_missing_head_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = fingerprint(model)
    with pytest.raises(AttributeError):
        peft.get_peft_model(
            model, tnpeft.TensorNetworkConfig(network="lora", target_modules=["0"], task_type="CAUSAL_LM")
        )
    assert fingerprint(model) == before
