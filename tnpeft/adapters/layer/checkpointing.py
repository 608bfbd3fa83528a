"""Refusing what would train wrongly.

That is an adapter which is another one by the time a checkpoint is recomputed, and shared factors under data
parallelism with reentrant checkpointing.

Reentrant checkpointing runs each block's backward on its own, and each reports a shared Parameter as ready for the
exchange of gradients; at best that is an error, at worst the later parts are lost without one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint

from tnpeft.networks import NetworkError

if TYPE_CHECKING:
    from tnpeft.adapters.layer.bank import FactorBank
    from tnpeft.adapters.layer.merging import DenseLinear

saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # None outside of non-reentrant checkpointing
backward_task = torch._C._current_graph_task_id  # -1 outside of a backward pass


def watch(model: nn.Module, inputs: Any) -> None:
    """Note, before an eager forward, whether reentrant checkpointing inside it has to be refused.

    It is a forward pre-hook of the model that owns the bank. Compiled graphs do not run it.
    """
    if torch.compiler.is_compiling():
        return
    bank: FactorBank = model.factor_bank  # type: ignore[assignment]
    trained = [parameter for parameter in bank.parameters() if parameter.requires_grad]
    parallel = DistributedDataParallel._get_active_ddp_module()
    held = [value for store in bank.tnpeft_factors.children() for value in vars(store).values()]
    bank.watching = torch.is_grad_enabled() and (
        bool(trained and parallel is not None and not parallel.static_graph)
        or any(map(_taken_at_once, trained))
        or any(isinstance(value, Tensor) and value.requires_grad for value in held)  # FSDP1's views of Parameters
    )


def refuse_reentrant(bank: FactorBank) -> None:
    """Raise inside a forward that runs without gradients though the model's own runs with them.

    Raises:
        NetworkError: reentrant checkpointing with factors in the bank under DistributedDataParallel, FSDP1 or ZeRO,
            or with a hook that takes each part of their gradients.
    """
    if not torch.compiler.is_compiling() and bank.watching and not torch.is_grad_enabled():
        bank.watching = False
        raise NetworkError(
            "factors shared between layers, data parallelism (or hooks on gradients) and reentrant checkpointing "
            "give wrong gradients",
            remedy='use gradient_checkpointing_kwargs={"use_reentrant": False}, or '
            "DistributedDataParallel(..., static_graph=True)",
        )


def check_recomputation(layer: DenseLinear) -> dict[str, Tensor] | None:
    """Note, in the forward of a checkpoint, which adapters a layer uses, and compare in the recomputation.

    Return the values of named stacks that the forward saw, if others are chosen in the recomputation.

    Raises:
        NetworkError: adapters were switched, merged or disabled between the two.
    """
    if torch.compiler.is_compiling():
        return None
    if saving_hooks(True) is None and backward_task() == -1 and (torch.is_grad_enabled() or not layer.training):
        return None  # not in a checkpoint
    active, selected = layer._active_adapter, layer.bank.selected
    state = (active if isinstance(active, str) else (*active,), layer._disable_adapters, (*layer.merged_adapters,))
    seen: dict[str, Tensor] | None = None
    for region, again in _regions():
        noted = region.__dict__.setdefault("_tnpeft_adapters", {})
        chosen = region.__dict__.setdefault("_tnpeft_selected", selected)
        if not again:
            noted[id(layer)] = state
        elif noted.get(id(layer), state) != state:
            raise NetworkError(
                "adapters were switched, merged or disabled between a checkpointed forward and its recomputation",
                remedy="call backward() before switching, or train without gradient checkpointing",
            )
        if again and seen is None:
            seen = chosen
    return None if seen is selected else seen


def _regions() -> Iterator[tuple[Any, bool]]:
    """The checkpoints around the caller, innermost first, and whether they are being recomputed.

    Torch tells neither; both of its kinds keep an object of their own from the forward to the backward.
    """
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("forward", "backward") and code.co_varnames[:1] == ("ctx",):
            yield frame.f_locals["ctx"], code.co_name == "backward"
        elif code.co_filename == checkpoint.__file__:
            if code.co_name == "checkpoint" and (made := frame.f_locals.get("gen")) is not None:
                yield made.gi_frame.f_locals["new_frame"], False
            elif code.co_name == "unpack_hook":
                yield frame.f_locals["frame"], True
        frame = frame.f_back  # type: ignore[assignment]


def _taken_at_once(parameter: nn.Parameter) -> bool:
    """True if a hook takes a gradient as soon as one checkpoint has added its part, as ZeRO's do.

    ZeRO of stage 3 adds them only when it has gathered its parts of the Parameter.
    """
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None)) or hasattr(parameter, "ds_id")
