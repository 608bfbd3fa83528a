"""Columns of a network's matrix by number: what an embedding adds, from factors and never from the dense update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor, nn

from tnpeft.networks import Factor, Network, Term
from tnpeft.nn.dense import evaluator
from tnpeft.planning.planner import planned
from tnpeft.planning.steps import fresh

Lookup = Callable[[Tensor, Mapping[str, Tensor]], Tensor]  # numbers [...] and factors by label to rows [..., rows]
_Read = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def lookup(net: Network, sizes: Mapping[str, int], tokens: int) -> Lookup:
    """The columns of a network's matrix by number, as rows, planned for so many numbers.

    They are the network in which every factor has one axis of numbers in place of its column indices.
    """
    number = fresh("number", net.indices)
    reads: dict[str, _Read] = {}

    def read(factor: Factor) -> Factor:
        name = f"F{len(reads)}"
        cols, rest = ([i for i in factor.indices if (i in net.cols) is own] for own in (True, False))
        reads[name] = _table(net, sizes, factor, cols, rest) if cols else _whole(net.label(factor))
        return Factor(name, (*(number,) * bool(cols), *rest), factor.kind)

    terms = tuple(Term(tuple(map(read, term.factors)), term.sign) for term in net.terms)
    line = Network(terms, ((number,), net.rows))
    dims = tuple((index, tokens if index == number else sizes[index]) for index in line.indices)
    form = evaluator(planned(line, dims, None), number)
    rows = prod(sizes[index] for index in net.rows)

    def look(numbers: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        flat = numbers.reshape(-1)
        found: Tensor = form({name: its(flat, arrays) for name, its in reads.items()})
        return found.reshape(*numbers.shape, rows)

    return look


def _whole(label: str) -> _Read:
    return lambda flat, arrays: arrays[label]


def _table(net: Network, sizes: Mapping[str, int], factor: Factor, cols: list[str], rest: list[str]) -> _Read:
    """The rows of a factor at its own digits of the numbers."""
    label, order = net.label(factor), [factor.indices.index(index) for index in (*cols, *rest)]
    shape, length = [sizes[index] for index in rest], prod(sizes[index] for index in cols)
    step = {index: prod(sizes[i] for i in net.cols[k + 1 :]) for k, index in enumerate(net.cols)}
    digits = [] if cols == [*net.cols] else [(step[index], sizes[index]) for index in cols]

    def read(flat: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        place = torch.zeros_like(flat) if digits else flat
        for worth, size in digits:
            place = place * size + flat // worth % size
        table = arrays[label].permute(order).reshape(length, -1)
        return nn.functional.embedding(place, table).reshape(len(flat), *shape)

    return read
