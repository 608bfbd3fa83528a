"""The operations of a program: what each does to two operands, and what a gradient of its result does to each.

The gradients are written out, in the operations that the results themselves take, so that a program can be run
backward from what it keeps, and differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

View = Callable[[Tensor], Tensor]

_SKINNY = 64  # columns up to which a product is computed the other way round: up to five times as fast on a CPU


@dataclass(frozen=True)
class Side:
    """One operand as an operation sees it, and its gradient as it is stored; None: as they are.

    ``shape`` is there if the operand is seen in that shape with its elements in their own order.
    """

    view: View | None = None
    back: View | None = None
    shape: tuple[int, ...] | None = None

    def see(self, tensor: Tensor) -> Tensor:
        """The operand in the operation's shape."""
        return tensor if self.view is None else self.view(tensor)

    def give(self, grad: Tensor) -> Tensor:
        """A gradient in the operation's shape as one in the operand's."""
        return grad if self.back is None else self.back(grad)

    def scaled(self, weights: Tensor) -> Side:
        """The operand times something of the operation's shape."""
        return Side(lambda tensor: self.see(tensor) * weights, lambda grad: self.give(grad * weights))


class Operation(Protocol):
    """A function of two operands that is linear in each; ``reads`` says that a gradient needs the other operand."""

    @property
    def reads(self) -> bool: ...

    @property
    def right(self) -> Side: ...

    def __call__(self, a: Tensor, b: Tensor) -> Tensor: ...

    def add_to(self, total: Tensor, a: Tensor, b: Tensor, scale: float, fresh: bool) -> Tensor:
        """``total + scale * self(a, b)``, in place if the total is fresh: seen by nobody else."""

    def to_left(self, grad: Tensor, b: Tensor, total: Tensor | None = None, fresh: bool = False) -> Tensor:
        """The gradient of the left operand, added to the total if there is one."""

    def to_right(self, grad: Tensor, a: Tensor) -> Tensor:
        """The gradient of the right operand."""


