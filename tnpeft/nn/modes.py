"""What of torch's modes is at work around an operation."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module
from torch.utils.module_tracker import ModuleTracker


def autocasting(kind: str) -> bool:
    """Whether autocast acts on a kind of device; on the meta device, of which torch refuses to say, it does not.

    >>> autocasting("meta"), autocasting("cpu")
    (False, False)
    """
    return kind != "meta" and torch.is_autocast_enabled(kind)


def transformed() -> bool:
    """Whether operations are seen one by one: by a transform of ``torch.func``, forward differentiation, or tracing.

    >>> transformed(), torch.func.vmap(lambda x: x + transformed())(torch.zeros(1))
    (False, tensor([1.]))
    """
    return bool(
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def hooked() -> bool:
    """Whether every module's call is looked on at, by a hook of all modules.

    Torch's tracker of modules, which its flop counter uses, is none: it notes names, and what is counted should be
    what is done without it.

    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> with FlopCounterMode(display=False):
    ...     hooked()
    False
    """
    if not module._has_any_global_hook():
        return False
    kinds = (
        module._global_forward_pre_hooks,
        module._global_forward_hooks,
        module._global_backward_pre_hooks,
        module._global_backward_hooks,
    )
    return any(
        not isinstance(getattr(hook, "__self__", None), ModuleTracker) for its in kinds for hook in its.values()
    )
