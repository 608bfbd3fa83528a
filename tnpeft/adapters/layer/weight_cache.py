"""Results computed from factors alone, kept between the forwards of inference until a factor changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tnpeft.nn.executor.eligibility import autocast_active, under_transform

_Values = list[Tensor]


class _Steps:
    """A count of the steps that optimizers have taken."""

    taken = 0

    @classmethod
    def note(cls, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.note)


def steps_taken() -> int:
    """Return how many steps optimizers have taken: torch's fused ones leave a tensor's version as it was.

    >>> optimizer = torch.optim.SGD([torch.ones(1)])
    >>> before = steps_taken()
    >>> optimizer.step()
    >>> steps_taken() - before
    1
    """
    return _Steps.taken


class VersionStamp:
    """A record of tensors: their memory and version counters, so that any change of them shows.

    Every in-place operation, loading, moving and replacing shows, and any step of an optimizer counts: torch's fused
    ones leave the counter as it was. Only an edit in place through ``.data`` does not show.

    >>> factor = torch.ones(1)
    >>> stamps = VersionStamp([factor])
    >>> stamps.holds([factor]), stamps.holds([factor.add_(1)])
    (True, False)
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self._stamps = [(source.data_ptr(), source._version, source.dtype) for source in sources]
        self._taken = _Steps.taken
        self._aliases = [source.detach() for source in sources]  # they keep the memory from other tensors

    def holds(self, sources: Sequence[Tensor]) -> bool:
        """Return True if these are the tensors, unchanged."""
        if self._taken != _Steps.taken or len(sources) != len(self._stamps):
            return False
        for (pointer, version, dtype), source in zip(self._stamps, sources, strict=True):
            if pointer != source.data_ptr() or version != source._version or dtype != source.dtype:
                return False
        return True


class WeightCache:
    """Results by key, each with stamps of the tensors that it was computed from. A copy of it is empty.

    ``active`` and ``inference`` are what is remembered of a linear's active adapter, see
    :mod:`tnpeft.adapters.layer.fast_path`.

    >>> kept, factor = WeightCache(), torch.ones(1)
    >>> [kept.get("key", [factor], lambda: [factor * 2])[0].item() for _ in range(2)]
    [2.0, 2.0]
    >>> kept.get("key", [factor.add_(1)], lambda: [factor * 2])[0].item()
    4.0
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[VersionStamp, _Values]] = {}
        self.active: Any = None
        self.inference: Any = None

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()

    def get(self, key: Hashable, sources: Sequence[Tensor], make: Callable[[], _Values]) -> _Values:
        """Return the result of ``make``, or an earlier one for the same sources."""
        entry = self._entries.get(key)
        if entry is None or not entry[0].holds(sources):
            entry = self._entries[key] = VersionStamp(sources), make()
        return entry[1]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.active = self.inference = None


def is_cacheable(sources: Sequence[Tensor], device: str) -> bool:
    """Return True if results may be kept here: eager, without gradients, every source a tensor that can be stamped.

    Not so under ``torch.compile``, tracing, autocast, ``inference_mode`` or transforms of ``torch.func``, nor with
    ``torch.distributed``, whose sharding gives the same memory to other numbers.

    >>> is_cacheable([torch.ones(1)], "cpu")
    False
    >>> with torch.no_grad():
    ...     is_cacheable([torch.ones(1)], "cpu")
    True
    """
    return (
        not torch.compiler.is_compiling()
        and is_plain_inference(device)
        and all(type(source) in (Tensor, nn.Parameter) and not source.is_inference() for source in sources)
    )


def is_plain_inference(device: str) -> bool:
    """Return True if an eager forward is plain: no gradients, and no mode that sees or changes its operations.

    >>> is_plain_inference("cpu")
    False
    """
    return not (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or autocast_active(device)
        or under_transform()
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
    )
