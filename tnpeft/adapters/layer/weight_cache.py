"""Results computed from factors alone, kept between the forwards of inference until a factor changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tnpeft.nn.executor.eligibility import autocast_active, under_transform

Entries = dict[Hashable, tuple[list[Any], Any, list[Tensor]]]  # versions of the sources, result, and the sources

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


def kept(entries: Entries, key: Hashable, sources: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """Return the result of ``make``, or an earlier one for the same cacheable sources, whose memory is kept."""
    now, entry = versions(sources), entries.get(key)
    if entry is None or entry[0] != now:
        entry = entries[key] = now, make(), [source.detach() for source in sources]
    return entry[1]


def is_cacheable(sources: Sequence[Tensor], device: str) -> bool:
    """Return True if results may be kept here: eager, without gradients, every source a tensor that has a version."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or autocast_active(device)
        or observed()
        or any(type(source) not in (Tensor, nn.Parameter) or source.is_inference() for source in sources)
    )


def observed() -> bool:
    """Return True if a mode sees or changes operations, or torch.distributed gives the same memory to other numbers.

    The modes are ``inference_mode``, transforms of ``torch.func``, tracing, and those of fake tensors and the like.
    """
    return bool(
        torch.is_inference_mode_enabled()
        or under_transform()
        or torch._C._len_torch_dispatch_stack()
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
    )
