"""Kernels and the interpreter: a two-operand einsum, whose vector-Jacobian products are two-operand einsums again.

Tensors are stored with axes of one index or of several, fused row-major (a layout). Every choice of views, of the
order in which indices are fused and of the side that is narrow is made when a kernel is built, none when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product as choices
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tnpeft.networks.factor import Group

Array = Any  # a numpy array or a torch tensor
Layout = tuple[Group, ...]
View = Callable[[Array], Array]

NARROW = 64  # columns up to which a product is computed transposed: up to five times as fast on a CPU


def singly(order: Group) -> Layout:
    """Return the layout with one axis per index."""
    return tuple((index,) for index in order)


def flat(layout: Layout) -> Group:
    """Return the indices of a layout."""
    return tuple(index for axis in layout for index in axis)


@dataclass(frozen=True, eq=False)
class Sizes:
    """Sizes of indices; ``token`` counts the rows of activations, which may be any number at run time."""

    dims: dict[str, int]
    token: str = ""

    def shape(self, layout: Layout) -> tuple[int, ...]:
        """Return a shape for ``reshape``."""
        return tuple(-1 if self.token in axis else self.volume(axis) for axis in layout)

    def volume(self, indices: Iterable[str]) -> int:
        """Return the number of elements."""
        return prod(self.dims[index] for index in indices)

    def elements(self, layout: Layout) -> int:
        """Return the number of elements, of activations for each row."""
        return self.volume(index for index in flat(layout) if index != self.token)


# ---- views


def view(source: Layout, target: Layout, sizes: Sizes) -> tuple[View | None, bool]:
    """Return the function that shows a tensor stored as ``source`` in ``target``, and if that copies; None: identity.

    Indices that the tensor lacks get size one.
    """
    own = flat(source)
    wanted = tuple(tuple(index for index in axis if index in own) for axis in target)
    if wanted == source:
        return None, False
    order, shape = flat(wanted), sizes.shape(wanted)
    if order == own:
        return (lambda array: array.reshape(shape)), False
    if sorted(wanted) == sorted(source):
        axes = tuple(source.index(axis) for axis in wanted)
        return (lambda a: a.mT) if axes == (1, 0) else (lambda a: permuted(a, axes)), False
    split, _ = view(source, singly(own), sizes)
    moved = tuple(own.index(index) for index in order)
    copies = any(axis not in [own[k : k + len(axis)] for k in range(len(own))] for axis in wanted if axis)
    return (lambda array: permuted(see(split, array), moved).reshape(shape)), copies


def permuted(array: Array, axes: tuple[int, ...]) -> Array:
    """Return the array with its axes in another order, a view."""
    return array.transpose(axes) if isinstance(array, np.ndarray) else array.permute(axes)


def see(function: View | None, array: Array) -> Array:
    """Return a tensor as a view shows it."""
    return array if function is None else function(array)


# ---- kernels


class Kernel:
    """A function of one to three arrays that is linear in those it has vector-Jacobian products for.

    ``elements`` are those of its result, of activations for each row, ``macs`` the multiply-adds for each of them.
    """

    out: Layout
    elements: int
    macs = 1

    def __call__(self, alpha: float, *operands: Array) -> Array:
        raise NotImplementedError

    def accumulate(self, total: Array, alpha: float, inplace: bool, *operands: Array) -> Array:
        """Return ``total + alpha * self(...)``, in place if that is allowed."""
        part = self(1.0, *operands)
        if isinstance(part, np.ndarray):
            return total + alpha * part
        return (total.add_ if inplace else total.add)(part, alpha=alpha)

    def vjp(self, k: int) -> tuple[Kernel, tuple[int, ...]]:
        """Return the kernel of the gradient of operand ``k``, and the operands that it takes after the result's."""
        raise NotImplementedError