def times(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, a narrow result with its narrow side as rows.

    >>> times(torch.ones(3, 2), torch.ones(2, 1)).stride()
    (1, 3)
    """
    return (b.mT @ a.mT).mT if b.shape[-1] <= _SKINNY else a @ b


def times_rows(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` as :func:`times` gives it.

    >>> times_rows(torch.ones(3, 2), torch.ones(1, 2)).stride()
    (1, 3)
    """
    return (b @ a.mT).mT if b.shape[-2] <= _SKINNY else a @ b.mT


def rows_times(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b`` as :func:`times` gives it.

    >>> rows_times(torch.ones(2, 3), torch.ones(2, 1)).stride()
    (1, 3)
    """
    return (b.mT @ a).mT if b.shape[-1] <= _SKINNY else a.mT @ b


def _accumulated(total: Tensor, a: Tensor, b: Tensor, scale: float, fresh: bool) -> Tensor:
    """``total + scale * a @ b``, in place if the total is fresh."""
    if a.dim() == 2:
        return (total.addmm_ if fresh else total.addmm)(a, b, alpha=scale)
    return (total.baddbmm_ if fresh else total.baddbmm)(a, b, alpha=scale)


def _plus(part: Tensor, total: Tensor | None, fresh: bool) -> Tensor:
    if total is None:
        return part
    return total.add_(part) if fresh else total + part


@dataclass(frozen=True)
class Product:
    """``a @ b.T`` of two matrices with the same columns, or of each two of two stacks of them.

    ``rows``: a narrow result has its narrow side as rows.

    >>> both = Product(Side(), Side())
    >>> both(torch.ones(3, 2), torch.ones(4, 2)).shape, both.to_right(torch.ones(3, 4), torch.ones(3, 2)).shape
    (torch.Size([3, 4]), torch.Size([4, 2]))
    """

    left: Side
    right: Side
    rows: bool = False
    reads = True

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.left.see(a), self.right.see(b)
        return times_rows(a, b) if self.rows or b.dim() > 2 else linear(a, b)

    def add_to(self, total: Tensor, a: Tensor, b: Tensor, scale: float, fresh: bool) -> Tensor:
        """``total + scale * self(a, b)``."""
        return _accumulated(total, self.left.see(a), self.right.see(b).mT, scale, fresh)

    def to_left(self, grad: Tensor, b: Tensor, total: Tensor | None = None, fresh: bool = False) -> Tensor:
        """The gradient of the left operand, added to the total if there is one."""
        b = self.right.see(b)
        if total is None or self.left.shape is None:
            return _plus(self.left.give(times(grad, b)), total, fresh)
        return _accumulated(total.reshape(self.left.shape), grad, b, 1.0, fresh).reshape(total.shape)

    def to_right(self, grad: Tensor, a: Tensor) -> Tensor:
        """The gradient of the right operand."""
        return self.right.give(rows_times(grad, self.left.see(a)))

    def scaled(self, columns: Tensor) -> Product:
        """The product with its result times ``columns [..., 1, width]``; only the right operand meets them.

        >>> Product(Side(), Side()).scaled(torch.tensor([[2.0]]))(torch.ones(1, 3), torch.ones(1, 3))
        tensor([[6.]])
        """
        return Product(self.left, self.right.scaled(columns.mT), self.rows)


@dataclass(frozen=True)
class Elementwise:
    """``a * b``, each with one axis per index of the result, of size one where it lacks the index.

    >>> both = Elementwise(Side(), Side(back=lambda grad: grad.sum(0)))
    >>> both.to_right(torch.ones(3, 2), torch.ones(3, 2))
    tensor([3., 3.])
    """

    left: Side
    right: Side
    reads = True

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left.see(a) * self.right.see(b)

    def add_to(self, total: Tensor, a: Tensor, b: Tensor, scale: float, fresh: bool) -> Tensor:
        """``total + scale * self(a, b)``."""
        add = total.addcmul_ if fresh else total.addcmul
        return add(self.left.see(a), self.right.see(b), value=scale)

    def to_left(self, grad: Tensor, b: Tensor, total: Tensor | None = None, fresh: bool = False) -> Tensor:
        """The gradient of the left operand, added to the total if there is one."""
        return _plus(self.left.give(grad * self.right.see(b)), total, fresh)

    def to_right(self, grad: Tensor, a: Tensor) -> Tensor:
        """The gradient of the right operand."""
        return self.right.give(grad * self.left.see(a))


@dataclass(frozen=True)
class General:
    """Any other product of two operands with one axis per index: a function for the result and each gradient."""

    left: Side
    right: Side
    result: Callable[[Tensor, Tensor], Tensor]
    from_right: Callable[[Tensor, Tensor], Tensor]
    from_left: Callable[[Tensor, Tensor], Tensor]
    reads = True

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.result(self.left.see(a), self.right.see(b))

    def add_to(self, total: Tensor, a: Tensor, b: Tensor, scale: float, fresh: bool) -> Tensor:
        """``total + scale * self(a, b)``: the product is added as the view that it is, never copied."""
        return (total.add_ if fresh else total.add)(self(a, b), alpha=scale)

    def to_left(self, grad: Tensor, b: Tensor, total: Tensor | None = None, fresh: bool = False) -> Tensor:
        """The gradient of the left operand, added to the total if there is one."""
        return _plus(self.left.give(self.from_right(grad, self.right.see(b))), total, fresh)

    def to_right(self, grad: Tensor, a: Tensor) -> Tensor:
        """The gradient of the right operand."""
        return self.right.give(self.from_left(grad, self.left.see(a)))


@dataclass(frozen=True)
class Sum:
    """``±a ± b``, each with one axis per index of the result; a second sign of zero leaves ``±a``.

    >>> Sum(Side(), Side(), -1, 1)(torch.ones(1), torch.ones(1)), Sum(Side(), Side(), -1, 0)(torch.ones(1), None)
    (tensor([0.]), tensor([-1.]))
    """

    left: Side
    right: Side
    first: int
    second: int
    reads = False

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        a = self.left.see(a) if self.first > 0 else -self.left.see(a)
        return torch.add(a, self.right.see(b), alpha=self.second) if self.second else a

    def add_to(self, total: Tensor, a: Tensor, b: Tensor, scale: float, fresh: bool) -> Tensor:
        """``total + scale * self(a, b)``."""
        return (total.add_ if fresh else total.add)(self(a, b), alpha=scale)

    def to_left(self, grad: Tensor, b: Tensor, total: Tensor | None = None, fresh: bool = False) -> Tensor:
        """The gradient of the left operand, added to the total if there is one."""
        return _plus(self.left.give(grad if self.first > 0 else -grad), total, fresh)

    def to_right(self, grad: Tensor, a: Tensor) -> Tensor:
        """The gradient of the right operand."""
        return self.right.give(grad * self.second)
