"""Refusing the one combination that trains wrongly: shared factors, DistributedDataParallel, reentrant checkpointing.

Reentrant checkpointing runs each block's backward on its own, and each reports a shared Parameter as ready for the
exchange of gradients; at best that is an error, at worst the later parts are lost without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tnpeft.networks import NetworkError

if TYPE_CHECKING:
    from tnpeft.adapters.bank import FactorBank


def watch(model: nn.Module, inputs: Any) -> None:
    """Note, before an eager forward, whether reentrant checkpointing inside it has to be refused.

    It is a forward pre-hook of the model that owns the bank. Compiled graphs do not run it.
    """
    if not torch.compiler.is_compiling():
        bank: FactorBank = model.factor_bank  # type: ignore[assignment]
        bank.watching = (
            torch.is_grad_enabled() and _data_parallel() and any(p.requires_grad for p in bank.parameters())
        )


def refuse_reentrant(bank: FactorBank) -> None:
    """Raise inside a forward that runs without gradients though the model's own runs with them.

    Raises:
        NetworkError: reentrant checkpointing under DistributedDataParallel with factors in the bank.
    """
    if not torch.compiler.is_compiling() and bank.watching and not torch.is_grad_enabled():
        bank.watching = False
        raise NetworkError(
            "factors shared between layers, DistributedDataParallel and reentrant checkpointing give wrong gradients",
            remedy='use gradient_checkpointing_kwargs={"use_reentrant": False}, or '
            "DistributedDataParallel(..., static_graph=True)",
        )


def _data_parallel() -> bool:
    active = DistributedDataParallel._get_active_ddp_module()
    return active is not None and not active.static_graph