class Einsum2(Kernel):
    """``einsum("left,right->out")`` of two stored tensors, as (a stack of) matrix products or elementwise.

    ``product``: by a matrix product even where nothing is summed, or elementwise and then summed; None: a product if
    an index is summed. ``strided``: a narrow result may be stored with its narrow side as rows.
    """

    def __init__(
        self,
        left: Layout,
        right: Layout,
        out: Layout,
        sizes: Sizes,
        product: bool | None = None,
        strided: bool = False,
    ) -> None:
        self.left, self.right, self.out, self.sizes = left, right, out, sizes
        a, b, y = flat(left), flat(right), flat(out)
        self.summed = tuple(index for index in b if index in a and index not in y)
        self.elements, self.macs = sizes.elements(out), sizes.volume(self.summed)
        self.product = bool(self.summed) if product is None else product
        self._scale_right = sizes.volume(b) <= sizes.volume(y)
        self._swap, self._vjps = False, dict[int, Kernel]()  # made when asked for, for every selection of gradients
        if self.product:
            self._choose(a, b, y, strided)
        else:
            self._elementwise(a, y)

    def vjp(self, k: int) -> tuple[Kernel, tuple[int, ...]]:
        """The result's gradient takes the operand's place."""
        if k not in self._vjps:
            layouts = (self.out, self.right, self.left) if k == 0 else (self.out, self.left, self.right)
            self._vjps[k] = Einsum2(*layouts, self.sizes, self.product, strided=True)
        return self._vjps[k], (1 - k,)

    # ---- as matrix products

    def _choose(self, a: Group, b: Group, y: Group, strided: bool) -> None:
        """Choose the orders of the rows, columns and summed indices that copy least, and the side that is narrow."""
        batch = tuple(index for index in y if index in a and index in b)
        stack, best = singly(batch), None
        parts = ({*a} & {*y} - {*b}, a, y), ({*b} & {*y} - {*a}, b, y), ({*self.summed}, a, b)
        orders = (dict.fromkeys(tuple(i for i in its if i in part) for its in orders) for part, *orders in parts)
        for rows, cols, summed in choices(*orders):
            first, second = (*stack, rows, summed), (*stack, cols, summed)
            swap = bool(rows and cols) and y == (*batch, *cols, *rows)
            natural = (*stack, cols, rows) if swap else (*stack, rows, cols)
            views = [
                view(self.left, first, self.sizes),
                view(self.right, second, self.sizes),
                view(natural, self.out, self.sizes),
            ]
            cost = sum(self.sizes.volume(i) for (_, copies), i in zip(views, (a, b, y), strict=True) if copies)
            if best is None or cost < best[0]:
                best = cost, swap, natural, views
            if not cost:
                break  # none copies less
        assert best is not None  # there is an order
        _, self._swap, natural, ((self._left, _), (self._right, _), (self._give, _)) = best
        if self._swap:
            self._left, self._right = self._right, self._left
        rows, cols = natural[-2:]
        narrow = self.sizes.volume(cols) <= NARROW and self.sizes.token not in cols
        plain = rows == (self.sizes.token,) and len(cols) == 1  # more indices would be copied into order again
        self._transposed = narrow and (strided or bool(batch) or plain)
        self._add_to(natural)
        self._blas = self._part is None and len(batch) <= 1

    # ---- elementwise

    def _elementwise(self, a: Group, y: Group) -> None:
        order = a if self.summed else y
        self._left, self._right = (self._aligned(layout, order) for layout in (self.left, self.right))
        kept = tuple(index for index in order if index in y)
        self._axes = tuple(k for k, index in enumerate(order) if index not in y)
        self._give, _ = view(singly(kept), self.out, self.sizes)
        self._add_to(singly(kept))

    def _aligned(self, layout: Layout, order: Group) -> View | None:
        """One axis per index; a smaller factor is copied if its axes move, so that the result is stored in order."""
        own = flat(layout)
        if layout == singly(order[len(order) - len(own) :]):  # broadcast as it is
            return None
        seen, _ = view(layout, singly(order), self.sizes)
        moved = tuple(index for index in order if index in own) != own
        if seen is None or not moved or len(own) == len(order) or self.sizes.token in own or self.summed:
            return seen
        return lambda array: seen(array).contiguous() if hasattr(array, "contiguous") else seen(array)

    def _add_to(self, natural: Layout) -> None:
        """Note how a total and a result as it is computed are seen to be added without copying the total."""
        y = flat(self.out)
        common = natural if flat(natural) == y else singly(y)
        self._part, _ = view(natural, common, self.sizes)
        self._under = None if common == self.out else self.sizes.shape(common)
        self._whole = self.sizes.shape(self.out)

    # ---- running

    def __call__(self, alpha: float, a: Array, b: Array, stored: bool = True) -> Array:
        """Return ``alpha`` times the result, as ``out`` is stored, or as it is computed."""
        if alpha != 1.0 and self._scale_right:
            b = b * alpha
        if self._swap:
            a, b = b, a
        a = a if self._left is None else self._left(a)
        b = b if self._right is None else self._right(b)
        if self.product:
            result = (b @ a.mT).mT if self._transposed else a @ b.mT
        else:
            result = (a * b).sum(self._axes) if self._axes else a * b
        if stored and self._give is not None:
            result = self._give(result)
        return result if alpha == 1.0 or self._scale_right else result * alpha

    def accumulate(self, total: Array, alpha: float, inplace: bool, a: Array, b: Array) -> Array:
        """Return ``total + alpha * self(...)``: by a fused kernel where there is one, else added as a view."""
        under = total if self._under is None else total.reshape(self._under)
        if self.product and self._blas:
            if self._swap:
                a, b = b, a
            a = a if self._left is None else self._left(a)
            b = (b if self._right is None else self._right(b)).mT
            if a.dim() == 2:
                result = (under.addmm_ if inplace else under.addmm)(a, b, alpha=alpha)
            else:
                result = (under.baddbmm_ if inplace else under.baddbmm)(a, b, alpha=alpha)
        elif not self.product and not self._axes:
            a, b = see(self._left, a), see(self._right, b)
            result = (under.addcmul_ if inplace else under.addcmul)(a, b, value=alpha)
        else:
            part = see(self._part, self(1.0, a, b, stored=False))
            result = (under.add_ if inplace else under.add)(part, alpha=alpha)
        return result if self._under is None else result.reshape(self._whole)


