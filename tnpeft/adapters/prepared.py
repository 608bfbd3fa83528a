"""What is computed from factors alone, kept between the forwards of inference until a factor changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_Values = list[Tensor]
_Stamp = tuple[Tensor, int]  # an alias that keeps the memory from being given to another tensor, and the version
_Entry = tuple[int, list[_Stamp], _Values]


class _Steps:
    """How many steps optimizers have taken."""

    taken = 0

    @classmethod
    def note(cls, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.note)


class Prepared:
    """Results by key, each with stamps of the tensors that it was computed from. A copy of it is empty.

    A stamp is the memory and the version counter: every in-place operation, loading, moving and replacing shows. An
    step of an optimizer ends all that is kept: torch's fused ones leave the counter as it was. Only an edit in place
    through ``.data`` does not show.

    >>> kept, factor = Prepared(), torch.ones(1)
    >>> [kept.get("key", [factor], lambda: [factor * 2])[0].item() for _ in range(2)]
    [2.0, 2.0]
    >>> kept.get("key", [factor.add_(1)], lambda: [factor * 2])[0].item()
    4.0
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    def __reduce__(self) -> tuple[type[Prepared], tuple[()]]:
        return Prepared, ()

    def get(self, key: Hashable, sources: Sequence[Tensor], make: Callable[[], _Values]) -> _Values:
        """What ``make`` gives, or gave for the same sources."""
        entry = self._entries.get(key)
        if entry is None or entry[0] != _Steps.taken or not _unchanged(entry[1], sources):
            entry = _Steps.taken, [(source.detach(), source._version) for source in sources], make()
            self._entries[key] = entry
        return entry[2]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


def may_keep(sources: Sequence[Tensor], device: str) -> bool:
    """Whether results may be kept here: eager and without gradients, every source a tensor that can be stamped.

    Not so under ``torch.compile``, tracing, autocast, ``inference_mode`` or transforms of ``torch.func``, nor with
    ``torch.distributed``, whose sharding gives the same memory to other numbers.

    >>> may_keep([torch.ones(1)], "cpu")
    False
    >>> with torch.no_grad():
    ...     may_keep([torch.ones(1)], "cpu")
    True
    """
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(device)
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
        or any(type(source) not in (Tensor, nn.Parameter) or source.is_inference() for source in sources)
    )


def _unchanged(stamps: Sequence[_Stamp], sources: Sequence[Tensor]) -> bool:
    return len(stamps) == len(sources) and all(
        alias.data_ptr() == source.data_ptr() and version == source._version and alias.dtype == source.dtype
        for (alias, version), source in zip(stamps, sources, strict=True)
    )
