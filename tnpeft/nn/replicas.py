"""The program of one site of many adapters side by side: the same plan, every product a batch over ``replica``.

The rows of the activations are equal contiguous blocks, one for each replica: ``[rows, inp]`` is viewed as
``[replica, rows of one, inp]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from tnpeft.networks import REPLICA, Network, NetworkError
from tnpeft.networks.factor import Group
from tnpeft.networks.sizes import Size, bind, integers
from tnpeft.nn.blocks import Accumulate, Function, Lowered, Views, stages
from tnpeft.nn.contract import aligned, pairwise, permuted, run
from tnpeft.nn.execute import Program
from tnpeft.nn.operations import View
from tnpeft.nn.orders import walk, wanted
from tnpeft.nn.side_by_side import side_by_side
from tnpeft.planning.planner import planned
from tnpeft.planning.steps import Plan, Step, fresh


def replica_program(net: Network, sizes: Mapping[str, Size], *, tokens: int = 2048) -> ReplicaProgram:
    """The program of one site whose network has ``replica`` open, best at about ``tokens`` rows of each replica.

    Raises:
        NetworkError: another stack index is open, or a size is missing or no whole number.

    >>> from tnpeft.networks import network
    >>> net = network("B[replica out r] A[replica r inp] -> replica out inp")
    >>> run = replica_program(net, {"replica": 3, "out": 40, "r": 2, "inp": 50})
    >>> run.replicas, run.plan.macs == 3 * 2048 * 2 * (40 + 50)
    (3, True)
    """
    if net.stack != (REPLICA,):
        raise NetworkError(
            f"the stack indices {', '.join(net.stack) or 'none'} are open",
            line=str(net),
            remedy=f"select all but {REPLICA!r}",
        )
    return _program(net, tuple(integers(net, bind(net, sizes, {})).items()), tokens)


@lru_cache(maxsize=1024)
def _program(net: Network, dims: tuple[tuple[str, int], ...], tokens: int) -> ReplicaProgram:
    net.require_matrix()
    return ReplicaProgram(planned(net, dims, tokens), planned(net, dims, None))


class ReplicaProgram(Program):
    """A :class:`tnpeft.nn.execute.Program` on blocks of rows, block k through the factors of replica k.

    Factors carry ``replica`` as their first index, constants may lack it.

    >>> from tnpeft.networks import network
    >>> net = network("d[replica out] A[replica out inp] -> replica out inp")
    >>> run = replica_program(net, {"replica": 2, "out": 1, "inp": 3})
    >>> run(torch.ones(4, 3), [torch.ones(2, 1), torch.tensor([1.0, 10.0]).reshape(2, 1, 1).expand(2, 1, 3)]).T
    tensor([[ 3.,  3., 30., 30.]])
    """

    def __init__(self, plan: Plan, dense: Plan) -> None:
        net, sizes = plan.network, plan.sizes
        self.plan = plan
        self.replicas = int(sizes[REPLICA])
        self.labels = tuple(net.label(factor) for factor in net.factors)
        self.rows = prod(sizes[index] for index in net.rows)
        self.cols = prod(sizes[index] for index in net.cols)
        self._split = self.replicas, -1, *(int(sizes[index]) for index in net.cols)
        self._dense = dense
        self._stages = stages(_Lowering(plan, self.labels).lower(), len(self.labels))
        self.direct = False  # two matrices for every replica are none for all rows
        self.joins = self._stages.pair is not None
        self.prepares = bool(self._stages.weights)
        self.again = ()

    def prepare(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The factors and all that is computed from them alone."""
        values = [*operands]
        for function, a, b in self._stages.weights:
            values.append(function(values[a], values[b]))
        return values

    def apply(self, x: Tensor, prepared: Sequence[Tensor], base: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """``base`` plus the scaled updates, as :meth:`Program.apply`; ``x [rows, ..., inp]`` in equal blocks."""
        self._check(x)
        shape = *x.shape[:-1], self.rows
        values = [*prepared, x.reshape(self._split)]
        for function, a, b in self._stages.through:
            values.append(function(values[a], values[b]))
        total = None if base is None else base.reshape(self.replicas, -1, self.rows)
        for accumulate, a, b, sign in self._stages.tail:
            total = accumulate(total, values[a], values[b], sign * scale)
        assert total is not None  # a network has at least one term
        return total.reshape(shape)

    def with_linear(
        self, x: Tensor, operands: Sequence[Tensor], weight: Tensor, bias: Tensor | None, scale: float = 1.0
    ) -> Tensor:
        """The linear and the update as one operation, of a program that ``joins``."""
        self._check(x)
        pair = self._stages.pair
        assert pair is not None  # the caller has asked
        first, last = pair.matrices(self.prepare(operands))
        return side_by_side(x, weight, bias, first, last, pair.sign * scale)

    def delta(self, operands: Sequence[Tensor], scale: float = 1.0) -> Tensor:
        """``scale * dW`` of every replica, ``[replica, rows, cols]``."""
        stack: Tensor = run(self._dense, dict(zip(self.labels, operands, strict=True)))
        return stack.expand(self.replicas, *stack.shape[1:]).reshape(self.replicas, self.rows, self.cols) * scale

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[0] % self.replicas:
            raise NetworkError(
                f"{x.shape[0] if x.dim() > 1 else 1} rows are no {self.replicas} equal blocks",
                remedy="let the batch be one block of equally many rows for each replica, in their order",
            )


# ---- the steps of a plan as batched operations


@dataclass(frozen=True)
class _Value:
    """Where a tensor is, and its indices in order."""

    place: int
    order: Group


class _Lowering:
    """As :class:`tnpeft.nn.lower._Lowering`, with one axis per index throughout."""

    def __init__(self, plan: Plan, labels: tuple[str, ...]) -> None:
        net = plan.network
        self.token, self.x = plan.activation, len(labels)
        self.sizes: dict[str, int] = {**plan.sizes, self.token: -1}  # the number of rows is whatever comes
        self.steps = [step for step in plan.steps if step.kind != "reshape"]
        self.values = {name: _Value(k, net.factor(name).indices) for k, name in enumerate(labels)}
        self.values[fresh("x", labels)] = _Value(self.x, (REPLICA, self.token, *net.cols))
        self.wanted = wanted(self.steps, {name: value.order for name, value in self.values.items()})
        self.body: list[tuple[Function, int, int]] = []
        self.tail: list[tuple[Accumulate, int, int, int]] = []
        self.views: dict[int, Views] = {}

    def lower(self) -> Lowered:
        """The operations of the plan; the activations come as ``[replica, rows, *cols]``."""
        walk(self.steps, self._contract, self._add, self._accumulate)
        return Lowered(tuple(self.body), tuple(self.tail), self.views)

    def _operand(self, step: Step, k: int) -> _Value:
        """An operand; a factor takes the names that its indices have in this use."""
        value = self.values[step.operands[k]]
        return _Value(value.place, step.uses[k]) if value.place <= self.x else value

    def _append(self, step: Step, function: Function, left: _Value, right: _Value) -> None:
        self.body.append((function, left.place, right.place))
        self.values[step.result] = _Value(self.x + len(self.body), self.wanted[step.result])

    def _contract(self, step: Step) -> None:
        left, right, order = self._operand(step, 0), self._operand(step, 1), self.wanted[step.result]
        self._append(step, pairwise(left.order, right.order, order), left, right)
        if left.place == self.x and _is_batched(left.order, right.order, order):
            self.views[self.values[step.result].place] = None, self._matrices(right.order, order, left.order)

    def _add(self, step: Step) -> None:
        """A chain of sums of weights; one part alone is added to nothing."""
        order = self.wanted[step.result]
        operands = [self._operand(step, k) for k in range(len(step.operands))]
        first, sign = operands[0], step.signs[0]
        for k, other in enumerate(operands[1:], start=1):
            self._append(step, _sum(first.order, other.order, order, sign, step.signs[k]), first, other)
            first, sign = self.values[step.result], 1
        if len(operands) == 1:
            self._append(step, _sum(first.order, first.order, order, sign, 0), first, first)

    def _accumulate(self, step: Step, output: Group, sign: int) -> None:
        """What adds the product of two operands to the output ``[replica, rows, out]``."""
        left, right = self._operand(step, 0), self._operand(step, 1)
        wide = prod(self.sizes[index] for index in output[2:])
        if _is_batched(left.order, right.order, output):
            of_left = self._matrices(left.order, output, right.order)
            of_right = self._matrices(right.order, output, left.order)
            own = tuple(index for index in output if index in right.order and index != REPLICA)
            narrow = prod(self.sizes[index] for index in own)
            if narrow == wide and not self.tail:
                self.views[-1] = (None if left.order[:2] == output[:2] else of_left), of_right
            function = _accumulate_batched(of_left, of_right, narrow, wide)
        else:
            shape = tuple(self.sizes[index] for index in output)
            function = _accumulate_any(pairwise(left.order, right.order, output), shape, wide)
        self.tail.append((function, left.place, right.place, sign))

    def _matrices(self, own: Group, result: Group, other: Group) -> View:
        """The view of an operand as ``[replica, kept, summed]``, the summed indices in the activations' order."""
        kept = tuple(index for index in result if index in own and index != REPLICA)
        active = own if self.token in own else other
        summed = tuple(index for index in active if index in own and index in other and index not in result)
        order = tuple(own.index(index) for index in (REPLICA, *kept, *summed))
        rows = -1 if self.token in kept else prod(self.sizes[index] for index in kept)
        shape = self.sizes[REPLICA], rows, prod(self.sizes[index] for index in summed)
        return lambda tensor: permuted(tensor, order).reshape(shape)


def _is_batched(left: Group, right: Group, result: Group) -> bool:
    """Whether the product is one of matrices for each replica, the left one's axes before the right one's."""
    batch = {index for index in result if index in left and index in right}
    own = tuple(index for index in result if index in left), tuple(index for index in result if index not in left)
    summed = any(index in right and index not in result for index in left)
    return batch == {REPLICA} and summed and own[0] + own[1] == result


def _sum(left: Group, right: Group, order: Group, first: int, second: int) -> Function:
    a, b = aligned(left, order), aligned(right, order)
    if not second:
        return lambda x, _: a(x) if first > 0 else -a(x)
    return lambda x, y: torch.add(a(x) if first > 0 else -a(x), b(y), alpha=second)


def _accumulate_batched(left: View, right: View, narrow: int, wide: int) -> Accumulate:
    def accumulate(total: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a, b = left(a), right(b)
        if total is None:
            return (a @ (b if scale == 1.0 else b * scale).mT).reshape(len(a), -1, wide)
        rows = total if narrow == wide else total.reshape(len(total), -1, narrow)
        return torch.baddbmm(rows, a, b.mT, alpha=scale).reshape(len(a), -1, wide)

    return accumulate


def _accumulate_any(function: Function, shape: tuple[int, ...], wide: int) -> Accumulate:
    def accumulate(total: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        part = function(a, b)
        if total is None:
            return (part if scale == 1.0 else part * scale).reshape(shape[0], -1, wide)
        return torch.add(total.reshape(shape), part, alpha=scale).reshape(shape[0], -1, wide)

    return accumulate
