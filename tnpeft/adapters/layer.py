"""The linear that adds a tensor-network update to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from tnpeft.adapters.bank import FactorBank
from tnpeft.adapters.dense import DenseLinear, rescaling, wide
from tnpeft.adapters.direct import Direct
from tnpeft.adapters.guard import check_recomputation, refuse_reentrant
from tnpeft.adapters.joined import Joined
from tnpeft.adapters.mixed import block_rows, group_by_network, update_blocks
from tnpeft.adapters.prepared import Prepared, may_keep
from tnpeft.adapters.update import Update
from tnpeft.layout import ParameterSpec
from tnpeft.networks import NetworkError
from tnpeft.nn.modes import autocasting
from tnpeft.nn.together import may_join


class TensorNetworkLinear(DenseLinear):
    """A linear (``nn.Linear``, ``Conv1D`` or quantised) with the updates of its adapters.

    The forward is a pure function of its input and of Parameters fetched at every call: the linear's own ones and,
    through an unregistered reference, those of the bank.
    """

    def __init__(self, base_layer: nn.Module, bank: FactorBank, **kwargs: Any) -> None:
        super().__init__(base_layer, bank, **kwargs)
        self._prepared = Prepared()

    def _ready(self, adapter: str, item: Update, x: Tensor) -> list[Tensor] | None:
        """What inference keeps of one site's update, computed from factors alone; None where nothing may be kept."""
        keeps = not self.training and item.keeps
        if keeps and may_keep(arrays := self._arrays(adapter, item), x.device.type):
            key = adapter, item.start, x.dtype, x.device
            return self._prepared.get(key, arrays, lambda: item.run.prepare(self.operands(adapter, item, x)))
        return None

    def values(self, adapter: str, item: Update, x: Tensor) -> list[Tensor]:
        """All but ``x`` that one site's update needs."""
        kept = self._ready(adapter, item, x)
        return item.run.prepare(self.operands(adapter, item, x)) if kept is None else kept

    def _run(self, adapter: str, item: Update, x: Tensor, result: Tensor | None) -> Tensor:
        """``result`` plus one site's update of ``x``."""
        kept = self._ready(adapter, item, x)
        if kept is None:
            return item.run(x, self.operands(adapter, item, x), result, item.scale)
        return item.run.apply(x, kept, result, item.scale)

    def register_factors(self, adapter: str, pieces: Mapping[ParameterSpec, Tensor], kept: bool) -> None:
        """Own the arrays of an adapter, and forget what inference has kept of one of that name."""
        self._prepared.clear()
        super().register_factors(adapter, pieces, kept)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and what inference has kept of it."""
        self._prepared.clear()
        super().delete_adapter(adapter_name)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget what inference has kept."""
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

    def _adapted(self, adapter: str, x: Tensor, result: Tensor, base: Tensor) -> Tensor:
        """``result`` with the update of one adapter added; ``base`` is the output of the base linear alone."""
        drop = self.dropouts[adapter]
        if drop and self.training:
            x = nn.functional.dropout(x, drop)
        if adapter in self.tnpeft_magnitude:
            return result + self._dora(adapter, x, base, dropped=bool(drop) and self.training)
        dtype = self._compute_dtype(adapter, x)
        if x.dtype == dtype == result.dtype:
            return self._update(adapter, x, result)
        return result + self._update(adapter, x.to(dtype), None).to(result.dtype)

    def _compute_dtype(self, adapter: str, x: Tensor) -> torch.dtype:
        """The wider dtype of input and factors; under autocast, which casts by itself, that of the input."""
        if autocasting(x.device.type):
            return x.dtype
        for operand in self.updates[adapter][0].operands:
            if operand.source != "base":
                arrays = self.tnpeft_factors if operand.source == "site" else self.bank.tnpeft_factors
                dtype = arrays[adapter].get(operand.key).dtype
                return x.dtype if x.dtype == dtype else torch.promote_types(x.dtype, dtype)
        return x.dtype

    def _dora(self, adapter: str, x: Tensor, base: Tensor, dropped: bool) -> Tensor:
        """What rescaling the weight's rows to the learned magnitudes adds to ``base`` (arXiv 2402.09353, 4.3)."""
        dtype = self._compute_dtype(adapter, x)
        magnitude = self.tnpeft_magnitude[adapter].to(dtype)
        with torch.no_grad():
            length = (self.base_matrix() + wide(self._delta(adapter))).norm(dim=1).to(dtype)
        ratio = rescaling(magnitude, length)
        bias = self.get_base_layer().bias
        if dropped:
            plain = nn.functional.linear(x.to(dtype), self.base_matrix().to(dtype))
        else:
            plain = base.to(dtype) if bias is None else base.to(dtype) - bias.to(dtype)
        change = (ratio - 1) * plain + ratio * self._update(adapter, x.to(dtype), None)
        return change.to(base.dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base linear's output plus the updates of the active adapters, or of each row's own adapter."""
        eager = adapter_names is None and not args and not kwargs and not torch.compiler.is_compiling()
        if eager:
            check_recomputation(self)
            if self._prepared.direct is not None and (kept := self._prepared.direct(self, x)) is not None:
                result: Tensor = kept
                return result
            if torch.is_grad_enabled() and (joined := self.joined()) is not None:
                together = joined(self, x)
                if together is not None:
                    return together
        if self.disable_adapters or (self.merged and adapter_names is None):
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            raise NetworkError("the adapters are merged into the weights", remedy="call unmerge_adapter() first")
        refuse_reentrant(self.bank)
        active = [adapter for adapter in self.active_adapters if adapter in self.updates]
        if adapter_names is None and len(active) == 1 and not args and not kwargs and self._joins(active[0], x):
            item = self.updates[active[0]][0]
            operands = self.operands(active[0], item, x, raw=True)
            weight, bias = self.base_layer.weight, self.base_layer.bias
            return item.run.with_linear(x, operands, weight, bias, item.scale, item.norms)
        if eager and not self.training and len(active) == 1:
            self._prepared.direct = direct = Direct.of(self, active[0], x)
            if direct is not None and (kept := direct(self, x)) is not None:
                return kept
        result = base = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, base, adapter_names)
        for adapter in active:
            result = self._adapted(adapter, x, result, base)
        return result

    def _joins(self, adapter: str, x: Tensor) -> bool:
        """Whether the base linear and the update can be one operation here, with nothing in between."""
        item = self.updates[adapter][0]
        return (
            not item.side
            and not (self.training and self.dropouts[adapter])
            and adapter not in self.tnpeft_magnitude
            and may_join(self.base_layer, x)
            and x.dtype == self._compute_dtype(adapter, x)
        )

    def joined(self) -> Joined | None:
        """What is kept of the linear's one active adapter if the two can be one operation."""
        kept: Joined | None = self._prepared.joined
        if kept is None or not kept.holds(self):
            self._prepared.joined = kept = Joined.of(self)
        return kept

    def _mixed(self, x: Tensor, base: Tensor, names: Sequence[str]) -> Tensor:
        """``base`` with the update of every row's own adapter added."""
        if len(names) != len(x):
            raise NetworkError(
                f"adapter_names has {len(names)} entries for {len(x)} rows",
                remedy="name one adapter per row; linears that see other rows than the batch's take one adapter only",
            )
        result = base.clone()
        for lot in group_by_network(
            self, [adapter for adapter in dict.fromkeys(names) if adapter in self.updates], x
        ):
            rows, own = (torch.tensor(places, device=x.device) for places in block_rows(lot, names))
            given = base[rows]
            if len(lot) == 1:
                adapted = self._adapted(lot[0], x[rows], given, given)
            else:
                adapted = update_blocks(self, lot, x[rows], given)
            result[rows[own]] = adapted[own]
        return result
