"""Rows of one batch that go through several adapters of one network: one contraction for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.layer.weight_cache import is_cacheable
from tnpeft.networks import REPLICA, NetworkError
from tnpeft.networks.replicas import with_replicas
from tnpeft.nn.executor.eligibility import added
from tnpeft.nn.executor.program import Program, program

BASE = "__base__"  # PEFT's name for "no adapter" in mixed batches
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")  # [rows, tokens, ...]


class BatchAdapterNames:
    """The adapter of every row of one batch, for modules that see its rows or, as OPT's ``fc1``, all its tokens."""

    def __init__(self, names: Sequence[str], each: int = 1) -> None:
        self._given = [*names]
        self._expanded = [name for name in names for _ in range(each)]
        self.names = self._expanded
        self._lengths: set[int] = set()

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the rows and their tokens: a forward pre-hook of the whole model, and of an encoder.

        ``generate`` runs an encoder before it makes several rows of each.
        """
        given = [*args[:1], *(kwargs.get(name) for name in _TOKENS)]
        seen = [t for t in given if isinstance(t, Tensor) and t.dim() > 1]
        self._lengths = {t.shape[1] for t in seen}
        rows = {len(t) for t in seen}
        self.names = self._given if len(self._given) in rows - {len(self._expanded)} else self._expanded

    def hand(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Name the adapters of what a module is given: a forward pre-hook of the module."""
        names = self.of(args[0]) if args else self.names
        if isinstance(module, AuxiliaryTrainingWrapper):  # which knows only adapters that have their own such module
            names = [name if name in module._adapters else BASE for name in names]
        return args, {**kwargs, "adapter_names": names}

    def of(self, x: Tensor) -> list[str]:
        """The names of the rows of ``x``, token by token if it is all tokens of the batch, row after row."""
        tokens = len(x) // len(self.names)
        if x.dim() == 2 and tokens in self._lengths and len(x) == tokens * len(self.names):
            return [name for name in self.names for _ in range(tokens)]
        return self.names


def check_names(names: Sequence[str], configs: Mapping[str, Any]) -> None:
    """Raise unless every row's adapter is one of the configured ones, or none.

    Raises:
        NetworkError: the names are missing, an adapter is unknown, or it is several replicas.
    """
    if not names:
        raise NetworkError("adapter_names is empty", remedy="name one adapter per row")
    unknown = sorted(set(names) - {BASE, *configs})
    if unknown:
        raise NetworkError(f"unknown adapter {unknown[0]!r}", remedy=f"the adapters are {', '.join(configs)}")
    for name in set(names) - {BASE}:
        if configs[name].replicas > 1:
            raise NetworkError(
                f"{name!r} is {configs[name].replicas} replicas, which take a batch in blocks",
                remedy="take them out with tnpeft.replicas.attach and name the one for each row",
            )


def rows_for_each(options: Mapping[str, Any], model: nn.Module) -> int:
    """The rows that ``generate`` makes of each of a batch with its options: several beams or sequences."""
    for given in (options, options.get("generation_config"), getattr(model, "generation_config", None)):
        get = given.get if isinstance(given, Mapping) else partial(getattr, given)
        counts = [get(key, None) for key in ("num_beams", "num_return_sequences")]
        if any(counts):
            return max(count or 1 for count in counts)
    return 1


# ---- in a layer


def adapters_of_rows(layer: DenseLinear, names: Sequence[str], x: Tensor) -> list[str]:
    """Return the adapters of the rows that have an update of a layer.

    Raises:
        NetworkError: the input has other rows than there are names, or an adapter has a value of a named stack index
            for each row.
    """
    if len(names) != len(x):
        raise NetworkError(
            f"adapter_names has {len(names)} entries for {len(x)} rows",
            remedy="name one adapter per row; layers that see other rows than the batch's take one adapter only",
        )
    found = [adapter for adapter in dict.fromkeys(names) if adapter in layer.updates]
    for adapter in found:
        if rows := layer.updates[adapter][0].rows(layer.bank.selected)[0]:
            raise NetworkError(
                f"rows cannot have both an adapter and a value of {rows[0]!r} of their own",
                remedy=f"choose one value for all, tnpeft.select(model, {rows[0]}=0), or leave out adapter_names",
            )
    return found


def group_by_network(layer: DenseLinear, adapters: Sequence[str], x: Tensor) -> list[list[str]]:
    """The adapters in groups of one network here, each of which can be one contraction of ``x``; any other is alone.

    It takes one update of the whole linear, factors of one dtype, and no constants but the base weight.
    """
    found: dict[Hashable, list[str]] = {}
    for adapter in adapters:
        item, dtype = layer.updates[adapter][0], layer._compute_dtype(adapter, x)
        alone = item.side or item.data or item.stack or adapter in layer.tnpeft_magnitude
        kind = adapter if alone else (item.program, item.unit_norm, item.constants, item.scale, dtype)
        found.setdefault(kind, []).append(adapter)
    return [*found.values()]


def block_rows(group: Sequence[str], names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The rows of every adapter of the group, block by block; a shorter block repeats its first row.

    The second list has the places of the blocks' own rows in the first: every row once.

    >>> block_rows(["b", "a"], ["a", "b", "c", "a"])
    ([1, 1, 0, 3], [0, 2, 3])
    """
    blocks = [[row for row, name in enumerate(names) if name == adapter] for adapter in group]
    longest = max(map(len, blocks))
    rows = [row for block in blocks for row in block + block[:1] * (longest - len(block))]
    return rows, [k * longest + place for k, block in enumerate(blocks) for place in range(len(block))]


def update_blocks(layer: Any, group: Sequence[str], x: Tensor, result: Tensor) -> Tensor:
    """``result`` plus the updates of a linear by a group's adapters, each of its own block of the rows of ``x``."""
    items = [layer.updates[adapter][0] for adapter in group]
    first = items[0]
    run = _beside(first.program, len(group))
    rows = x.to(layer._compute_dtype(group[0], x))

    def stacked() -> list[Tensor]:
        own = [layer.operands(adapter, item, rows) for adapter, item in zip(group, items, strict=True)]
        return [
            arrays[0] if operand.source == "base" else torch.stack(arrays)
            for operand, arrays in zip(first.operands, zip(*own, strict=True), strict=True)
        ]

    sources = None
    if not layer.training and not first.constants:
        both = zip(group, items, strict=True)
        arrays = [array for adapter, item in both for array in layer._arrays(adapter, item)]
        sources = arrays if is_cacheable(arrays, rows.device.type) else None
    base = result if rows.dtype == result.dtype else None
    updated = first.run(run, rows, base, stacked, sources)
    return added(result, updated) if base is None else updated


@lru_cache(maxsize=256)
def _beside(run: Program, count: int) -> Program:
    """The program of so many adapters of one network, block by block."""
    plan = run.plan
    sizes = {**plan.sizes, REPLICA: count}
    return program(with_replicas(plan.network), sizes, tokens=int(sizes[plan.activation]))
