"""The processes of one run: one, or as many as ``torchrun`` has started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def count() -> int:
    """How many processes share the run.

    >>> count()
    1
    """
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process is the one that writes files and speaks.

    >>> first()
    True
    """
    return os.environ.get("RANK", "0") == "0"


def device() -> str:
    """Where this process computes.

    >>> device() in ("cpu", "cuda:0")
    True
    """
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def share(rows: Sequence[Any]) -> tuple[Sequence[Any], float]:
    """This process's rows of a batch, and the factor of their mean loss that makes the mean over the processes that
    of the whole batch; a process without a row takes one with the factor 0.

    >>> share([1, 2, 3])
    ([1, 2, 3], 1.0)
    """
    mine = rows[int(os.environ.get("RANK", "0")) :: count()]
    return (mine, count() * len(mine) / len(rows)) if mine else (rows[:1], 0.0)


def mean(value: torch.Tensor) -> float:
    """The mean of a number over the processes.

    >>> import torch
    >>> mean(torch.tensor(2.0))
    2.0
    """
    if count() > 1:
        from torch import distributed

        value = value.clone()
        distributed.all_reduce(value)
    return value.item() / count()


def end() -> None:
    """Part from the other processes.

    >>> end()
    """
    if count() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
