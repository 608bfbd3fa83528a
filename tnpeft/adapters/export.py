"""Any adapter as a plain PEFT LoRA: exact where the update's cut is small, else the nearest of a given rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnpeft._text import Printed, Table
from tnpeft.adapters.constants import PREFIX
from tnpeft.adapters.convert import formats
from tnpeft.adapters.convert.lines import AdapterLines, SiteAdapter
from tnpeft.adapters.convert.read import ABOUT
from tnpeft.adapters.convert.write import write_peft
from tnpeft.adapters.experts.weight import ExpertWeight
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.state import bank_of
from tnpeft.adapters.storage.contents import PEFT_PREFIX
from tnpeft.adapters.storage.files import written
from tnpeft.networks import NetworkError
from tnpeft.nn.lowrank import cut_rank, sides, truncated


@dataclass(frozen=True)
class Exported:
    """One linear's LoRA: its rank, that of its cut (0: read from the dense update), its relative error."""

    module: str
    rank: int
    cut: int
    error: float

    @property
    def exact(self) -> bool:
        """True if nothing but rounding was lost."""
        return 0 < self.cut <= self.rank


@dataclass(frozen=True)
class Export(Printed):
    """The result of an export, one row per linear; prints as a table, grouped by rank, cut and error."""

    path: Path
    rows: tuple[Exported, ...]
    parameters: int

    @property
    def error(self) -> float:
        """The largest relative error of a linear, in the Frobenius norm."""
        return max(row.error for row in self.rows)

    def _parts(self) -> tuple[str, Table]:
        exact = sum(row.exact for row in self.rows)
        title = f"LoRA in {self.path}: {len(self.rows)} linears, {exact} exact, {self.parameters:,} parameters"
        kinds: dict[tuple[int, int, bool], list[Exported]] = {}
        for row in self.rows:
            kinds.setdefault((row.rank, row.cut, row.exact), []).append(row)
        table = []
        for (rank, cut, is_exact), rows in sorted(kinds.items()):
            worst = "exact" if is_exact else f"at most {max(row.error for row in rows):.3g}"
            table.append((len(rows), rank, cut or "-", worst))
        return title, Table(("linears", "rank", "cut", "error"), tuple(table), ">>><")


def export_lora(model: nn.Module, path: str | Path, adapter: str = "default", *, rank: int | None = None) -> Export:
    """Write the adapter as a folder that ``peft.PeftModel.from_pretrained`` loads as a LoRA.

    Where the smallest cut between rows and columns is at most ``rank``, the two sides are contracted into LoRA's two
    factors, exactly (a LoRA gives its own factors back). Elsewhere, and for DoRA, the update is cut to ``rank`` by
    a singular value decomposition, and the report states its error. Ranks may differ between linears.

    Args:
        model: a model with a tensor-network adapter.
        path: the folder to write.
        adapter: which adapter.
        rank: the largest rank; None for the largest at which two factors have at most as many elements as the update.

    Raises:
        NetworkError: the adapter is unknown, several updates or trains biases, or ``rank`` is not a positive integer.

    >>> import peft, tempfile, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="vera", ranks={"r": 3}, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 16)), config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = export_lora(model, folder)
    >>> report.rows
    (Exported(module='0', rank=3, cut=3, error=0.0),)
    """
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise NetworkError(f"rank is {rank!r}", remedy="pass a positive whole number, or None")
    bank_of(model, adapter)
    configs: Any = model.peft_config
    own = configs[adapter]
    if own.replicas > 1:
        raise NetworkError(
            f"{adapter!r} is {own.replicas} replicas",
            remedy="take one out with tnpeft.replicas.attach(model, k, name), then export that",
        )
    if own.bias != "none":
        raise NetworkError("an adapter with trained biases cannot be exported", remedy="train it with bias='none'")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    linears = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, TensorNetworkLinear | ExpertWeight) and adapter in module.updates
    }
    for name, module in base.named_modules():
        if isinstance(module, DenseLinear) and adapter in module.updates and name not in linears:
            raise NetworkError(
                f"{name} is not a linear, and only updates of linears are exported",
                remedy="merge the adapter, or attach one of linears alone",
            )
    rows, sites = [], []
    for name, linear in linears.items():
        linear._refuse_several(adapter)
        row, left, right = _lora(name, linear, adapter, rank)
        packing = formats.NESTED if linear.experts else formats.LORA
        rows.append(row)
        sites.append(SiteAdapter(name, packing.site, {"B": left.float(), "A": right.float()}))
    about = {key: getattr(own, key) for key in (*ABOUT, "trainable_token_indices")}
    about["fan_in_fan_out"] = any(isinstance(linear.get_base_layer(), Conv1D) for linear in linears.values())
    about["target_modules"] = _targets(base, [name for name, its in linears.items() if not its.experts])
    with written(path) as folder:
        write_peft(AdapterLines(tuple(sites), about, _others(model, adapter)), Path(folder), "peft")
    elements = sum(factor.numel() for site in sites for factor in site.factors.values())
    return Export(Path(path), tuple(rows), elements)


