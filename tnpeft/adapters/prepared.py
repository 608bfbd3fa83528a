"""What is computed from factors alone, kept between the forwards of inference until a factor changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tnpeft.nn.modes import autocasting, transformed

_Values = list[Tensor]


class _Steps:
    """How many steps optimizers have taken."""

    taken = 0

    @classmethod
    def note(cls, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.note)


def steps_taken() -> int:
    """How many steps optimizers have taken: torch's fused ones leave a tensor's version as it was.

    >>> optimizer = torch.optim.SGD([torch.ones(1)])
    >>> before = steps_taken()
    >>> optimizer.step()
    >>> steps_taken() - before
    1
    """
    return _Steps.taken


class Stamps:
    """What tensors were like: their memory and version counters, so that any change of them shows.

    Every in-place operation, loading, moving and replacing shows, and any step of an optimizer counts: torch's fused
    ones leave the counter as it was. Only an edit in place through ``.data`` does not show.

    >>> factor = torch.ones(1)
    >>> stamps = Stamps([factor])
    >>> stamps.hold([factor]), stamps.hold([factor.add_(1)])
    (True, False)
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self._stamps = [(source.data_ptr(), source._version, source.dtype) for source in sources]
        self._taken = _Steps.taken
        self._aliases = [source.detach() for source in sources]  # they keep the memory from other tensors

    def hold(self, sources: Sequence[Tensor]) -> bool:
        """Whether these are the tensors, unchanged."""
        if self._taken != _Steps.taken or len(sources) != len(self._stamps):
            return False
        for (pointer, version, dtype), source in zip(self._stamps, sources, strict=True):
            if pointer != source.data_ptr() or version != source._version or dtype != source.dtype:
                return False
        return True


class Prepared:
    """Results by key, each with stamps of the tensors that it was computed from. A copy of it is empty.

    ``direct`` and ``joined`` are places for what a linear keeps of its one active adapter, see
    :mod:`tnpeft.adapters.direct` and :mod:`tnpeft.adapters.joined`.

    >>> kept, factor = Prepared(), torch.ones(1)
    >>> [kept.get("key", [factor], lambda: [factor * 2])[0].item() for _ in range(2)]
    [2.0, 2.0]
    >>> kept.get("key", [factor.add_(1)], lambda: [factor * 2])[0].item()
    4.0
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Stamps, _Values]] = {}
        self.direct: Any = None
        self.joined: Any = None

    def __reduce__(self) -> tuple[type[Prepared], tuple[()]]:
        return Prepared, ()

    def get(self, key: Hashable, sources: Sequence[Tensor], make: Callable[[], _Values]) -> _Values:
        """What ``make`` gives, or gave for the same sources."""
        entry = self._entries.get(key)
        if entry is None or not entry[0].hold(sources):
            entry = self._entries[key] = Stamps(sources), make()
        return entry[1]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.direct = self.joined = None


def may_keep(sources: Sequence[Tensor], device: str) -> bool:
    """Whether results may be kept here: eager and without gradients, every source a tensor that can be stamped.

    Not so under ``torch.compile``, tracing, autocast, ``inference_mode`` or transforms of ``torch.func``, nor with
    ``torch.distributed``, whose sharding gives the same memory to other numbers.

    >>> may_keep([torch.ones(1)], "cpu")
    False
    >>> with torch.no_grad():
    ...     may_keep([torch.ones(1)], "cpu")
    True
    """
    return (
        not torch.compiler.is_compiling()
        and quiet(device)
        and all(type(source) in (Tensor, nn.Parameter) and not source.is_inference() for source in sources)
    )


def quiet(device: str) -> bool:
    """Whether an eager forward here is plain: without gradients, and no mode that sees or changes its operations.

    >>> quiet("cpu")
    False
    """
    return not (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or autocasting(device)
        or transformed()
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
    )
