"""WITH torch: contract a network, execute a plan, initialise factors, fit them to a dense target."""

from __future__ import annotations

from tnpeft._lazy import lazy
from tnpeft.nn.dense import dense  # at once: a module of that name would hide it

_HOME = {
    "Program": "executor.program",
    "program": "executor.program",
    "Initializer": "init.initializer",
    "fit": "fit",
    "from_tensorly": "tensorly_formats",
    "to_tensorly": "tensorly_formats",
}

__all__ = ["dense", *_HOME]
__getattr__, __dir__ = lazy(__name__, _HOME)
