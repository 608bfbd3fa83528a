"""Failing at every step of something in turn, after which a model has to be as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

from torch import nn


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
