"""The weights' side of an adapted linear: its factors, its dense updates, and merging them into the base weight."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnpeft.adapters.layer.bank import FactorBank, TensorNetworkLayer
from tnpeft.adapters.layer.binding import Operand, SiteUpdate, as_base_factor, wide
from tnpeft.adapters.layer.snapshot import WeightSnapshot
from tnpeft.adapters.sites.selection import choose
from tnpeft.adapters.sites.weight import features
from tnpeft.networks import REPLICA, NetworkError
from tnpeft.nn.executor.eligibility import autocast_active


class Route(NamedTuple):
    """The path that a call takes, and why not a faster one.

    The paths are ``base`` (no update), ``merged``, ``mixed`` (an adapter for each row), ``shared`` and ``fused`` (one
    operation with the base layer; several layers may share their first product), ``cached`` (inference with results
    kept from call to call) and ``plain``.
    """

    kind: str
    reason: str


class DenseLinear(nn.Module, TensorNetworkLayer):
    """A linear (``nn.Linear``, ``Conv1D`` or quantised) and the factors of its adapters: dense updates and merging.

    Factors are fetched at every use: its own and, through an unregistered reference, those of the bank.
    """

    adapter_layer_names = ("tnpeft_factors", "tnpeft_magnitude")
    other_param_names = ("updates", "dropouts", "input_groups")
    weight_name = "weight"
    experts = 0  # one matrix, not one for each of several
    transposed = False

    def __init__(self, base_layer: nn.Module, bank: FactorBank, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.begin(bank)
        self.out_features, self.in_features = features(self.get_base_layer())

    def begin(self, bank: FactorBank) -> None:
        """Hold no adapter yet."""
        self.tnpeft_factors = nn.ModuleDict()
        self.tnpeft_magnitude = nn.ParameterDict()
        self.updates: dict[str, tuple[SiteUpdate, ...]] = {}
        self.dropouts: dict[str, float] = {}
        self.input_groups: dict[str, Any] = {}  # a SharedInputGroup for an adapter
        self.merged_adapters: list[str] = []
        self._disable_adapters = bank.disable_adapters
        self._trained, self._paused = set(), []
        self._bank = (bank,)
        self._kept: WeightSnapshot | None = None
        self.tied: list[DenseLinear] = []

    @property
    def bank(self) -> FactorBank:
        """The bank of the model."""
        return self._bank[0]

    @property
    def merged(self) -> bool:
        """True if adapters of the model are merged, here or in other linears: no update is added then."""
        return bool(self.merged_adapters or self._bank[0].merged_adapters)

    def home_device(self) -> torch.device:
        """The device of the base weight, under whatever name a quantised linear keeps it."""
        base = self.get_base_layer()
        held = chain([base._parameters.get(self.weight_name)], base.parameters(), base.buffers())
        return next((array.device for array in held if array is not None), torch.device("cpu"))

    def base_dtype(self) -> torch.dtype | None:
        """The dtype in which the linear computes, None if it does not tell."""
        dtype: torch.dtype | None = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        return dtype

    @torch.no_grad()
    def get_base_weight(self) -> Tensor:
        """The weight that the linear holds, as its back end reads it.

        On some processors bitsandbytes repacks 4-bit weights in place for inference, and neither its own function nor
        the back end can read them then: they are read off what the linear makes of the unit vectors.
        """
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if not getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            return super().get_base_weight()  # type: ignore[no-any-return]
        units = torch.eye(self.in_features, device=self.home_device())
        rows = base(units)
        return (rows if base.bias is None else rows - base.bias).t()

    def base_matrix(self) -> Tensor:
        """The base weight as it was before any merge, in fp32 or wider, ``[out, inp]``.

        Raises:
            NetworkError: the linear is quantised by a back end that cannot give its weight.
        """
        try:
            merged = self._kept is not None and self.quantization_backend is None
            weight = self._kept.weight() if merged else self.get_base_weight()  # type: ignore[union-attr]
        except TypeError as error:
            raise NetworkError(
                f"the weight of this quantised linear cannot be read: {error}",
                remedy="choose start values and a line that do without it, and no dora",
            ) from None
        return self._matrix(wide(weight))

    # ---- the update

    def operands(
        self, adapter: str, item: SiteUpdate, like: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Return the operands of one site's update in the program's order.

        They are on the device and in the dtype of ``like``, or of ``dtype`` instead; without ``like`` in the widest
        of their own, fp32 at least.
        """
        found = self._arrays(adapter, item)
        if like is None:
            dtype = reduce(torch.promote_types, (array.dtype for array in found), torch.float32)
        place = (None, dtype) if like is None else (like.device, dtype or like.dtype)
        return item.normalized([array.to(*place) for array in found])

    def owner(self, operand: Operand) -> TensorNetworkLayer:
        """Who owns an operand's array: this linear or the bank."""
        return self if operand.source == "site" else self.bank

    def _arrays(self, adapter: str, item: SiteUpdate) -> list[Tensor]:
        item.rows(self.bank.selected)  # each index has a value
        selected = item.chosen(self.bank.selected)
        return [
            self.constant(item, its.key)
            if its.source == "base"
            else choose(self.owner(its).tnpeft_factors[adapter].get(its.key), its.stack, selected)
            for its in item.operands
        ]

    def constant(self, item: SiteUpdate, label: str) -> Tensor:
        """The part of the base weight that a constant factor stands for."""
        return as_base_factor(item, label, self.site_matrix(item))

    def site_matrix(self, item: SiteUpdate) -> Tensor:
        """The base weight of a site before any merge, fp32 or wider: ``[out, inp]``, with experts before."""
        return self.site_part(self.base_matrix(), item)

    def region(self, item: SiteUpdate) -> tuple[slice, slice]:
        """The output and input features of a site."""
        own, whole = slice(item.start, item.start + item.length), slice(None)
        return own if item.side == "out" else whole, own if item.side == "inp" else whole

    def site_part(self, matrix: Tensor, item: SiteUpdate) -> Tensor:
        """The part of a matrix like the weight's that belongs to a site, a view."""
        return matrix[..., *self.region(item)]

    def site_input(self, item: SiteUpdate, x: Tensor) -> Tensor:
        """The part of an input that a site reads."""
        return x[..., self.region(item)[1]] if item.side == "inp" else x

    def _compute_dtype(self, adapter: str, x: Tensor) -> torch.dtype:
        """The wider dtype of input and trained factors; under autocast, which casts by itself, that of the input."""
        own = self.updates[adapter][0].trained
        if own is None or autocast_active(x.device.type):
            return x.dtype
        return torch.promote_types(x.dtype, self.owner(own).tnpeft_factors[adapter].get(own.key).dtype)

    # ---- dense updates and merging

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive; :func:`tnpeft.export_lora` writes it as a LoRA. Replicas are several updates."""
        return not (
            adapter_name in self.updates and REPLICA in self.updates[adapter_name][0].site_layout.network.stack
        )

    def _delta(self, adapter: str) -> Tensor:
        """The adapter's scaled update of the whole linear, ``[out, inp]``."""
        self._refuse_several(adapter)
        items = self.updates[adapter]
        with torch.autocast(self.home_device().type, enabled=False):
            deltas = [item.program.delta(self.operands(adapter, item), item.scale) for item in items]
        shape = (*((self.experts,) if self.experts else ()), self.out_features, self.in_features)
        if not items[0].side:
            return deltas[0].expand(shape)
        whole = deltas[0].new_zeros(shape)
        for item, delta in zip(items, deltas, strict=True):
            self.site_part(whole, item).add_(delta)
        return whole

    @property
    def active_here(self) -> list[str]:
        """The active adapters that have an update of this layer."""
        return [adapter for adapter in self.active_adapters if adapter in self.updates]

    def route(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Route:
        """Return the path that a call with ``x`` takes, and why it is not a faster one."""
        return self.route_by_state(adapter_names) or self.route_of_update(x)

    def route_by_state(self, adapter_names: Sequence[str] | None = None) -> Route | None:
        """Return the path of a call if it adds no update of an active adapter; None if it does.

        Raises:
            NetworkError: every row has its own adapter, and adapters are merged.
        """
        if self.disable_adapters:
            return Route("base", "the adapters are switched off")
        if self.merged:
            if adapter_names is None:
                return Route("merged", "the adapters are merged into the weights")
            raise NetworkError("the adapters are merged into the weights", remedy="call unmerge_adapter() first")
        if adapter_names is not None:
            return Route("mixed", "every row has its own adapter")
        return None if self.active_here else Route("base", "no active adapter has an update of this layer")

    def route_of_update(self, x: Tensor) -> Route:
        """Return the path of a call that adds the updates of active adapters."""
        raise NotImplementedError

    def prepare(self, adapter: str) -> None:
        """Compute what depends on an adapter's networks alone, once it is attached."""

    def _refuse_several(self, adapter: str) -> None:
        item = self.updates[adapter][0]
        if REPLICA in item.site_layout.network.stack:
            raise NetworkError(
                f"{adapter!r} is several replicas, not one update",
                remedy="take one out with tnpeft.replicas.attach(model, k, name), then use that",
            )
        if rows := item.rows(self.bank.selected)[0]:
            raise NetworkError(
                f"{adapter!r} has a value of {rows[0]!r} for each row, not one update",
                remedy=f"choose one value first: tnpeft.select(model, {rows[0]}=0)",
            )

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the adapter's change of the base weight, in fp32 or wider and in the base weight's layout.

        Raises:
            NetworkError: the adapter is unknown.
        """
        if adapter not in self.updates:
            raise NetworkError(f"this linear has no adapter {adapter!r}", remedy=f"it has {', '.join(self.updates)}")
        return self._stored(self._change(adapter))

    def _change(self, adapter: str, base: Tensor | None = None) -> Tensor:
        """Return the adapter's change of a base weight, ``[out, inp]``: its update, perhaps rescaled."""
        delta = self._delta(adapter)
        if adapter not in self.tnpeft_magnitude:
            return delta
        base = self.base_matrix() if base is None else base
        updated = base + delta
        return updated * self._ratio(adapter, updated.dtype, updated)[..., None] - base

    def _ratio(self, adapter: str, dtype: torch.dtype, updated: Tensor | None = None) -> Tensor:
        """What updated rows take to have their learned magnitudes, in the wider dtype; lengths have no gradient."""
        if updated is None:
            with torch.no_grad():
                updated = self.base_matrix() + self._delta(adapter)
        length = updated.detach().norm(dim=-1)  # forward derivatives heed detach alone
        dtype = torch.promote_types(dtype, self.tnpeft_magnitude[adapter].dtype)
        return rescaling(self.tnpeft_magnitude[adapter].to(dtype), length.to(dtype))

    def _matrix(self, weight: Tensor) -> Tensor:
        """The base weight, or another of its layout, as an ``[out, inp]`` matrix."""
        return self._stored(weight)

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
        names = [*self.merged_adapters, *names]
        if self.merged and self.quantization_backend is not None:
            self.unmerge()
        self.refuse_merge(names)
        merged = self.base_matrix() + sum(self._change(name) for name in names)
        merged = self._stored(merged).to(self.get_base_weight().dtype).contiguous()
        if safe_merge and not torch.isfinite(merged).all():
            raise NetworkError(
                f"merging {', '.join(names)} would make the weight infinite or not a number",
                remedy="check the adapter's factors",
            )
        base = self.get_base_layer()
        whole = self.quantization_backend is not None  # back ends store more than the weight
        kept = self._kept or WeightSnapshot.of(base, "" if whole else self.weight_name)
        if whole:
            self.set_base_weight(merged)
        else:  # a Parameter of its own: the one that was there may be another module's as well
            own: Any = base._parameters[self.weight_name]
            tied = next((its for its in self.tied if its is not self and its.merged_adapters == names), None)
            new = nn.Parameter(merged, requires_grad=own.requires_grad)
            setattr(base, self.weight_name, new if tied is None else tied.get_base_layer()._parameters["weight"])
        self._kept = kept
        self.merged_adapters[:] = names

    def refuse_merge(self, names: Sequence[str]) -> None:
        """Raise if adapters cannot be merged here; nothing is computed.

        Raises:
            NetworkError: the weight is computed at every call, quantised in a way that has no merge, or an adapter is
                several replicas, or has no value or several of a named stack index.
        """
        mine = [name for name in names if name in self.updates]
        backend = self.quantization_backend
        if mine and backend is not None and not backend.supports_merge:
            raise NetworkError(
                f"a linear is quantised with {backend.backend_name}, which takes no merged weight",
                remedy="merge into the model that is not quantised, or use tnpeft.export_lora",
            )
        if mine and backend is None and self.get_base_layer()._parameters.get(self.weight_name) is None:
            raise NetworkError(
                "the weight of a linear is computed at every call (pruned, normalised or parametrized)",
                remedy="make it permanent before merging: torch.nn.utils.prune.remove, remove_weight_norm, or "
                "parametrize.remove_parametrizations",
            )
        for name in mine:
            self._refuse_several(name)

    def unmerge(self) -> None:
        """Restore the base weight as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._kept is not None:
            module = self._kept.restore(follow=self.quantization_backend is None)
            if self.quantization_backend is not None:  # which may have put another in its place
                self.base_layer = module
        self._kept = None
        self.merged_adapters.clear()

    def saved_apart(self) -> AbstractContextManager[None]:
        """Hold the base weight as it was before any merge, for as long as it is written to a file."""
        return nullcontext() if self._kept is None else self._kept.back()


def rescaled(ratio: Tensor, base: Tensor, bias: Tensor | None, update: Tensor, product: Tensor | None) -> Tensor:
    """Return what rescaling the rows of weight and update by a ratio adds to ``base`` (DoRA, arXiv 2402.09353, 4.3).

    ``base`` is the layer's output with its ``bias``; ``product`` that of the weight alone if its input was another.
    """
    if product is None:
        product = base.to(ratio.dtype) if bias is None else base.to(ratio.dtype) - bias.to(ratio.dtype)
    return (ratio - 1) * product + ratio * update


def rescaling(magnitude: Tensor, length: Tensor) -> Tensor:
    """Return the factors that give rows of some length a magnitude; a row of zeros has no direction and stays."""
    there = length > 0
    return torch.where(there, magnitude / torch.where(there, length, 1.0), 1.0)
