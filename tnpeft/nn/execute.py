"""A plan as a program: a flat list of operations on two tensors, with nothing left to decide when it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod

from torch import Tensor

from tnpeft.networks import REPLICA, Network, NetworkError
from tnpeft.networks.sizes import Size, bind, integers
from tnpeft.nn.contract import run
from tnpeft.nn.first import First, first
from tnpeft.nn.flow import Flow
from tnpeft.nn.lower import lower
from tnpeft.nn.stages import stages
from tnpeft.nn.together import apart, may_reverse, takes, together
from tnpeft.nn.units import Norms
from tnpeft.planning.planner import planned
from tnpeft.planning.steps import Plan


def program(
    net: Network,
    sizes: Mapping[str, Size],
    *,
    tokens: int = 2048,
    minimize: str = "time",
    training: bool = True,
) -> Program:
    """The program of one site's network, best at about ``tokens`` rows of activations; kept by value.

    It runs on any number of rows. ``minimize`` and ``training`` are those of :func:`tnpeft.plan`. If ``replica`` is
    open, ``tokens`` are those of each replica.

    Raises:
        NetworkError: another stack index is still open, or a size is missing or no whole number.

    >>> from tnpeft.networks import network
    >>> run = program(network("B[out r] A[r inp] -> out inp"), {"out": 4, "r": 2, "inp": 3})
    >>> run.labels, len(run.plan.steps)
    (('B', 'A'), 2)
    """
    dims = integers(net, bind(net, sizes, {}))
    return _program(net, tuple(dims.items()), tokens, minimize, training)


@lru_cache(maxsize=1024)
def _program(net: Network, dims: tuple[tuple[str, int], ...], tokens: int, minimize: str, training: bool) -> Program:
    net.require_matrix()
    for index in net.stack:
        if index != REPLICA:
            raise NetworkError(
                f"the stack index {index!r} is still open",
                line=str(net),
                remedy=f"select one site first: net.select({index!r})",
            )
    alone, joined = (planned(net, dims, tokens, minimize, training, base) for base in (None, "fp32"))
    return Program(alone, planned(net, dims, None, minimize, training), joined)


class Program:
    """One site's update of its output, compiled from a plan.

    ``labels`` is the order in which the factors' tensors are passed; ``prepares`` says that something is computed
    from the factors alone, ``again`` names the steps that the backward pass takes again instead of keeping what they
    gave; a program is ``direct`` if all activations pass between two matrices (most families' do); ``first`` is its
    first step, if that can be taken elsewhere. A call is a pure function of factors, activations and base output: no
    state, so checkpointing, compiling and double differentiation work.

    The ``plan`` is that of the update alone, ``joined`` the one that has the base weight as an operand: it is run
    where the two are one operation and the weight can take the update, which half precision cannot.

    With ``replicas``, the activations are as many equal contiguous blocks of rows, and block k meets slice k of the
    factors that carry the index ``replica``.

    >>> import torch
    >>> from tnpeft.networks import network
    >>> run = program(network("B[out r] A[r inp] -> out inp"), {"out": 4, "r": 2, "inp": 3})
    >>> run(torch.ones(5, 3), [torch.ones(4, 2), torch.ones(2, 3)], base=torch.ones(5, 4), scale=0.5).unique()
    tensor([4.])
    >>> run = program(network("d[replica out] ^A[out inp] -> replica out inp"), {"replica": 2, "out": 1, "inp": 3})
    >>> run(torch.ones(4, 3), [torch.tensor([[1.0], [10.0]]), torch.ones(1, 3)]).T
    tensor([[ 3.,  3., 30., 30.]])
    """

    first: First | None = None

    def __init__(self, plan: Plan, dense: Plan, joined: Plan) -> None:
        net, sizes = plan.network, plan.sizes
        self.plan, self.joined = plan, joined
        self.replicas = int(sizes.get(REPLICA, 1)) if net.stack else 1
        self.labels = tuple(net.label(factor) for factor in net.factors)
        self.rows = prod(sizes[index] for index in net.rows)
        self.cols = prod(sizes[index] for index in net.cols)
        self._dense = dense
        trainable = [
            prod(sizes[index] for index in factor.indices) if factor.kind == "trainable" else 0
            for factor in net.factors
        ]
        lowered = lower(plan, self.labels)
        found = stages(lowered, trainable)
        self.flow = Flow(found, self.rows, [size > 0 for size in trainable])
        self.prepares = bool(found.weights)
        self.again = found.again_names
        self._merged: Flow | None = None
        if joined.form == "merged":
            merged = stages(lower(joined, self.labels), trainable)
            self._merged = Flow(merged, self.rows, [size > 0 for size in trainable])
        else:
            self.first = first(lowered, trainable, self.rows)
        self.direct = self.flow.paired

    def __call__(
        self, x: Tensor, operands: Sequence[Tensor], base: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """``base + scale * x @ dW.T``, out of place; ``x [..., inp]``, ``base [..., out]`` or None for zero."""
        if not self.again or not may_reverse(x):
            return self.apply(x, self.prepare(operands), base, scale)
        flat = None if base is None else base.reshape(-1, self.rows)
        result = apart(self.flow, scale, self._flat(x), flat, operands)
        return result.reshape(*x.shape[:-1], self.rows)

    def prepare(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The factors and all that is computed from them alone: what :meth:`apply` needs besides activations."""
        return self.flow.prepare(operands)

    def apply(self, x: Tensor, prepared: Sequence[Tensor], base: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """What a call gives, from the prepared factors; what autograd keeps then is up to it."""
        entered = self.flow.enter(self._flat(x), self.flow.gates(prepared))
        values = self.flow.values(prepared, entered)
        total = self.flow.add(None if base is None else base.reshape(-1, self.rows), values, scale)
        return total.reshape(*x.shape[:-1], self.rows)

    def with_linear(
        self,
        x: Tensor,
        operands: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        scale: float = 1.0,
        norms: Norms | None = None,
    ) -> Tensor:
        """``linear(x, weight, bias) + scale * x @ dW.T`` as one operation, if :func:`tnpeft.nn.together.may_join`.

        Along the axes in ``norms`` the operands are normalised first.
        """
        flow = self.flow if self._merged is None or not takes(weight) else self._merged
        result = together(flow, scale, self._flat(x), weight, bias, operands, norms)
        return result.reshape(*x.shape[:-1], self.rows)

    def matrices(self, prepared: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
        """``first [narrow, inp]``, ``last [out, narrow]`` and the sign, of a program that is ``direct``."""
        return self.flow.pair(prepared)

    def delta(self, operands: Sequence[Tensor], scale: float = 1.0) -> Tensor:
        """``scale * dW``, ``[rows, cols]``; with replicas ``[replica, rows, cols]``."""
        matrix: Tensor = run(self._dense, dict(zip(self.labels, operands, strict=True)))
        if self.plan.network.stack:
            matrix = matrix.expand(self.replicas, *matrix.shape[1:])
        matrix = matrix.reshape(*matrix.shape[: len(self.plan.network.stack)], self.rows, self.cols)
        return matrix if scale == 1.0 else matrix * scale

    def _flat(self, x: Tensor) -> Tensor:
        """The activations as rows."""
        if self.replicas > 1 and (x.dim() < 2 or x.shape[0] % self.replicas):
            raise NetworkError(
                f"{x.shape[0] if x.dim() > 1 else 1} rows are no {self.replicas} equal blocks",
                remedy="let the batch be one block of equally many rows for each replica, in their order",
            )
        return x.reshape(-1, self.cols)
