"""Making PEFT know the tuner: at once if peft is loaded, else when it gets loaded. Imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from warnings import warn

PREFIX = "tnpeft_"  # every parameter of an adapter has it in its name, no module that holds a layer has
_CLASSES = {"tnpeft.adapters.config": "TensorNetworkConfig", "tnpeft.adapters.model": "TensorNetworkModel"}


class PeftTypeName(str):
    """A PEFT type outside PEFT's own enumeration: text with the ``value`` and ``name`` of an enum member.

    >>> TENSOR_NETWORK == "TENSOR_NETWORK", TENSOR_NETWORK.value
    (True, 'TENSOR_NETWORK')
    """

    @property
    def value(self) -> str:
        """The text itself."""
        return str(self)

    @property
    def name(self) -> str:
        """The text itself."""
        return str(self)


TENSOR_NETWORK = PeftTypeName("TENSOR_NETWORK")


def install() -> None:
    """Register now if peft is loaded, else as soon as it is. Calling it again changes nothing.

    >>> install()
    """
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def register() -> None:
    """Enter the tuner in PEFT's tables; while one of its two modules is still being read, that module does it.

    >>> register()
    >>> from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    >>> PEFT_TYPE_TO_PREFIX_MAPPING["TENSOR_NETWORK"]
    'tnpeft_'
    """
    if any(name in sys.modules and not hasattr(sys.modules[name], its) for name, its in _CLASSES.items()):
        return
    try:
        from peft import mapping

        from tnpeft.adapters.config import TensorNetworkConfig
        from tnpeft.adapters.model import TensorNetworkModel
    except ImportError as error:
        warn(f"tnpeft cannot register its tuner with this peft ({error}); install peft>=0.21", stacklevel=2)
        return
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[TENSOR_NETWORK] = PREFIX
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[TENSOR_NETWORK] = TensorNetworkConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[TENSOR_NETWORK] = TensorNetworkModel


class _PeftFinder:
    """Waits on the import path for peft and registers once its import has finished."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # type: ignore[arg-type]
            return spec
        read = spec.loader.exec_module

        def read_and_register(module: ModuleType) -> None:
            read(module)
            register()

        spec.loader.exec_module = read_and_register  # type: ignore[method-assign]
        return spec