@torch.no_grad()
def _lora(
    name: str, linear: TensorNetworkLinear | ExpertWeight, adapter: str, limit: int | None
) -> tuple[Exported, Tensor, Tensor]:
    """The LoRA of a linear, or those of all experts: ``[expert, out, r]`` and ``[expert, r, inp]``."""
    rows, cols, items = linear.out_features, linear.in_features, linear.updates[adapter]
    most = min(limit or max(1, rows * cols // (rows + cols)), rows, cols)
    networks = [(item.program.plan.network, item.site_layout.sizes) for item in items]
    cut = sum(cut_rank(net.select(*net.stack), sizes) for net, sizes in networks)
    if adapter in linear.tnpeft_magnitude or cut >= min(rows, cols):
        cut = 0
        found = [_dense(delta, most) for delta in linear._change(adapter).float().reshape(-1, rows, cols)]
    else:
        pairs = [_through_cuts(linear, adapter, expert) for expert in range(linear.experts or 1)]
        found = [truncated(*pair, most) if cut > most else (*pair, 0.0) for pair in pairs]
    lefts, rights, errors = zip(*found, strict=True)
    row = Exported(name, lefts[0].shape[1], cut, max(errors))
    left, right = torch.stack(lefts), torch.stack(rights)
    return (row, left, right) if linear.experts else (row, left[0], right[0])


def _through_cuts(linear: TensorNetworkLinear | ExpertWeight, adapter: str, expert: int) -> tuple[Tensor, Tensor]:
    """Two factors of the whole update of a linear, or of one expert; those of its slices stand side by side."""
    lefts, rights = [], []
    for item in linear.updates[adapter]:
        net = item.program.plan.network
        arrays = zip(item.program.labels, linear.operands(adapter, item), strict=True)
        values = {label: array.float() for label, array in arrays}
        left, right = sides(net, item.site_layout.sizes, values, **dict.fromkeys(net.stack, expert))
        rows, cols = linear.region(item)
        lefts.append(left.new_zeros(linear.out_features, left.shape[1]))
        lefts[-1][rows] = left * item.scale
        rights.append(right.new_zeros(right.shape[0], linear.in_features))
        rights[-1][:, cols] = right
    return torch.cat(lefts, 1), torch.cat(rights, 0)


def _dense(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    eye = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
    return truncated(eye, delta, rank) if delta.shape[0] <= delta.shape[1] else truncated(delta, eye, rank)


def _others(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return what the adapter saves besides factors, by names in the model: modules trained in full."""
    if not isinstance(model, PeftModel):
        return {}
    state: Mapping[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name.removeprefix(PEFT_PREFIX): value for name, value in state.items() if PREFIX not in name}


def _targets(base: nn.Module, paths: Sequence[str]) -> list[str]:
    """The last names of the linears' paths if these mean the same linears, else the whole paths."""
    names = {path.rpartition(".")[2] for path in paths}
    meant = {path for path, _ in base.named_modules() if path.rpartition(".")[2] in names}
    return sorted(names if meant == {*paths} else paths)
