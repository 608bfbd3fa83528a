"""The operations of a program in motion: forward from factors and activations, backward from what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tnpeft.nn.operations import Operation, Product
from tnpeft.nn.stages import Stages


class Flow:
    """A program's operations on lists of values: the factors, what is computed from them, the activations, the rest.

    >>> import torch
    >>> from tnpeft import network
    >>> from tnpeft.nn.execute import program
    >>> flow = program(network("B[out r] A[r inp] -> out inp"), {"out": 4, "r": 2, "inp": 3}).flow
    >>> values = flow.values(flow.prepare([torch.ones(4, 2), torch.ones(2, 3)]), torch.ones(5, 3))
    >>> flow.add(None, values, 0.5).unique()
    tensor([3.])
    """

    def __init__(self, stages: Stages, rows: int, trainable: Sequence[bool]) -> None:
        self.frozen = [place for place, yes in enumerate(trainable) if not yes]
        self.stages, self.rows, self.factors = stages, rows, len(trainable)
        self._operations = {
            **dict(enumerate(stages.weights, start=self.factors)),
            **dict(enumerate(stages.through, start=stages.x + 1)),
        }
        used = {k for _, a, b in [*stages.weights, *stages.through, *stages.tail] for k in (a, b)}
        self.reads = frozenset(place for place in used if place < self.factors)
        self._back = [(place, *self._operations[place]) for place in sorted(self._operations, reverse=True)]
        self._below = self._inputs()
        self._again = [(place, *self._operations[place]) for place in stages.again]

    def _inputs(self) -> list[int]:
        """What each value is computed from, factors and activations, as bits."""
        below = [1 << k for k in range(self.factors)]
        for _, a, b in self.stages.weights:
            below.append(below[a] | below[b])
        below.append(1 << self.factors)
        for _, a, b in self.stages.through:
            below.append(below[a] | below[b])
        return below

    # ---- forward

    def prepare(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """The factors and all that is computed from them alone."""
        values = [*factors]
        for operation, a, b in self.stages.weights:
            values.append(operation(values[a], values[b]))
        return values

    def gates(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """The frozen factors through which the activations enter."""
        return [factors[place] for _, place in self.stages.entry]

    def enter(self, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """What stands for the activations ``[tokens, inp]``: their products with the gates, or they themselves."""
        for (operation, _), gate in zip(self.stages.entry, gates, strict=True):
            x = operation(x, gate)
        return x

    def values(self, prepared: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """All values, from the prepared ones and what stands for the activations."""
        values = [*prepared, x]
        for operation, a, b in self.stages.through:
            values.append(operation(values[a], values[b]))
        return values

    def add(
        self, total: Tensor | None, values: Sequence[Tensor], scale: float, new: bool = False, merged: bool = False
    ) -> Tensor:
        """``total`` plus the scaled update, ``[tokens, out]``; in place if the total is a new tensor.

        What is ``merged`` is in it already.
        """
        for k, (added, a, b) in enumerate(self.stages.tail):
            if not merged or k != self.stages.merges:
                total = added(total, values[a], values[b], scale, self.rows, new)
        assert total is not None  # a network has at least one term
        return total

    def matrix(self, values: Sequence[Tensor]) -> tuple[Tensor, int]:
        """The matrix ``[out, inp]`` that is added to the base weight, and its sign; of a program that merges."""
        assert self.stages.merges is not None  # the caller has asked
        added, _, b = self.stages.tail[self.stages.merges]
        return added.operation.right.see(values[b]), added.sign

    @property
    def paired(self) -> bool:
        """Whether the activations meet two matrices and nothing else, ``x @ first.T @ last.T``."""
        its = self.stages
        if its.entry or len(its.through) != 1 or len(its.tail) != 1:
            return False
        (into, x, first), (added, narrow, last) = its.through[0], its.tail[0]
        both = [operation for operation in (into, added.operation) if isinstance(operation, Product)]
        plain = len(both) == 2 and all(operation.left.view is None for operation in both)
        chained = x == its.x and narrow == x + 1 and first < x and last < x
        return plain and chained and added.shape[-1] == self.rows

    def pair(self, prepared: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
        """``first [narrow, inp]``, ``last [out, narrow]`` and the sign, of a program that is ``paired``."""
        ((into, _, first),), ((added, _, last),) = self.stages.through, self.stages.tail
        return into.right.see(prepared[first]), added.operation.right.see(prepared[last]), added.sign

    # ---- backward

    def kept(self, values: Sequence[Tensor]) -> list[Tensor]:
        """What the backward pass needs besides factors and activations."""
        return [values[place] for place in self.stages.keep]

    def restored(
        self, factors: Sequence[Tensor], x: Tensor, kept: Sequence[Tensor], everything: bool
    ) -> Sequence[Tensor | None]:
        """The values that the gradients read, from what was kept, None for the others; or ``everything`` anew."""
        if everything:
            return self.values(self.prepare(factors), x)
        values: list[Any] = [None] * (self.stages.x + 1 + len(self.stages.through))
        values[: self.factors] = factors
        values[self.stages.x] = x
        for place, value in zip(self.stages.keep, kept, strict=True):
            values[place] = value
        for place, operation, a, b in self._again:
            values[place] = operation(values[a], values[b])
        return values

    def gradients(
        self,
        grad: Tensor,
        values: Sequence[Tensor | None],
        scale: float,
        needs: Sequence[bool],
        to_x: Tensor | None,
        merged: bool,
        twice: bool,
    ) -> list[Tensor | None]:
        """The gradients of the factors, then of the activations, from the output's, ``[tokens, out]``.

        ``needs`` says which are wanted, in the same order. ``to_x`` is what the activations get from elsewhere, and
        ``merged`` that what merges is in it already; unless it is differentiated ``twice`` it is added to in place.
        """
        wanted = self._wanted(needs)
        grads: list[Tensor | None] = [None] * len(values)
        columns: dict[int, Tensor] = {}
        grads[self.stages.x] = to_x
        for k, (added, a, b) in enumerate(self.stages.tail):
            both = wanted[a] and not (merged and k == self.stages.merges), wanted[b]
            part = grad if added.shape == (-1, self.rows) else grad.reshape(added.shape)
            factor = added.sign * scale
            self._pull(grads, columns, added.operation, a, b, part, factor, values, both, not twice)
        for place, operation, a, b in self._back:
            part, grads[place] = grads[place], None
            if part is None:
                continue
            if place in columns and isinstance(operation, Product):
                operation = operation.scaled(columns[place])
            self._pull(grads, columns, operation, a, b, part, 1.0, values, (wanted[a], wanted[b]), not twice)
        return [*grads[: self.factors], grads[self.stages.x]]

    def leave(
        self,
        grad: Tensor,
        x: Tensor | None,
        gates: Sequence[Tensor],
        needs: Sequence[bool],
        to_x: Tensor | None,
        fresh: bool,
    ) -> list[Tensor | None]:
        """The gradients of the gates, then of the activations, from that of :meth:`enter`'s result.

        ``needs`` says which are wanted; ``x`` is there if a gate's is. ``to_x`` is what the activations get from
        elsewhere, added to in place if it is ``fresh``.
        """
        *on_gates, on_x = needs
        before: list[Any] = [x] * len(gates)
        if any(on_gates):
            for k, (operation, _) in enumerate(self.stages.entry[:-1]):
                before[k + 1] = operation(before[k], gates[k])
        found: list[Tensor | None] = [None] * len(gates)
        for k, (operation, _) in reversed([*enumerate(self.stages.entry)]):
            if on_gates[k]:
                found[k] = operation.to_right(grad, before[k])
            if k:
                grad = operation.to_left(grad, gates[k])
            elif on_x:
                to_x = operation.to_left(grad, gates[k], to_x, fresh)
        return [*found, to_x]

    def _pull(
        self,
        grads: list[Tensor | None],
        columns: dict[int, Tensor],
        operation: Operation,
        a: int,
        b: int,
        grad: Tensor,
        scale: float,
        values: Sequence[Any],
        wanted: tuple[bool, bool],
        fresh: bool,
    ) -> None:
        """As :func:`pull`; the gradient of a product that is folded is left as it is, beside the columns that
        multiply it, and what is fresh is the activations' gradient.
        """
        if wanted[0] and a in self.stages.folded:
            other = values[b] if scale == 1.0 else values[b] * scale
            grads[a], columns[a] = grad, operation.right.see(other)
            wanted = False, wanted[1]
        pull(grads, operation, a, b, grad, scale, values, wanted, fresh and a == self.stages.x)

    def _wanted(self, needs: Sequence[bool]) -> list[bool]:
        """Which values need a gradient so that the factors and activations get theirs."""
        given = sum(1 << k for k, on in enumerate(needs) if on)
        return [bool(below & given) for below in self._below]


def pull(
    grads: list[Tensor | None],
    operation: Operation,
    a: int,
    b: int,
    grad: Tensor,
    scale: float,
    values: Sequence[Any],
    wanted: tuple[bool, bool],
    fresh: bool = False,
) -> None:
    """Add an operation's gradients to those of its operands, at ``a`` and ``b``; its result was scaled.

    ``wanted`` says which are; the left one's is added to in place if it is ``fresh``.

    >>> import torch
    >>> from tnpeft.nn.operations import Elementwise, Side
    >>> grads = [None, None]
    >>> pull(grads, Elementwise(Side(), Side()), 0, 1, torch.ones(1), 2.0, torch.tensor([[3.0], [5.0]]), (True, True))
    >>> grads
    [tensor([10.]), tensor([6.])]
    """
    if wanted[0]:
        other = values[b] if scale == 1.0 else values[b] * scale
        grads[a] = operation.to_left(grad, other, grads[a], fresh)
    if wanted[1]:
        part, before = operation.to_right(grad, values[a]), grads[b]
        part = part if scale == 1.0 else part * scale
        grads[b] = part if before is None else before + part
