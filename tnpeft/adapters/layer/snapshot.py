"""A linear as it was before a merge: the very Parameters, so that unmerging restores every bit and every tie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class WeightSnapshot:
    """The module and what is replaced in it when it stores another weight: one Parameter of a ``name``, or all."""

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    state: Any
    name: str

    @staticmethod
    def of(module: nn.Module, name: str = "") -> WeightSnapshot:
        """Return a snapshot of the module, or of its one Parameter of a ``name``, without copying any array."""
        if name:
            return WeightSnapshot(module, {name: module._parameters[name]}, {}, None, name)
        state = copy(getattr(module, "state", None))
        return WeightSnapshot(module, dict(module._parameters), dict(module._buffers), state, "")

    def weight(self) -> Tensor:
        """Return the weight as it was, on the device and in the dtype that the module's has now."""
        now, kept = getattr(self.module, self.name), self.parameters[self.name]
        assert isinstance(now, Tensor)
        assert kept is not None  # a linear without a back end has one
        return kept.data.to(now.device, now.dtype)

    def restore(self, follow: bool = False) -> nn.Module:
        """Put all of it back; ``follow`` casts and moves the weight as the merged one has been since."""
        if follow and (kept := self.parameters[self.name]) is not None:
            kept.data = self.weight()
        self.module._parameters.update(self.parameters)
        self.module._buffers.update(self.buffers)
        if self.state is not None:
            self.module.state = self.state
        return self.module

    @contextmanager
    def back(self) -> Iterator[None]:
        """Put it back for a while."""
        now = WeightSnapshot.of(self.module, self.name)
        self.restore()
        try:
            yield
        finally:
            now.restore()
