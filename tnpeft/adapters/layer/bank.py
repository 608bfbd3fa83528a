"""Owners of factors: the arrays of one adapter, the bank of the shared ones, and the base of every owner."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tnpeft.layout import Layout, ParameterSpec
from tnpeft.networks import ConfigError, NetworkError

BANK = "factor_bank"  # the bank's name in the model: without the prefix, or deleting an adapter would pass it over


class FactorStore(nn.Module):
    """The arrays of one adapter that one module owns: Parameters if they are trained, else buffers.

    It has no forward and no attribute ``weight``, so that no wrapping policy takes it for a layer.
    """

    def add(self, key: str, value: Tensor, *, trained: bool, kept: bool = True) -> None:
        """Own an array; one that is not trained goes to files only if it is ``kept``.

        Raises:
            NetworkError: the key is a name that every module has, such as ``weight`` or ``half``.
        """
        if hasattr(self, key) or key == "weight":
            raise NetworkError(f"a factor of a model cannot be called {key!r}", remedy="give it another name")
        if trained:
            self.register_parameter(key, nn.Parameter(value))
        else:  # not a view: a cast would leave its base as it was
            self.register_buffer(key, value.data, persistent=kept)

    def get(self, key: str) -> Tensor:
        """The array: whatever stands there now, so that casts, sharding and loading may replace it."""
        value: Tensor = getattr(self, key)
        return value

    def table(self, key: str) -> dict[str, Tensor | None]:
        """Return the table that holds the array, for frequent look-ups: the module's Parameters or its buffers."""
        return self._parameters if key in self._parameters else self._buffers


