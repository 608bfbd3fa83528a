"""The linear that adds a tensor-network update to its output."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnpeft.adapters.bank import FactorBank, TensorNetworkLayer
from tnpeft.adapters.guard import refuse_reentrant
from tnpeft.adapters.kept import Kept
from tnpeft.adapters.prepared import Prepared, may_keep
from tnpeft.adapters.sites import features
from tnpeft.adapters.update import Update, base_factor, normalised
from tnpeft.networks import NetworkError
from tnpeft.nn.together import may_join

BASE = "__base__"  # PEFT's name for "no adapter" in mixed batches


class TensorNetworkLinear(nn.Module, TensorNetworkLayer):
    """A linear (``nn.Linear``, ``Conv1D`` or quantised) with the updates of its adapters.

    The forward is a pure function of its input and of Parameters fetched at every call: the linear's own ones and,
    through an unregistered reference, those of the bank.
    """

    adapter_layer_names = ("tnpeft_factors", "tnpeft_magnitude")
    other_param_names = ("updates", "dropouts")

    def __init__(self, base_layer: nn.Module, bank: FactorBank, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.tnpeft_factors = nn.ModuleDict()
        self.tnpeft_magnitude = nn.ParameterDict()
        self.updates: dict[str, tuple[Update, ...]] = {}
        self.dropouts: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._bank = (bank,)
        self._prepared = Prepared()
        self._kept: Tensor | Kept | None = None
        self.out_features, self.in_features = features(self.get_base_layer())

    @property
    def bank(self) -> FactorBank:
        """The bank of the model."""
        return self._bank[0]

    def home_device(self) -> torch.device | None:
        """The device of the base weight."""
        return self._get_base_layer_device_and_dtype(self.get_base_layer())[0]

    def base_matrix(self) -> Tensor:
        """The base weight as it was before any merge, in fp32 or wider, ``[out, inp]``.

        Raises:
            NetworkError: the linear is quantised by a back end that cannot give its weight.
        """
        try:
            weight = self._kept if isinstance(self._kept, Tensor) else self.get_base_weight()
        except TypeError as error:
            raise NetworkError(
                f"the weight of this quantised linear cannot be read: {error}",
                remedy="choose start values and a line that do without it, and no dora",
            ) from None
        return self._stored(_wide(weight))

    # ---- the update

    def operands(self, adapter: str, item: Update, like: Tensor | None = None) -> list[Tensor]:
        """The arrays of one site's update in the program's order, on the device and in the dtype of ``like``."""
        found = []
        for operand, array in zip(item.operands, self._arrays(adapter, item), strict=True):
            if operand.norm:
                array = normalised(array, operand.norm)
            found.append(array if like is None else array.to(like.device, like.dtype))
        return found

    def _arrays(self, adapter: str, item: Update) -> list[Tensor]:
        own, shared = self.tnpeft_factors[adapter], self.bank.tnpeft_factors[adapter]
        return [
            base_factor(self.base_matrix(), item, operand.key)
            if operand.source == "base"
            else (own if operand.source == "site" else shared).get(operand.key)
            for operand in item.operands
        ]

    def _run(self, adapter: str, item: Update, x: Tensor, result: Tensor | None) -> Tensor:
        """``result`` plus one site's update of ``x``; without gradients, what needs the factors only is kept."""
        keeps = not self.training and item.keeps
        if keeps and may_keep(arrays := self._arrays(adapter, item), x.device.type):
            key = adapter, item.start, x.dtype, x.device
            values = self._prepared.get(key, arrays, lambda: item.run.prepare(self.operands(adapter, item, x)))
        else:
            values = item.run.prepare(self.operands(adapter, item, x))
        return item.run.apply(x, values, result, item.scale)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training forgets what inference has kept."""
        self._prepared.clear()
        return super().train(mode)

    def refresh(self) -> None:
        """Forget what inference has kept."""
        self._prepared.clear()

    def _update(self, adapter: str, x: Tensor, result: Tensor | None) -> Tensor:
        """``result`` plus the adapter's update of ``x``, both in one dtype; the update alone for None."""
        items = self.updates[adapter]
        if not items[0].side:
            return self._run(adapter, items[0], x, result)
        parts: list[Tensor] = []
        at = 0
        for item in items:
            if item.side == "inp":
                narrow = x.narrow(-1, item.start, item.length)
                result = self._run(adapter, item, narrow, result)
                continue
            parts.append(self._rows(x, result, at, item.start))
            rows = None if result is None else result.narrow(-1, item.start, item.length)
            parts.append(self._run(adapter, item, x, rows))
            at = item.start + item.length
        if not parts:
            assert result is not None  # a slice of the input's side has made it
            return result
        parts.append(self._rows(x, result, at, self.out_features))
        return torch.cat([rows for rows in parts if rows.shape[-1]], dim=-1)

    @staticmethod
    def _rows(x: Tensor, result: Tensor | None, start: int, stop: int) -> Tensor:
        if result is None:
            return x.new_zeros((*x.shape[:-1], stop - start))
        return result.narrow(-1, start, stop - start)

    def _adapted(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """The output with the update of one adapter added."""
        drop = self.dropouts[adapter]
        if drop and self.training:
            x = nn.functional.dropout(x, drop)
        if adapter in self.tnpeft_magnitude:
            return self._dora(adapter, x, result, dropped=bool(drop) and self.training)
        dtype = self._compute_dtype(adapter, x)
        if x.dtype == dtype == result.dtype:
            return self._update(adapter, x, result)
        return result + self._update(adapter, x.to(dtype), None).to(result.dtype)

    def _compute_dtype(self, adapter: str, x: Tensor) -> torch.dtype:
        """The wider dtype of input and factors; under autocast, which casts by itself, that of the input."""
        if torch.is_autocast_enabled(x.device.type):
            return x.dtype
        for operand in self.updates[adapter][0].operands:
            if operand.source != "base":
                arrays = self.tnpeft_factors if operand.source == "site" else self.bank.tnpeft_factors
                return torch.promote_types(x.dtype, arrays[adapter].get(operand.key).dtype)
        return x.dtype

    def _dora(self, adapter: str, x: Tensor, result: Tensor, dropped: bool) -> Tensor:
        """The output of the weight whose rows are rescaled to the learned magnitudes (arXiv 2402.09353, 4.3)."""
        dtype = self._compute_dtype(adapter, x)
        magnitude = self.tnpeft_magnitude[adapter].to(dtype)
        with torch.no_grad():
            length = (self.base_matrix() + _wide(self._delta(adapter))).norm(dim=1).to(dtype)
        ratio = magnitude / length
        bias = self.get_base_layer().bias
        if dropped:
            plain = nn.functional.linear(x.to(dtype), self.base_matrix().to(dtype))
        else:
            plain = result.to(dtype) if bias is None else result.to(dtype) - bias.to(dtype)
        change = (ratio - 1) * plain + ratio * self._update(adapter, x.to(dtype), None)
        return result + change.to(result.dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base linear's output plus the updates of the active adapters, or of each row's own adapter."""
        if self.disable_adapters or (self.merged and adapter_names is None):
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            raise NetworkError("the adapters are merged into the weights", remedy="call unmerge_adapter() first")
        refuse_reentrant(self.bank)
        active = [adapter for adapter in self.active_adapters if adapter in self.updates]
        if adapter_names is None and len(active) == 1 and not args and not kwargs and self._joins(active[0], x):
            item = self.updates[active[0]][0]
            operands = self.operands(active[0], item, x)
            return item.run.with_linear(x, operands, self.base_layer.weight, self.base_layer.bias, item.scale)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, result, adapter_names)
        for adapter in active:
            result = self._adapted(adapter, x, result)
        return result

    def _joins(self, adapter: str, x: Tensor) -> bool:
        """Whether the base linear and the update can be one operation here, with nothing in between."""
        item = self.updates[adapter][0]
        return (
            item.run.paired
            and not item.side
            and not (self.training and self.dropouts[adapter])
            and adapter not in self.tnpeft_magnitude
            and may_join(self.base_layer, x)
            and x.dtype == self._compute_dtype(adapter, x)
        )

    def _mixed(self, x: Tensor, result: Tensor, names: Sequence[str]) -> Tensor:
        if len(names) != len(x):
            raise NetworkError(
                f"adapter_names has {len(names)} entries for {len(x)} rows", remedy="name one adapter per row"
            )
        result = result.clone()
        for adapter in dict.fromkeys(names):
            if adapter != BASE and adapter in self.updates:
                rows = torch.tensor([k for k, name in enumerate(names) if name == adapter], device=x.device)
                result[rows] = self._adapted(adapter, x[rows], result[rows])
        return result

    # ---- dense updates and merging

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive; :func:`tnpeft.export_lora` writes it as a LoRA."""
        return True

    def _delta(self, adapter: str) -> Tensor:
        """The adapter's scaled update of the whole linear, ``[out, inp]``."""
        items = self.updates[adapter]
        with torch.autocast(self.weight.device.type, enabled=False):
            deltas = [item.delta(self.operands(adapter, item)) for item in items]
        if not items[0].side:
            return deltas[0]
        whole = deltas[0].new_zeros((self.out_features, self.in_features))
        for item, delta in zip(items, deltas, strict=True):
            whole.narrow(0 if item.side == "out" else 1, item.start, item.length).add_(delta)
        return whole

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in the factors' dtype and the base weight's layout.

        Raises:
            NetworkError: there is no such adapter.
        """
        if adapter not in self.updates:
            raise NetworkError(f"this linear has no adapter {adapter!r}", remedy=f"it has {', '.join(self.updates)}")
        return self._stored(self._change(adapter))

    def _change(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, ``[out, inp]``: its update, with the magnitude if it has one."""
        delta = self._delta(adapter)
        if adapter not in self.tnpeft_magnitude:
            return delta
        base = self.base_matrix()
        updated = base + _wide(delta)
        ratio = _wide(self.tnpeft_magnitude[adapter]) / updated.norm(dim=1)
        return updated * ratio[:, None] - base

    def _stored(self, matrix: Tensor) -> Tensor:
        """An ``[out, inp]`` matrix in the layout of the base weight."""
        return matrix.T if isinstance(self.get_base_layer(), Conv1D) else matrix

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add the updates to the base weight: summed in fp32, cast once. The weight is kept for :meth:`unmerge`.

        Raises:
            NetworkError: ``safe_merge`` found a number that is not finite; nothing is changed then.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.updates]
        if not names:
            return
        if self.merged and self.quantization_backend is not None:
            names = [*self.merged_adapters, *names]
            self.unmerge()
        names = [*self.merged_adapters, *names]
        merged = self._merged(names, safe_merge)
        if self._kept is None:
            base = self.get_base_layer()
            self._kept = Kept.of(base) if self.quantization_backend else base.weight.data
        self.set_base_weight(merged)
        self.merged_adapters[:] = names

    @torch.no_grad()
    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise if :meth:`merge` with ``safe_merge`` would; nothing is changed.

        Raises:
            NetworkError: it would.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        new = [name for name in names if name in self.updates and name not in self.merged_adapters]
        self._merged([*self.merged_adapters, *new], safe=True)

    def _merged(self, names: Sequence[str], safe: bool) -> Tensor:
        """The base weight with the updates of the adapters, as the linear stores it."""
        merged = self.base_matrix() + sum(self._change(name) for name in names)
        merged = self._stored(merged).to(self.get_base_weight().dtype).contiguous()
        if safe and not torch.isfinite(merged).all():
            raise NetworkError(
                f"merging {', '.join(names)} would make the weight infinite or not a number",
                remedy="check the adapter's factors",
            )
        return merged

    def unmerge(self) -> None:
        """Restore the base weight as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        if isinstance(self._kept, Kept):
            self.base_layer = self._kept.restore()
        elif self._kept is not None:
            base.weight.data = self._kept.to(base.weight.device)
        self._kept = None
        self.merged_adapters.clear()


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
