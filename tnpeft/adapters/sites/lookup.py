"""Columns of a network's matrix by number: what an embedding adds, from factors and never from the dense update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.networks import Factor, Network, Term
from tnpeft.networks.factor import Group
from tnpeft.nn.dense import evaluator
from tnpeft.planning.planner import planned

_Side = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class _Table:
    """A factor that carries columns, as a table of them: ``order`` brings these first, ``rest`` are its other axes.

    ``digits`` says of each of its column indices what a step of it is worth and how many values it has.
    """

    label: str
    order: tuple[int, ...]
    cols: Group
    rest: Group
    shape: tuple[int, ...]
    length: int
    digits: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Looked:
    """One term: its tables, and the matrix ``[rows, between]`` of all other factors; None if a table carries rows."""

    sign: int
    tables: tuple[_Table, ...]
    between: Group
    others: tuple[Factor, ...]
    matrix: _Side | None
    spec: tuple[Any, ...]


class Lookup:
    """The columns of a network's matrix by number, as rows: ``[..., rows]`` for numbers ``[...]``.

    The factors that carry columns are tables, looked up by digits of the numbers and multiplied; the product meets
    the matrix of all other factors. Where a table carries row indices as well, all is one product for each number.
    """

    def __init__(self, net: Network, sizes: Mapping[str, int]) -> None:
        self.net, self.sizes = net, dict(sizes)
        self.rows = prod(sizes[index] for index in net.rows)
        self.terms = tuple(self._term(term) for term in net.terms)

    def _term(self, term: Term) -> _Looked:
        net, sizes = self.net, self.sizes
        carrying = [factor for factor in term.factors if {*factor.indices} & {*net.cols}]
        others = tuple(factor for factor in term.factors if factor not in carrying)
        tables = []
        for factor in carrying:
            cols = tuple(index for index in factor.indices if index in net.cols)
            rest = tuple(index for index in factor.indices if index not in net.cols)
            order = tuple(factor.indices.index(index) for index in (*cols, *rest))
            shape = tuple(sizes[index] for index in rest)
            length = prod(sizes[index] for index in cols)
            below = {index: prod(sizes[i] for i in net.cols[k + 1 :]) for k, index in enumerate(net.cols)}
            digits = () if cols == net.cols else tuple((below[index], sizes[index]) for index in cols)
            tables.append(_Table(net.label(factor), order, cols, rest, shape, length, digits))
        inner = {index for table in tables for index in table.rest}
        outer = {index for factor in others for index in factor.indices}
        between = tuple(index for index in net.indices if index in inner & outer)
        letters = {index: k + 1 for k, index in enumerate(net.indices)}
        axes = tuple([0, *(letters[index] for index in table.rest)] for table in tables)
        if others and not inner & {*net.rows}:
            line = Network((Term(others),), (net.rows, between))
            form = evaluator(planned(line, tuple((index, sizes[index]) for index in line.indices), None))
            labels = {line.label(factor): net.label(factor) for factor in others}
            shape = (self.rows, prod(sizes[index] for index in between))

            def matrix(arrays: Mapping[str, Tensor]) -> Tensor:
                found: Tensor = form({label: arrays[name] for label, name in labels.items()})
                return found.reshape(shape)

            spec = (axes, [0, *(letters[index] for index in between)])
            return _Looked(term.sign, tuple(tables), between, others, matrix, spec)
        axes += tuple([letters[index] for index in factor.indices] for factor in others)
        return _Looked(term.sign, tuple(tables), between, others, None, (axes, [0, *(letters[i] for i in net.rows)]))

    def __call__(self, numbers: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the columns of the given numbers, ``[..., rows]``."""
        flat = numbers.reshape(-1)
        total: Tensor | None = None
        for term in self.terms:
            found = self._looked(term, flat, arrays)
            found = found if term.sign > 0 else -found
            total = found if total is None else total + found
        assert total is not None  # a network has terms
        return total.reshape(*numbers.shape, self.rows)

    def _looked(self, term: _Looked, flat: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for table in term.tables:
            array = arrays[table.label].permute(table.order)
            rows = array.reshape(table.length, -1)
            found = nn.functional.embedding(_number(flat, table.digits), rows)
            parts.append(found.reshape(len(flat), *table.shape))
        axes, output = term.spec
        if term.matrix is None:
            parts += [arrays[self.net.label(factor)] for factor in term.others]
            return _einsum(parts, axes, output).reshape(len(flat), self.rows)
        matrix = term.matrix(arrays)
        return _einsum(parts, axes, output).reshape(len(flat), matrix.shape[-1]) @ matrix.mT


def _number(flat: Tensor, digits: tuple[tuple[int, int], ...]) -> Tensor:
    """The number of a row of a table that carries some digits of the columns, all of them in order for none."""
    if not digits:
        return flat
    number = torch.zeros_like(flat)
    for below, size in digits:
        number = number * size + flat // below % size
    return number


def _einsum(parts: list[Tensor], axes: Any, output: list[int]) -> Tensor:
    if len(parts) == 1 and axes[0] == output:
        return parts[0]
    operands = [part for pair in zip(parts, axes, strict=True) for part in pair]
    return torch.einsum(*operands, output)