class Linear(Einsum2):
    """The frozen linear, ``[tokens, out]`` from the activations, the weight ``[out, inp]`` and the bias or None."""

    def __init__(self, left: Layout, right: Layout, out: Layout, sizes: Sizes) -> None:
        from torch.nn.functional import linear  # numpy does without torch

        super().__init__(left, right, out, sizes, product=True)
        self._function = linear

    def __call__(self, alpha: float, a: Array, b: Array, bias: Array | None = None) -> Array:
        """Return ``a @ b.T + bias``; it is never scaled."""
        return self._function(a, b, bias)

    def vjp(self, k: int) -> tuple[Kernel, tuple[int, ...]]:
        """Return those of a product, and the sum over rows for the bias."""
        return super().vjp(k) if k < 2 else (Sum(self.out, self.out[1:], self.sizes), ())


class Sum(Kernel):
    """``einsum("operand->out")`` of one tensor, broadcast over the indices that it lacks."""

    def __init__(self, operand: Layout, out: Layout, sizes: Sizes) -> None:
        self.operand, self.out, self.sizes, self.elements = operand, out, sizes, sizes.elements(out)
        own, y = flat(operand), flat(out)
        kept = tuple(index for index in own if index in y)
        self._axes = tuple(k for k, index in enumerate(own) if index not in y)
        self._see = view(operand, singly(own), sizes)[0] if self._axes else None
        self._give, _ = view(singly(kept) if self._axes else operand, out, sizes)
        lacks = set(y) - set(own)
        self._full = sizes.shape(out) if lacks else None

    def __call__(self, alpha: float, a: Array) -> Array:
        """Return ``alpha`` times the result; the operand itself or a view of it where nothing is computed."""
        if self._axes:
            a = see(self._see, a).sum(self._axes)
        a = see(self._give, a)
        if self._full is not None:
            a = np.broadcast_to(a, self._full) if isinstance(a, np.ndarray) else a.expand(self._full)
        return a if alpha == 1.0 else -a if alpha == -1.0 else a * alpha

    def vjp(self, k: int) -> tuple[Kernel, tuple[int, ...]]:
        """The sum in the other direction."""
        return Sum(self.out, self.operand, self.sizes), ()


# ---- the interpreter


class Instruction(NamedTuple):
    """One step: a kernel, the registers of its operands and of its result, and its sign.

    ``scaled``: times the scale of the update. ``fresh``: a result that is there already was written by the
    program itself, so that it may be added to in place.
    """

    kernel: Kernel
    operands: tuple[int, ...]
    result: int
    sign: int = 1
    scaled: bool = False
    fresh: bool = False


def run(steps: Sequence[Instruction], registers: list[Array], scale: float = 1.0, inplace: bool = False) -> None:
    """Carry out the steps; a result that is there already is added to."""
    for kernel, operands, result, sign, scaled, fresh in steps:
        alpha = sign * scale if scaled else sign
        values = [registers[k] for k in operands]
        total = registers[result]
        if total is None:
            registers[result] = kernel(alpha, *values)
        else:
            registers[result] = kernel.accumulate(total, alpha, inplace and fresh, *values)
