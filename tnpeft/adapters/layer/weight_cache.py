"""Results computed from factors alone, kept between the forwards of inference until a factor changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tnpeft.nn.executor.eligibility import autocast_active, under_transform

_Values = list[Tensor]


_steps = 0  # that optimizers have taken


def _count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


def versions(tensors: Sequence[Tensor]) -> list[Any]:
    """Return what shows any change of tensors but an edit in place through ``.data``.

    Every in-place operation, loading, moving, casting, freezing and replacing shows, and any step of an optimizer
    counts: torch's fused ones leave a tensor's version as it was.
    """
    return [_steps, *[(t.data_ptr(), t._version, t.dtype, t.requires_grad) for t in tensors]]


class VersionStamp:
    """The versions of tensors, whose memory it keeps from others."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self._versions, self._aliases = versions(sources), [source.detach() for source in sources]

    def holds(self, sources: Sequence[Tensor]) -> bool:
        """Return True if these are the tensors, unchanged."""
        return self._versions == versions(sources)


class WeightCache:
    """Results by key, each with a stamp of the tensors that it was computed from. A copy of it is empty.

    ``active`` and ``inference`` are what is remembered of a linear's active adapter, see
    :mod:`tnpeft.adapters.layer.fast_path`.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[VersionStamp, _Values]] = {}
        self.active: Any = None
        self.inference: Any = None

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()

    def get(self, key: Hashable, sources: Sequence[Tensor], x: Tensor, make: Callable[[], _Values]) -> _Values | None:
        """Return the result of ``make``, or an earlier one for the same sources; None where nothing may be kept."""
        if not is_cacheable(sources, x.device.type):
            return None
        key = key, x.dtype, x.device
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
    """
    return (
        not torch.compiler.is_compiling()
        and is_plain_inference(device)
        and all(type(source) in (Tensor, nn.Parameter) and not source.is_inference() for source in sources)
    )


def is_plain_inference(device: str) -> bool:
    """Return True if an eager forward is plain: no gradients, and no mode that sees or changes its operations."""
    return not (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or autocast_active(device)
        or under_transform()
        or torch._C._len_torch_dispatch_stack()
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
    )
