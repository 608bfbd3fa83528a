"""A quantised linear as it was before a merge, so that unmerging restores it without quantising again."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """The module and everything a back end replaces in it when it stores another weight."""

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    state: Any

    @staticmethod
    def of(module: nn.Module) -> Kept:
        """What the module holds now, without copying any array.

        >>> linear = nn.Linear(2, 2)
        >>> kept = Kept.of(linear)
        >>> linear.weight = nn.Parameter(linear.weight * 2)
        >>> kept.restore().weight is kept.parameters["weight"]
        True
        """
        state = copy(getattr(module, "state", None))
        return Kept(module, dict(module._parameters), dict(module._buffers), state)

    def restore(self) -> nn.Module:
        """The module with all of it back in place."""
        self.module._parameters.update(self.parameters)
        self.module._buffers.update(self.buffers)
        if self.state is not None:
            self.module.state = self.state
        return self.module
