"""A batch for replicas is equal contiguous blocks of rows, one each: what would break them is refused here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.networks import REPLICA, NetworkError

_INPUTS = ("input_ids", "inputs_embeds", "pixel_values")
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "packed_seq_lens")  # of rows laid end to end


def expect_blocks(model: nn.Module) -> None:
    """Check every batch of the model from now on; once is enough."""
    if check_blocks not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(check_blocks, with_kwargs=True)


def check_blocks(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse, before an eager forward with replicas, a batch that is not one block of rows for each.

    It is a forward pre-hook of the model that owns the bank. Compiled graphs run without it; there each linear still
    checks that its rows divide.
    """
    count = 1 if torch.compiler.is_compiling() else _replicas(model.factor_bank)
    if count == 1:
        return
    if getattr(model, "_is_replica", False):
        raise NetworkError(
            f"DataParallel cuts the batch of {count} replicas elsewhere than between them",
            remedy="use DistributedDataParallel, each process with a block for every replica",
        )
    given = next((kwargs[name] for name in _INPUTS if kwargs.get(name) is not None), args[0] if args else None)
    if isinstance(given, Tensor) and len(given) % count:
        raise NetworkError(
            f"batch size {len(given)} is not divisible by {count} replicas",
            remedy="let it be one block of equally many rows for each replica, in their order",
        )
    if any(kwargs.get(name) is not None for name in _LENGTHS) or _restarts(kwargs):
        raise NetworkError(
            f"sequences are packed into rows, and the blocks of {count} replicas with them",
            remedy="pad the sequences to one row each: no DataCollatorWithFlattening, no packing",
        )


def _replicas(bank: Any) -> int:
    if bank.disable_adapters:
        return 1
    active = [bank.layouts[name] for name in bank.active_adapters if name in bank.layouts]
    return max((found.site_layouts[0].sizes.get(REPLICA, 1) for found in active), default=1)


def _restarts(kwargs: Mapping[str, Any]) -> bool:
    """Return True if positions begin again between two tokens that are both attended."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return False
    falls = positions[:, 1:] < positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        falls = falls & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return bool(falls.any())
