"""The program of a site: a plan compiled once, the ways to run it, and its autograd function.

The update is accumulated into the linear's own output and its input gradient into the linear's, so that no full-width
result is written twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from tnpeft.networks import REPLICA, Network, NetworkError
from tnpeft.networks.sizes import Size, bind, integers
from tnpeft.nn.executor.compile import compile_plan
from tnpeft.nn.executor.eligibility import autocast_active, can_absorb_update, can_use_custom_backward
from tnpeft.nn.executor.kernels import run
from tnpeft.nn.executor.listing import FACTORS, WIDE, Listing, X, Y
from tnpeft.nn.executor.saving import kept, restored
from tnpeft.nn.executor.shared_projection import Link, ProjectionGroup, split
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
def _program(
    net: Network,
    dims: tuple[tuple[str, int], ...],
    tokens: int,
    minimize: str,
    training: bool,
) -> Program:
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
    says that some steps need no activations, and ``prefix`` is the first product if it can be computed apart. A call
    is a pure function of factors, activations and base output.

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
        self.prefix = split(self.fused)
        update_prefix = split(self.update)
        self._update_prefix = update_prefix if update_prefix is not None and update_prefix.frozen else None
        self.has_weight_steps = bool(self.update.weight_steps)
        for listing in (self.update, self.fused, self.merged):
            if listing is not None:
                listing.generate()

    @cached_property
    def recomputed(self) -> tuple[str, ...]:
        """Names of the plan's steps that the backward pass of training computes again."""
        return (self.update if self._update_prefix is None else self._update_prefix.rest).recomputed()

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
        prefix = self._update_prefix
        if prefix is None or torch.compiler.is_compiling():
            return ProgramFunction.apply(self.update, scale, None, x, None, None, None, base, *operands)  # type: ignore[no-any-return]
        rows = x.reshape(-1, self.cols).to(operands[0].dtype if narrower else x.dtype)
        narrow, under = prefix.narrow(rows, operands), None if base is None else base.reshape(-1, self.rows)
        result: Tensor = ProgramFunction.apply(prefix.rest, scale, None, narrow, None, None, None, under, *operands)
        return result.reshape(*x.shape[:-1], self.rows)

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
        self, x: Tensor, operands: Sequence[Tensor], weight: Tensor, bias: Tensor | None, scale: float = 1.0
    ) -> Tensor:
        """Return ``linear(x, weight, bias) + scale * x @ dW.T`` as one operation, unless :func:`why_not_fused`."""
        prefix, listing = self.prefix, self.fused
        if self.replicas > 1:
            self._check_rows(x)
        if self.merged is not None and can_absorb_update(weight):
            listing = self.merged
        elif prefix is not None and prefix.frozen and not torch.compiler.is_compiling():
            # the gradient of x, which is wide, is added to in place
            rows, (narrow,), (link,) = ProjectionGroup([prefix])([operands], x.reshape(-1, self.cols))
            result = self.after_prefix(narrow, operands, rows, weight, bias, scale, link)
            return result.reshape(*x.shape[:-1], self.rows)
        return ProgramFunction.apply(listing, scale, None, x, None, weight, bias, None, *operands)  # type: ignore[no-any-return]

    def after_prefix(
        self,
        narrow: Tensor,
        operands: Sequence[Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        link: Link,
    ) -> Tensor:
        """Return what :meth:`with_linear` does, ``[tokens, out]``, from the prefix's result on ``[tokens, inp]``."""
        assert self.prefix is not None  # there is a result of it
        rest = self.prefix.rest
        return ProgramFunction.apply(rest, scale, link, narrow, x, weight, bias, None, *operands)  # type: ignore[no-any-return]

    @property
    def can_share(self) -> bool:
        """True if the first product can be shared with other programs on the same input."""
        return self.merged is None and self.prefix is not None and self.prefix.matrix is not None

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
    """A program on ``x``, or on the result of its prefix with the linear's input ``wide``, added to the linear.

    Without a weight it is added to ``base``, out of place. The linear's input and its output have any leading axes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        listing: Listing,
        scale: float,
        link: Link | None,
        x: Tensor,
        wide: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        needs = tuple([t is not None and t.requires_grad for t in (x, wide, weight, bias, None, *factors)])
        if torch.compiler.is_compiling():
            code, saved, ctx.again = listing.traced_code(needs), factors, None
        else:
            code = listing.codes.get(needs) or listing.code(needs)
            saved, ctx.again = (factors, None) if all(f.is_leaf for f in factors) else kept(factors)
        ctx.code, ctx.scale, ctx.link, kind = code, scale, link, x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind)) if weight is None and autocast_active(kind) else None
        own = factors[0].dtype  # the activations are kept in theirs, which may be narrower
        ctx.cast = None if x.dtype == own or ctx.autocast is not None else (x.dtype, own)
        seen = x if ctx.cast is None else x.to(own)
        shape = ctx.shape = x.shape if x.dim() != 2 and WIDE not in listing.layouts else None
        if shape is not None:
            seen, base = seen.reshape(-1, shape[-1]), None if base is None else base.reshape(-1, base.shape[-1])
        values = [seen, wide, weight, bias, base, *factors, *[None] * (code.size - FACTORS - len(factors))]
        run(code.forward, values, scale, inplace=ctx.autocast is None)
        brought = wide if link is not None and link.reads else None
        ctx.save_for_backward(*saved, *[x if k == X else values[k] for k in code.saved], brought)
        result: Tensor = values[Y]
        return result if shape is None else result.view(*shape[:-1], result.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        code, scale, link = ctx.code, ctx.scale, ctx.link
        *saved, brought = ctx.saved_tensors
        count = len(saved) - len(code.saved)
        twice = torch.is_grad_enabled()  # then what is computed here is differentiated in its turn
        values: list[Any] = [None] * code.total
        factors = saved[:count] if ctx.again is None else restored(saved[:count], ctx.again)
        values[FACTORS : FACTORS + count] = factors
        for k, value in zip(code.saved, saved[count:], strict=True):
            if not twice or k < FACTORS:
                values[k] = value
        x, shape, cast = values[X], ctx.shape, ctx.cast
        if x is not None and (shape is not None or cast is not None):
            x = x if shape is None else x.reshape(-1, shape[-1])
            values[X] = x if cast is None else x.to(cast[1])
        if twice and brought is not None:
            values[X] = link.prefix.narrow(brought, factors)
        values[code.size + Y] = grad if shape is None else grad.reshape(-1, grad.shape[-1])
        with _PLAIN if ctx.autocast is None else torch.autocast(*ctx.autocast):
            run(code.values if twice else code.recomputed, values, scale)
            run(code.backward, values, scale, inplace=not twice and ctx.autocast is None)
        if link is not None:
            link.keep_alive = None  # whoever has not come yet begins again
            if link.reads:
                link.inbox[:] = [brought]
        if not ctx.needs_input_grad[7]:  # the base output's gradient is that of the result
            grad = None  # type: ignore[assignment]
        grads = values[code.size :]
        if grads[X] is not None and cast is not None:
            grads[X] = grads[X].to(cast[0])
        if grads[X] is not None and shape is not None:
            grads[X] = grads[X].view(shape)
        return None, None, None, *grads[X:Y], grad, *grads[FACTORS : FACTORS + count]
