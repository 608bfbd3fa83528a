"""Named stacks: which value of a declared stack index the model uses, one for a call or one for each row of it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.networks import REPLICA, Factor, Network, NetworkError, Term

Selected = Mapping[str, Tensor]  # the values of stack indices, each without axes or with one value for each row
Axes = tuple[tuple[int, str], ...]  # where an array has axes of named stack indices

RESERVED = ("layer", "proj", "expert", REPLICA)  # stack indices that the model itself gives a value
_ROW = 2  # axes of an activation whose rows are those of the batch, or tokens of them


def select(model: nn.Module, /, **values: int | Tensor | Sequence[int] | None) -> None:
    """Choose the values of stack indices that configurations declare with ``stack={"scene": 24}``.

    They hold for all adapters of the model that declare the index, until others are chosen, in training and in
    inference; they are not saved. A checkpointed forward is recomputed with the values that it saw. What is merged
    and exported is the update of the chosen value.

    Args:
        model: a model with adapters of this package.
        values: by index, a whole number from 0 on, or a 1-D tensor of whole numbers with one value for each row of
            the batch; None for no value.

    Raises:
        NetworkError: no adapter declares the index, a value is not below its size, or a merged adapter has the index.

    >>> import peft, tnpeft
    >>> line = "B[scene out r] A[r inp] -> scene out inp"
    >>> config = tnpeft.TensorNetworkConfig(network=line, ranks={"r": 2}, stack={"scene": 3}, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> model(torch.ones(2, 4))
    Traceback (most recent call last):
    tnpeft.networks.errors.NetworkError: no value of the stack index 'scene' is chosen
    call tnpeft.select(model, scene=0): a number below 3, or a tensor with one for each row of the batch
    >>> tnpeft.select(model, scene=2)
    >>> tnpeft.select(model, scene=torch.tensor([0, 2]))
    >>> model(torch.ones(2, 4)).shape
    torch.Size([2, 8])
    """
    from tnpeft.adapters.layer.bank import find_bank

    bank = find_bank(model)
    sizes: dict[str, list[int]] = {}
    for config in () if bank is None else bank.configs.values():
        for index, size in (config.stack or {}).items():
            sizes.setdefault(index, []).append(size)
    if bank is None or not sizes:
        raise NetworkError(
            "no adapter of the model declares a stack index",
            remedy='pass stack={"scene": 24} to tnpeft.TensorNetworkConfig',
        )
    chosen = dict(bank.selected)
    for index, value in values.items():
        if index not in sizes:
            raise NetworkError(
                f"no adapter of the model declares the stack index {index!r}",
                remedy=f"the declared ones are {', '.join(sizes)}",
            )
        if any(index in (bank.configs[name].stack or {}) for name in bank.merged_adapters):
            raise NetworkError(
                f"an adapter with the stack index {index!r} is merged, at the value chosen then",
                remedy="call unmerge_adapter() first",
            )
        if value is None:
            chosen.pop(index, None)
        else:
            chosen[index] = _checked(index, value, min(sizes[index])).to(bank.device or "cpu")
    lengths = {index: len(value) for index, value in chosen.items() if value.dim()}
    if len({*lengths.values()}) > 1:
        raise NetworkError(
            f"different numbers of rows: {', '.join(f'{index} has {n}' for index, n in lengths.items())}",
            remedy="give each as many values as the batch has rows, or one value for all",
        )
    for update in updates(model):
        if update.site_layout.site.experts and any(index in lengths for index in update.stack):
            raise NetworkError(
                f"{update.site_layout.site.proj} takes one value of {', '.join(lengths)} for all rows: "
                "its rows are sorted by expert",
                remedy="choose one value, or leave the experts out of target_modules",
            )
    bank.selected = chosen
    for update in updates(model):  # programs are made here, so that compiled forwards only look them up
        rows = tuple(index for index in update.stack if index in lengths)
        if rows:
            update.by_rows(rows, lengths[rows[0]])


def updates(model: nn.Module) -> Iterator[Any]:
    """The updates of all adapters at all their sites."""
    for module in model.modules():
        for its in getattr(module, "updates", {}).values() if hasattr(module, "tnpeft_factors") else ():
            yield from its


def _checked(index: str, value: Any, size: int) -> Tensor:
    """The value of a stack index as whole numbers below its size: one, or one for each row."""
    given = value.tolist() if isinstance(value, Tensor) else value
    several = isinstance(given, list | tuple | range)
    items = [*given] if several else [given]
    try:
        numbers = [operator.index(item) for item in items if not isinstance(item, bool)]
    except TypeError:
        numbers = []
    outside = [number for number in numbers if not 0 <= number < size]
    if len(numbers) != len(items) or not items:
        problem = f"is {value!r}"
        if isinstance(value, Tensor):
            problem = (
                f"is a tensor of {value.dtype} with shape {tuple(value.shape)}" if items else "is an empty tensor"
            )
    elif outside:
        problem = f"is {outside[0]}, and the index has the values 0 to {size - 1}"
    else:
        return torch.tensor(numbers if several else numbers[0])
    raise NetworkError(
        f"the value of the stack index {index!r} {problem}",
        remedy=f"pass a number from 0 to {size - 1}, or a 1-D tensor of such numbers, one for each row",
    )


# ---- in a forward


def chosen_rows(stack: Sequence[str], sizes: Mapping[str, int], selected: Selected) -> tuple[tuple[str, ...], int]:
    """The stack indices that have a value for each row, and the number of rows; (), 0 if one value is for all."""
    for index in stack:
        if index not in selected:
            raise NetworkError(
                f"no value of the stack index {index!r} is chosen",
                remedy=f"call tnpeft.select(model, {index}=0): a number below {sizes[index]}, or a tensor with one "
                "for each row of the batch",
            )
    rows = tuple(index for index in stack if selected[index].dim())
    return rows, len(selected[rows[0]]) if rows else 0


def described(stack: Sequence[str], selected: Selected) -> str:
    """The chosen values in words."""
    words = []
    for index in stack:
        value = selected.get(index)
        if value is None or value.dim():
            words.append(f"{index} is {'not chosen' if value is None else 'chosen by row'}")
        else:
            words.append(f"{index} = {int(value)}")
    return ", ".join(words)


def check_rows(shape: Sequence[int], count: int) -> None:
    """Raise unless an activation has the rows of a batch, or tokens of it as rows."""
    if len(shape) < _ROW or (shape[0] % count if len(shape) == _ROW else shape[0] != count):
        raise NetworkError(
            f"{count} values are chosen for the rows of a batch, and a layer was given an input of shape "
            f"{tuple(shape)}",
            remedy="choose one value for each row that the model sees (generate makes several of each for beams), "
            "or one for all",
        )


def choose(array: Tensor, axes: Axes, selected: Selected) -> Tensor:
    """The array at the chosen values: without the axes, or with one axis of rows before all others."""
    if not axes:
        return array
    values = [selected[index].to(array.device) for _, index in axes]
    if not any(value.dim() for value in values):
        for (axis, _), value in sorted(zip(axes, values, strict=True), key=lambda item: -item[0][0]):
            array = array.index_select(axis, value.reshape(1)).squeeze(axis)
        return array
    places = [axis for axis, _ in axes]
    front = array.permute(*places, *(axis for axis in range(array.dim()) if axis not in places))
    count = next(len(value) for value in values if value.dim())
    return front[tuple(value.expand(count) for value in values)]


def rowwise(net: Network, stack: Collection[str], rows: Collection[str]) -> Network:
    """The network of one call: stack indices with one value for all are gone, the others are one, ``replica``."""

    def change(factor: Factor) -> Factor:
        many = (REPLICA,) if any(index in rows for index in factor.indices) else ()
        return Factor(factor.name, (*many, *(i for i in factor.indices if i not in stack)), factor.kind)

    terms = tuple(Term(tuple(map(change, term.factors)), term.sign) for term in net.terms)
    many = ((REPLICA,),) if rows else ()
    kept = (tuple(index for index in group if index not in stack) for group in net.output[:-2])
    return Network(terms, (*many, *(group for group in kept if group), *net.output[-2:]))


def one_value(
    net: Network, sizes: Mapping[str, int], fixed: Collection[str] = ()
) -> tuple[Network, Mapping[str, int], tuple[str, ...]]:
    """The network of one value of every named and every ``fixed`` stack index, its sizes, and these indices."""
    stack = tuple(index for index in net.stack if index not in RESERVED or index in fixed)
    if not stack:
        return net, sizes, ()
    net = rowwise(net, stack, ())
    return net, {index: size for index, size in sizes.items() if index in net.indices}, stack
