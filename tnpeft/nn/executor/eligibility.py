"""Which state of torch surrounds an operation, and what may be computed by kernels of our own in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module
from torch.utils.module_tracker import ModuleTracker

NO_GRADIENTS = "gradients are disabled"


def autocast_active(device: str) -> bool:
    """Return True if autocast acts on a kind of device; torch cannot be asked of meta."""
    return device != "meta" and torch.is_autocast_enabled(device)


def under_transform() -> bool:
    """Return True if operations are seen one by one: by ``torch.func``, forward differentiation or tracing."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def has_global_hooks() -> bool:
    """Return True if a hook of all modules is registered.

    Torch's ``ModuleTracker``, which its flop counter uses, is ignored: it only records names, and what is counted
    should be what runs without it.
    """
    kinds = (
        module._global_forward_pre_hooks,
        module._global_forward_hooks,
        module._global_backward_pre_hooks,
        module._global_backward_hooks,
    )
    hooks = (hook for kind in kinds for hook in kind.values())
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def can_absorb_update(weight: Tensor) -> bool:
    """Return True if a weight can take an update without losing it; in half precision it would."""
    return torch.finfo(weight.dtype).bits >= 32


def can_use_custom_backward(x: Tensor) -> bool:
    """Return True if gradients are enabled and no transform needs to see the operations one by one.

    Compiled under autocast, the compiler decides what is saved.
    """
    if not torch.is_grad_enabled():
        return False
    return not (autocast_active(x.device.type) if torch.compiler.is_compiling() else under_transform())


def why_not_fused(linear: nn.Module, x: Tensor | None = None) -> str:
    """Return why a module and an update of ``x`` cannot be one operation; empty if they can.

    Without ``x`` only the module is asked: if it is more than the product with its weight.
    """
    own = linear.__dict__
    if type(linear) is not nn.Linear:
        return "the base layer is not torch's own Linear"
    if "forward" in own:
        return "the base layer's forward was replaced"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "the base layer has hooks"
    if module._has_any_global_hook() and has_global_hooks():
        return "a hook of all modules is registered"
    weight = own["_parameters"].get("weight")
    if weight is None and (torch.compiler.is_compiling() or "weight" not in own["_parameters"]):
        weight = linear.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return "the base weight is computed or sharded"
    if x is None:
        return ""
    if x.dtype != weight.dtype:
        return "the input's dtype is not the base weight's"
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return "autocast is active"
    if not torch.is_grad_enabled():
        return NO_GRADIENTS
    if not torch.compiler.is_compiling() and under_transform():
        return "a transform sees every operation"
    return ""


def added(result: Tensor, update: Tensor) -> Tensor:
    """Return the sum in the dtype of ``result``, rounded once."""
    if update.dtype == result.dtype:
        return result + update
    if not torch.compiler.is_compiling() and under_transform():
        return (result + update).to(result.dtype)
    return result.clone().add_(update)  # nothing as wide as both is written
