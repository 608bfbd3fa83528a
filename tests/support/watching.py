"""What runs: every operation, and every graph that is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watching(TorchDispatchMode):
    """Tells a function the name, the arguments and the result of every operation."""

    def __init__(self, note: Callable[[str, Any, Any], object]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(func._opname, args, result)
        return result


def compiled(model: Any, **options: Any) -> tuple[Any, list[Any]]:
    """A model as it is compiled without a break, and the graphs that this has taken so far."""
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()  # its limit of recompilations counts all models
    return torch.compile(model, backend=backend, fullgraph=True, **options), graphs


def largest(act: Callable[[], object]) -> int:
    """The elements of the largest array that is made."""
    sizes = [0]

    def note(name: str, args: Any, result: Any) -> None:
        sizes.extend(its.numel() for its in tree_leaves(result) if isinstance(its, Tensor) and not its._is_view())

    with Watching(note):
        act()
    return max(sizes)
