"""Exact meters of one step: flops, bytes kept for backward, peak of new tensors, operations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

_FREE = {"detach", "promote_types", "empty", "empty_like", "_unsafe_view", "empty_strided", "alias", "lift_fresh"}


@dataclass(frozen=True)
class Meters:
    """One step: flops, bytes kept for backward, most bytes of new tensors alive at once, operations that compute."""

    flops: int
    saved: int
    peak: int
    kernels: int


class _Dispatched(TorchDispatchMode):
    """Counts operations other than views, and the storages that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.kernels += not func.is_view and func.namespace == "aten" and func._opname not in _FREE
        self.alive |= {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in made if s._cdata not in given}
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def saved_bytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd keeps in a forward; parameters and buffers are left out."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(note, lambda t: t):
        result = forward()
    del result
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def flop_counter() -> FlopCounterMode:
    """Torch's flop counter, which by itself passes over a product accumulated in place."""

    def accumulated(total: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
        return 2 * prod(left) * right[-1]

    in_place = torch.ops.aten.addmm_, torch.ops.aten.baddbmm_
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(in_place, accumulated))


def meters(module: nn.Module, forward: Callable[[], Tensor], device: str = "cpu") -> Meters:
    """Return what one forward and backward costs, counted and not timed."""
    saved = saved_bytes(module, forward)
    with flop_counter() as counter, _Dispatched() as dispatched:
        forward().backward()
    module.zero_grad()
    peak, kernels = dispatched.peak, dispatched.kernels
    if device != "cpu":
        gc.collect()  # what was counted is kept alive in circles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward().backward()
        peak = torch.cuda.max_memory_allocated() - before
        module.zero_grad()
        with profile(activities=[ProfilerActivity.CUDA]) as launched:
            forward().backward()
            torch.cuda.synchronize()
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in launched.events())
        gc.collect()
    return Meters(counter.get_total_flops(), saved, peak, kernels)
