"""A refused or failed attachment or load leaves no trace: failures at every step, in turn."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import peft
import pytest
import torch
from adapter_models import opt
from peft import PeftModel
from torch import nn

import tnpeft
from tnpeft.networks import NetworkError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
LINES = {
    "lora": {"network": "lora"},
    "shared factors": {"network": "vera", "modules_to_save": ["lm_head"], "bias": "tensor_network_only"},
    "magnitudes": {"network": "lora", "dora": True, "trainable_token_indices": [3, 5]},
    "replicas": {"network": "lora", "replicas": 2},
}


class Planned(BaseException):
    """What a failing step raises; no handler for errors knows it."""


def failing_at(step: int, error: type[BaseException], act: Callable[[], object]) -> bool:
    """Run something and fail at the so-many-th call of a function of the package; False if it ends before."""
    count = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        if event == "call" and f"tnpeft{'/'}adapters" in frame.f_code.co_filename:
            count += 1
            if count == step:
                raise error("planned")

    sys.setprofile(profile)
    try:
        act()
    except error:
        return True
    finally:
        sys.setprofile(None)
    return False


def steps(act: Callable[[], object]) -> int:
    """The number of calls that a successful run makes."""
    count = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call" and f"tnpeft{'/'}adapters" in frame.f_code.co_filename

    sys.setprofile(profile)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def fingerprint(model: nn.Module) -> dict[str, object]:
    """All that an attachment might change of a model."""
    found: dict[str, object] = {
        "configurations": {k: id(v) for k, v in (getattr(model, "peft_config", None) or {}).items()}
    }
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        flags = (
            module.training,
            getattr(module, "_hf_peft_config_loaded", None),
            getattr(module, "active_adapter", None),
        )
        adapters = [*getattr(module, "updates", ())], [*getattr(module, "layouts", ())]
        found[name] = id(module), hooks, str(flags), adapters, sorted(vars(module))
    for name, array in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}:"] = id(array), array.requires_grad, array.detach().clone().numpy().tobytes()
    return found


def config(**options: object) -> tnpeft.TensorNetworkConfig:
    return tnpeft.TensorNetworkConfig(target_modules=["q_proj", "v_proj"], **options)


def check_every_step(
    fresh: Callable[[], nn.Module], act: Callable[[nn.Module], object], points: int = 25
) -> nn.Module:
    """Fail at many steps in turn on one model, which stays as it was; then let it succeed."""
    act(fresh())  # what is kept between runs is kept from now on
    total = steps(partial(act, fresh()))
    model = fresh()
    before = fingerprint(model)
    chosen = sorted({*range(1, 8), *range(1, total + 1, max(1, total // points)), *range(total - 6, total + 1)})
    for step in (k for k in chosen if k > 0):
        if not failing_at(step, (Planned, MemoryError)[step % 2], partial(act, model)):
            model = fresh()  # that call was the end of a generator, which cannot fail
            before = fingerprint(model)
        after = fingerprint(model)
        assert after.keys() == before.keys(), (step, total, after.keys() ^ before.keys())
        assert after == before, (step, total, [name for name in before if before[name] != after[name]][:5])
    act(model)
    return model


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


def test_a_missing_head_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = fingerprint(model)
    with pytest.raises(AttributeError):
        peft.get_peft_model(
            model, tnpeft.TensorNetworkConfig(network="lora", target_modules=["0"], task_type="CAUSAL_LM")
        )
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["half", "train", "keys", "type", "forward", "base_layer", "__base__", "a.b", ""])
def test_refused_names_leave_the_model_as_it_was(name: str) -> None:
    model = opt()
    before = fingerprint(model)
    with pytest.raises(NetworkError, match="adapter"):
        peft.get_peft_model(model, config(network="lora"), adapter_name=name)
    assert fingerprint(model) == before


def test_a_name_is_given_once() -> None:
    model = adapted()
    own, before = model.peft_config["first"], fingerprint(model.get_base_model())
    with pytest.raises(NetworkError, match="an adapter 'first' already"):
        peft.get_peft_model(model.get_base_model(), config(network="lora", ranks={"r": 6}), adapter_name="first")
    assert model.peft_config["first"] is own
    assert fingerprint(model.get_base_model()) == before
