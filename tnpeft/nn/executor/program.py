"""The program of a site: a plan compiled once, the ways to run it, and its autograd function.

The update is accumulated into the linear's own output and its input gradient into the linear's, so that no full-width
result is written twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from tnpeft.networks import REPLICA, Network, NetworkError
from tnpeft.networks.sizes import Size, bind, integers
from tnpeft.nn.executor.compile import compile_plan
from tnpeft.nn.executor.eligibility import autocast_active, can_absorb_update, can_use_custom_backward
from tnpeft.nn.executor.kernels import run
from tnpeft.nn.executor.listing import FACTORS, Listing, X, Y
from tnpeft.nn.executor.saving import pack, unpack
from tnpeft.nn.executor.shared_projection import split
from tnpeft.planning.planner import planned
from tnpeft.planning.steps import Plan


def program(
    net: Network, sizes: Mapping[str, Size], *, tokens: int = 2048, minimize: str = "time", training: bool = True
) -> Program:
    """Return the program of one site's network, best at about ``tokens`` rows of activations; cached by value.

    It runs on any number of rows. ``minimize`` and ``training`` are those of :func:`tnpeft.plan`. If ``replica`` is
    open, ``tokens`` are those of each replica.

    Raises:
        NetworkError: another stack index is still open, or a size is missing or not a positive integer.

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
    update, fused = (planned(net, dims, tokens, minimize, training, base) for base in (None, "fp32"))
    return Program(update, fused, planned(net, dims, None, minimize, training))


class SiteProgram:
    """The plan of one site's update, and the update as a matrix: the base of all programs.

    ``labels`` is the order in which the factors' tensors are passed, ``replicas`` the size of the open stack index.
    """

    def __init__(self, plan: Plan, dense: Plan) -> None:
        net, sizes = plan.network, plan.sizes
        self.plan = plan
        self.replicas = int(sizes[net.stack[0]]) if net.stack else 1
        self.labels = tuple(net.label(factor) for factor in net.factors)
        self.rows, self.cols = (prod(sizes[index] for index in side) for side in (net.rows, net.cols))
        self._dense = compile_plan(dense, self.labels)  # now: it may be read while a compiler traces

    def delta(self, operands: Sequence[Tensor], scale: float = 1.0) -> Tensor:
        """Return ``scale * dW``, ``[rows, cols]``; with an open stack index ``[replica or expert, rows, cols]``."""
        values = self._dense.registers(operands)
        run(self._dense.forward, values)
        matrix: Tensor = values[self._dense.output]
        stack = (self.replicas,) if self.plan.network.stack else ()
        matrix = matrix.expand(*stack, *matrix.shape[len(stack) :]).reshape(*stack, self.rows, self.cols)
        return matrix if scale == 1.0 else matrix * scale


