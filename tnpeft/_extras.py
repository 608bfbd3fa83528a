"""Libraries that only an extra of the installation brings."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def needed(library: str, extra: str, what: str) -> None:
    """Refuse what needs a library that is not installed, naming the extra that brings it.

    Raises:
        ModuleNotFoundError: the library is not there.

    >>> needed("json", "torch", "nothing")
    """
    try:
        missing = find_spec(library) is None
    except ValueError:  # a module without a spec: hidden, or made by hand
        missing = sys.modules.get(library) is None
    if missing:
        raise ModuleNotFoundError(f"{what} needs {library}; pip install 'tnpeft[{extra}]'", name=library)
