"""Rows of activations sorted by group, such as tokens by expert: the product of each group with its own matrix.

A plan over a stack index has equal blocks of rows in it. Here the blocks are as long as they are: the rows have one
axis, an array that carries the stack index gives each group its slice, and one that does not serves all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from tnpeft.nn.executor.kernels import Array, Einsum2, Kernel, Layout, Sizes


class Groups:
    """Which rows belong to which group: rows are sorted by ``ids``, the numbers of their groups below ``count``.

    >>> groups = Groups(torch.tensor([0, 0, 2]), 3)
    >>> groups.bounds, [*groups.used()]
    ([0, 2, 2, 3], [(0, 0, 2), (2, 2, 1)])
    """

    def __init__(self, ids: Tensor, count: int) -> None:
        self.ids, self.count = ids, count

    @cached_property
    def bounds(self) -> list[int]:
        """The first row of each group, and the number of rows."""
        return [0, *torch.bincount(self.ids, minlength=self.count).cumsum(0).tolist()]

    def used(self) -> Iterator[tuple[int, int, int]]:
        """Number, begin and length of every group that has rows."""
        return ((g, a, b - a) for g, (a, b) in enumerate(pairwise(self.bounds)) if b > a)

    def subset(self, rows: Tensor) -> Groups:
        """The groups of some of the rows, in their order."""
        return Groups(self.ids[rows], self.count)

    def gather(self, array: Tensor, axis: int = 0) -> Tensor:
        """The slice of each row's group, ``[rows, ...]``."""
        return array.movedim(axis, 0).index_select(0, self.ids)

    def matmul(self, x: Tensor, matrices: Tensor) -> Tensor:
        """The product of each row with its group's matrix: ``[rows, k]``, ``[groups, k, n]`` to ``[rows, n]``.

        A product for each group: on a CPU that is faster than torch's grouped product.

        >>> groups = Groups(torch.tensor([0, 1]), 2)
        >>> groups.matmul(torch.ones(2, 1), torch.tensor([[[2.0]], [[3.0]]])).flatten()
        tensor([2., 3.])
        """
        if not len(x) or (torch.is_grad_enabled() and (x.requires_grad or matrices.requires_grad)):
            parts = [x.narrow(0, k, n) @ matrices[g] for g, k, n in self.used()]
            return torch.cat(parts) if parts else x @ matrices[0]
        result = x.new_empty((len(x), matrices.shape[-1]))
        for g, k, n in self.used():
            torch.mm(x.narrow(0, k, n), matrices[g], out=result.narrow(0, k, n))
        return result


# ---- kernels; the groups are their last operand


class GroupedEinsum2(Kernel):
    """``einsum("left,right->out")`` of rows with their group's slice of ``right``, which has the axis ``group``."""

    def __init__(
        self, left: Layout, right: Layout, out: Layout, sizes: Sizes, group: str, strided: bool = False
    ) -> None:
        self.left, self.right, self.out, self.sizes, self.group = left, right, out, sizes, group
        self.axis, inner = apart(right, group)
        self.of, self.to = apart(left, sizes.token)[0], apart(out, sizes.token)[0]
        self.each = Einsum2(left, inner, out, sizes, strided=strided)
        self.elements, self.macs = self.each.elements, self.each.macs
        rows = ((sizes.token,), *inner)
        self.rows = None if self.each.product else Einsum2(left, rows, out, sizes, product=False)

    def __call__(self, alpha: float, a: Array, b: Array, groups: Groups) -> Array:
        """Return ``alpha`` times the result: a product for each group, elementwise with the rows' gathered slices."""
        if self.rows is not None:
            return self.rows(alpha, a, groups.gather(b, self.axis))
        slices = b.movedim(self.axis, 0)
        parts = [self.each(alpha, a.narrow(self.of, k, n), slices[g]) for g, k, n in groups.used()]
        return torch.cat(parts, self.to) if parts else self.each(alpha, a, slices[0])

    def accumulate(self, total: Array, alpha: float, inplace: bool, a: Array, b: Array, groups: Groups) -> Array:
        """Return ``total + alpha * self(...)``, group by group in place where that is allowed."""
        if self.rows is not None:
            return self.rows.accumulate(total, alpha, inplace, a, groups.gather(b, self.axis))
        if not inplace:
            return total.add(self(1.0, a, b, groups), alpha=alpha)
        slices = b.movedim(self.axis, 0)
        for g, k, n in groups.used():
            part = total.narrow(self.to, k, n)
            result = self.each.accumulate(part, alpha, True, a.narrow(self.of, k, n), slices[g])
            if result.data_ptr() != part.data_ptr():  # it took a copy to add to it
                part.copy_(result)
        return total

    def vjp(self, k: int) -> tuple[Kernel, tuple[int, ...]]:
        """The result's gradient takes the rows' place, or meets them in each group."""
        if k == 0:
            return GroupedEinsum2(self.out, self.right, self.left, self.sizes, self.group, strided=True), (1, 2)
        return GroupedReduce(self.out, self.left, self.right, self.sizes, self.group, self.each.product), (0, 2)


class GroupedReduce(Kernel):
    """``einsum("left,right->out")`` over the rows of each group, for an ``out`` with the axis ``group``."""

    def __init__(self, left: Layout, right: Layout, out: Layout, sizes: Sizes, group: str, product: bool) -> None:
        self.axis, inner = apart(out, group)
        self.one, self.two = apart(left, sizes.token)[0], apart(right, sizes.token)[0]
        self.shape = sizes.shape(inner)
        self.each = Einsum2(left, right, inner, sizes, product, strided=True)
        rows = ((sizes.token,), *inner)
        self.rows = None if product else Einsum2(left, right, rows, sizes, product=False)

    def __call__(self, alpha: float, a: Array, b: Array, groups: Groups) -> Array:
        """Return ``alpha`` times the result; zeros for groups without rows."""
        shape = (groups.count, *self.shape)
        if self.rows is not None:
            rows = self.rows(alpha, a, b)
            return rows.new_zeros(shape).index_add(0, groups.ids, rows).movedim(0, self.axis)
        parts = {g: self.each(alpha, a.narrow(self.one, k, n), b.narrow(self.two, k, n)) for g, k, n in groups.used()}
        if torch.is_grad_enabled():
            zero = a.new_zeros(self.shape)
            result = torch.stack([parts.get(g, zero) for g in range(groups.count)])
        else:
            result = a.new_zeros(shape) if len(parts) < groups.count else a.new_empty(shape)
            for g, part in parts.items():
                result[g] = part
        return result.movedim(0, self.axis)


def apart(layout: Layout, index: str) -> tuple[int, Layout]:
    """The axis of an index that stands alone, and the layout without it.

    >>> apart((("a",), ("expert",), ("b", "c")), "expert")
    (1, (('a',), ('b', 'c')))
    """
    axis = layout.index((index,))
    return axis, (*layout[:axis], *layout[axis + 1 :])
