"""Making PEFT know the tuner: at once if peft is loaded, else when it gets loaded. Imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from warnings import warn


def install() -> None:
    """Register now if peft is loaded, else as soon as it is. Calling it again changes nothing.

    >>> install()
    """
    if sys.modules.get("peft"):
        register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def register() -> None:
    """Enter the tuner in PEFT's tables. The package of the tuner imports peft before any of its own modules.

    >>> register()
    >>> from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    >>> PEFT_TYPE_TO_PREFIX_MAPPING["TENSOR_NETWORK"]
    'tnpeft_'
    """
    try:
        from peft import mapping

        from tnpeft.adapters.config import TensorNetworkConfig
        from tnpeft.adapters.constants import PREFIX, TENSOR_NETWORK
        from tnpeft.adapters.model import TensorNetworkModel
        from tnpeft.adapters.peft_patches import hook
    except ImportError as error:
        warn(f"tnpeft cannot register its tuner with this peft ({error}); install peft>=0.21", stacklevel=2)
        return
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[TENSOR_NETWORK] = PREFIX
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[TENSOR_NETWORK] = TensorNetworkConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[TENSOR_NETWORK] = TensorNetworkModel
    hook()


class _PeftFinder(MetaPathFinder):
    """Waits on the import path for peft and registers once its import has finished."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "peft" else None
        if spec is None or spec.loader is None:
            return None
        read = spec.loader.exec_module

        def read_and_register(module: ModuleType) -> None:
            read(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register()

        spec.loader.exec_module = read_and_register  # type: ignore[method-assign]
        return spec
