"""Failing at every step of something in turn, after which a model has to be as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tnpeft.networks import NetworkError


class Planned(BaseException):
    """What a failing step raises; no handler for errors knows it."""


def _counted(act: Callable[[], object], step: int, error: type[BaseException]) -> int:
    """Run something and fail at the so-many-th call of a function of the package; the number of calls."""
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
    finally:
        sys.setprofile(None)
    return count


def failing_at(step: int, error: type[BaseException], act: Callable[[], object]) -> bool:
    """Run something and fail at a step; False if it ends before."""
    try:
        _counted(act, step, error)
    except error:
        return True
    return False


def steps(act: Callable[[], object]) -> int:
    """The number of calls that a successful run makes."""
    return _counted(act, 0, Planned)


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
        data = b"" if is_lazy(array) else array.detach().flatten().view(torch.uint8).numpy().tobytes()
        found[f"{name}:"] = id(array), array.requires_grad, data
    return found


def assert_same(after: dict[str, object], before: dict[str, object], *where: object) -> None:
    """Two fingerprints are equal; else it is said of what they differ."""
    assert after.keys() == before.keys(), (*where, after.keys() ^ before.keys())
    assert after == before, (*where, [name for name in before if before[name] != after[name]][:5])


@contextmanager
def refused(model: nn.Module, message: str | None, error: type[Exception] = NetworkError) -> Iterator[None]:
    """Something is refused, with this message if one is given, and the model is as it was."""
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        yield
    assert_same(fingerprint(model), before)


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
        assert_same(fingerprint(model), before, step, total)
    act(model)
    return model