class Program(SiteProgram):
    """One site's update of its output, compiled from a plan.

    ``plan`` is that of the update alone, ``fused_plan`` the one that has the base weight as an operand; it runs where
    the two are one operation and the weight can take the update, which half precision cannot. ``has_weight_steps``
    says that some steps need no activations, ``prefix`` is the first product if programs on one input can share it,
    and ``recomputed`` names the plan's steps that the backward pass of training computes again. A call is a pure
    function of factors, activations and base output.

    With ``replicas``, the activations are as many equal contiguous blocks of rows, and block k meets slice k of the
    factors that carry the index ``replica``.

    >>> import torch
    >>> from tnpeft.networks import network
    >>> run = program(network("B[out r] A[r inp] -> out inp"), {"out": 4, "r": 2, "inp": 3})
    >>> run(torch.ones(5, 3), [torch.ones(4, 2), torch.ones(2, 3)], base=torch.ones(5, 4), scale=0.5).unique()
    tensor([4.])
    """

    def __init__(self, plan: Plan, fused_plan: Plan, dense: Plan) -> None:
        super().__init__(plan, dense)
        self.fused_plan = fused_plan
        self.update = compile_plan(plan, self.labels)
        self.fused = compile_plan(plan, self.labels, linear=True)
        self.merged = compile_plan(fused_plan, self.labels, linear=True) if fused_plan.form == "merged" else None
        self.prefix = split(self.fused) if self.merged is None else None
        self.has_weight_steps = bool(self.update.weight_steps)
        for listing in filter(None, (self.update, self.fused, self.merged)):
            listing.generate()
        self.recomputed = self.update.recomputed()

    # ---- the update alone

    def __call__(
        self, x: Tensor, operands: Sequence[Tensor], base: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """Return ``base + scale * x @ dW.T``, out of place; ``x [..., inp]``, ``base [..., out]`` or None.

        An ``x`` narrower than the factors is kept as it is for the backward, and computed with in their dtype.
        """
        narrower = x.dtype != operands[0].dtype and not autocast_active(x.device.type)
        if not can_use_custom_backward(x):
            return self.apply(x.to(operands[0].dtype) if narrower else x, self.prepare(operands), base, scale)
        self._check_rows(x)
        result, _ = ProgramFunction.apply(self.update, scale, x, None, None, None, base, *operands)
        return result  # type: ignore[no-any-return]

    def prepare(self, operands: Sequence[Tensor]) -> list[Any]:
        """Return registers with the factors and all that is computed from them alone, for :meth:`apply`."""
        values = self.update.registers(operands)
        run(self.update.weight_steps, values)
        return values

    def apply(self, x: Tensor, prepared: Sequence[Any], base: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Return the result of a call from prepared registers, by operations that autograd sees."""
        values = [*prepared]
        self._check_rows(x)
        values[X], values[Y] = x.reshape(-1, self.cols), None if base is None else base.reshape(-1, self.rows)
        run(self.update.activation_steps, values, scale)
        return values[Y].reshape(*x.shape[:-1], self.rows)  # type: ignore[no-any-return]

    # ---- with the frozen linear

    def with_linear(
        self,
        x: Tensor,
        operands: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        scale: float = 1.0,
        narrow: Tensor | None = None,
    ) -> Tensor:
        """Return ``linear(x, weight, bias) + scale * x @ dW.T`` as one operation, unless :func:`why_not_fused`.

        ``narrow`` is the prefix's result on ``x [tokens, inp]`` if that is at hand.
        """
        if self.replicas > 1:
            self._check_rows(x)
        if narrow is not None:
            listing = self.prefix.rest  # type: ignore[union-attr]
        else:
            listing = self.merged if self.merged is not None and can_absorb_update(weight) else self.fused
        result, _ = ProgramFunction.apply(listing, scale, x, narrow, weight, bias, None, *operands)
        return result  # type: ignore[no-any-return]

    def _check_rows(self, x: Tensor) -> None:
        """Raise unless the rows of activations are equal blocks."""
        if self.replicas > 1 and (x.dim() < 2 or x.shape[0] % self.replicas):
            raise NetworkError(
                f"batch size {x.shape[0] if x.dim() > 1 else 1} is not divisible by {self.replicas} replicas",
                remedy="let the batch be one block of equally many rows for each replica, in their order",
            )


# ---- its autograd function


_PLAIN = nullcontext()


class ProgramFunction(torch.autograd.Function):
    """A program on ``x`` added to the linear, from its first product ``narrow`` on where that is given.

    Without a weight it is added to ``base``, out of place. The input and the output have any leading axes. The second
    output is the result that stands for the activations (``Code.root``) if one does, which second derivatives need.
    """

    @staticmethod
    def forward(ctx: Any, listing: Listing, scale: float, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        x, narrow, weight, bias, base, *factors = tensors  # the registers in their order
        needs = tuple([t is not None and t.requires_grad for t in (x, narrow, weight, bias, None, *factors)])
        if torch.compiler.is_compiling():
            code, saved, ctx.again = listing.traced_code(needs), factors, None
        else:
            code = listing.codes.get(needs) or listing.code(needs)
            saved, ctx.again = pack(factors) if [f for f in factors if not f.is_leaf] else (factors, None)
        ctx.code, ctx.scale, ctx.shape, kind = code, scale, x.shape, x.device.type
        ctx.shared = None if narrow is None else narrow.grad_fn
        ctx.autocast = (kind, torch.get_autocast_dtype(kind)) if weight is None and autocast_active(kind) else None
        values = [*tensors, *[None] * (code.size - len(tensors))]
        if x.dtype != factors[0].dtype and ctx.autocast is None:
            values[X] = x.to(factors[0].dtype)  # it is kept in its own, which may be narrower
        if x.dim() != 2:
            values[X] = values[X].reshape(-1, x.shape[-1])
            values[Y] = None if base is None else base.reshape(-1, base.shape[-1])
        run(code.forward, values, scale, inplace=ctx.autocast is None)
        ctx.save_for_backward(*saved, *[x if k == X else values[k] for k in code.saved])
        result: Tensor = values[Y] if x.dim() == 2 else values[Y].view(*x.shape[:-1], values[Y].shape[-1])
        if code.root < FACTORS:
            return result, None
        ctx.set_materialize_grads(False)
        ctx.output = result.shape
        return result, values[code.root]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, to_root: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        code, scale = ctx.code, ctx.scale
        saved = ctx.saved_tensors
        count = len(saved) - len(code.saved)
        twice = torch.is_grad_enabled()  # then what is computed here is differentiated in its turn
        values: list[Any] = [None] * code.total
        factors = saved[:count] if ctx.again is None else unpack(saved[:count], ctx.again)
        values[FACTORS : FACTORS + count] = factors
        for k, value in zip(code.saved, saved[count:], strict=True):
            if not twice or k in code.inputs:
                values[k] = value
        x, shape = values[X], ctx.shape
        if x is not None:
            x = values[X] = x if len(shape) == 2 else x.reshape(-1, shape[-1])
            if x.dtype != factors[0].dtype and ctx.autocast is None:
                values[X] = x.to(factors[0].dtype)
        if ctx.shared is not None:
            ctx.pending = None  # whoever shares the first product and has not come yet begins again
            ctx.shared.x = x if x is not None else ctx.shared.x
        if grad is None:
            grad = factors[0].new_zeros(ctx.output)
        if code.root >= FACTORS:
            values[code.size + code.root] = to_root
        values[code.size + Y] = grad if len(shape) == 2 else grad.reshape(-1, grad.shape[-1])
        with _PLAIN if ctx.autocast is None else torch.autocast(*ctx.autocast):
            run(code.values if twice else code.recomputed, values, scale)
            run(code.backward, values, scale, inplace=not twice and ctx.autocast is None)
        grads = values[code.size :]
        if grads[X] is not None and len(shape) != 2:
            grads[X] = grads[X].view(shape)
        grads[Y] = grad if ctx.needs_input_grad[2 + Y] else None  # the base output's is that of the result
        return None, None, *grads[: FACTORS + count]