class TensorNetworkLayer(BaseTunerLayer):
    """The base of the bank and of adapted linears: the arrays of every adapter, and their devices."""

    adapter_layer_names: tuple[str, ...] = ("tnpeft_factors",)
    cast_input_dtype_enabled = True  # PEFT's helper switches it; inputs and factors are widened in either case
    tnpeft_factors: nn.ModuleDict
    _trained: set[str]  # adapters that may hold Parameters with requires_grad
    _paused: list[nn.Parameter]  # what required gradients when the adapters were switched off

    def register_factors(self, adapter: str, pieces: Mapping[ParameterSpec, Tensor], kept: bool) -> None:
        """Own the arrays of an adapter; frozen ones go to files only if ``kept``."""
        arrays = FactorStore()
        for param, value in pieces.items():
            trained = param.kind == "trainable"
            arrays.add(param.key, value, trained=trained, kept=kept and param.kind == "frozen")
        self.tnpeft_factors[adapter] = arrays
        self._trained.add(adapter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the device only: PEFT would also round the factors to the base weight's dtype."""
        target = device if device is not None else self.home_device()
        for array in self._arrays_held(adapter_name) if target is not None else ():
            if array.device.type != "meta":
                array.data = array.data.to(target)

    def _arrays_held(self, adapter: str) -> list[Tensor]:
        """All arrays of an adapter, its magnitude among them."""
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        items = [held[adapter] for held in containers if adapter in held]
        modules = [item for item in items if isinstance(item, nn.Module)]
        arrays = [array for module in modules for array in (*module.parameters(), *module.buffers())]
        return arrays + [item for item in items if isinstance(item, Tensor)]

    @abstractmethod
    def home_device(self) -> torch.device | None:
        """Return the device of the arrays."""

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off: off unmerges first, on again trains what was trained before."""
        if enabled:
            for array in self._paused:
                array.requires_grad_(True)
            self._paused = []
        else:
            if self.merged:
                self.unmerge()
            held = (array for name in self.adapter_layer_names for array in getattr(self, name).parameters())
            trained = [array for array in held if array.requires_grad]
            for array in trained:
                array.requires_grad_(False)
            self._paused = self._paused + trained
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones and, unless for inference, trainable; those that were trained are frozen.

        Only adapters that this package has made trainable are looked at, so that the time does not grow with the
        number of adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else [*adapter_names]
        self._flag(self._trained - {*names}, False)
        self._flag(names, not inference_mode)
        self._trained = set() if inference_mode else {*names}
        self._paused = []
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or freeze them, active or not."""
        names = {adapter_names} if isinstance(adapter_names, str) else {*adapter_names}
        self._flag(names, requires_grad)
        if requires_grad:
            self._trained |= names

    def cast(self, adapter: str, dtype: torch.dtype | None) -> None:
        """Cast all arrays of an adapter, its magnitude among them; None widens those of 16 bits or fewer to fp32."""
        for array in self._arrays_held(adapter):
            if array.is_floating_point() and (dtype is not None or array.element_size() < 4):
                array.data = array.data.to(dtype or torch.float32)

    def _flag(self, adapters: Iterable[str], flag: bool) -> None:
        for adapter in adapters:
            for array in self._arrays_held(adapter):
                if isinstance(array, nn.Parameter):
                    array.requires_grad_(flag)


class FactorBank(nn.Module, TensorNetworkLayer):
    """The owner of every factor that several sites share; one per model, a child of the model itself.

    ``layouts`` holds the layout of each adapter's factors, ``configs`` the configuration, ``keys`` the names of the
    arrays, ``unit_norm`` owners, keys and axes of those that are normalised; ``selected`` has the chosen values of
    named stacks; ``watching`` says whether a forward is on its way that must not meet reentrant checkpointing (see
    :mod:`tnpeft.adapters.layer.checkpointing`).
    """

    other_param_names: tuple[str, ...] = ("layouts", "configs", "keys", "unit_norm")
    weight = None
    bias = None
    in_features = out_features = 0  # PEFT's tuner layers have them

    def __init__(self, quantization_backend: Any = None) -> None:
        super().__init__()
        self.tnpeft_factors = nn.ModuleDict()
        self.layouts: dict[str, Layout] = {}
        self.quantization_backend = quantization_backend
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._trained, self._paused = set(), []
        self.configs: dict[str, Any] = {}
        self.keys: dict[str, frozenset[str]] = {}
        self.unit_norm: dict[str, dict[tuple[FactorStore, str, tuple[int, ...]], None]] = {}
        self.selected: dict[str, Tensor] = {}
        self.tied: dict[str, list[Any]] = {}  # layers that hold one Parameter, by their site's path
        self.device: torch.device | None = None
        self.watching = False

    @contextmanager
    def selecting(self, selected: dict[str, Tensor]) -> Iterator[None]:
        """Have other values of named stacks chosen for a while."""
        before, self.selected = self.selected, selected
        try:
            yield
        finally:
            self.selected = before

    def home_device(self) -> torch.device | None:
        """The device of the first linear of the adapter placed last."""
        return self.device

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The bank stands in no way of a conversion: :class:`AdaptedLayer` leaves it out."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Note which adapters the linears have merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters += [n for n in names if n in self.tnpeft_factors and n not in self.merged_adapters]

    def unmerge(self) -> None:
        """Note that the linears have restored their weights."""
        self.merged_adapters.clear()

    def forward(self, x: Any) -> Any:
        """The input as it is: an ``nn.Sequential`` calls all its children, and the bank is the last of them."""
        return x


def find_bank(model: Any) -> FactorBank | None:
    """The bank of a model, None if it has no adapter of this package.

    Raises:
        ConfigError: it is not a torch model.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model is {str(model)[:60]!r}",
            remedy="pass a torch.nn.Module with an adapter, such as what peft.get_peft_model returns",
        )
    return next((module for module in model.modules() if isinstance(module, FactorBank)), None)


class _NotTheBank(type):
    def __instancecheck__(cls, module: object) -> bool:
        return isinstance(module, BaseTunerLayer) and not isinstance(module, FactorBank)


class AdaptedLayer(metaclass=_NotTheBank):
    """A tuner layer for PEFT's conversion to LoRA and its reports: any but the bank, which has no update itself."""
