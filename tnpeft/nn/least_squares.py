"""The best value of one factor while the others stand still: a batched linear least-squares problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tnpeft.networks import Factor, Network, Term
from tnpeft.networks.factor import Group
from tnpeft.nn.dense import dense
from tnpeft.nn.executor.kernels import Sizes, singly, view
from tnpeft.planning.steps import fresh

DENSE_LIMIT = 2**24  # elements of the matrix that a direct solve may hold; above, conjugate gradients never form it
_ITERATIONS = 100


def term_network(term: Term, output: Group) -> Network:
    """A network of this term alone, positive, one output group per index of ``output`` that it carries.

    >>> from tnpeft.networks import network
    >>> net = network("B[out r] A[r inp] - w[out inp] -> out inp")
    >>> print(term_network(net.terms[1], net.outer))
    w[out inp] -> out inp
    """
    places = term.places()
    return Network((Term(term.factors),), tuple((index,) for index in output if index in places))


@dataclass(frozen=True)
class FactorLeastSquares:
    """One factor of one term against a target with the axes ``outer``.

    With the rest of the term contracted to its environment, each index of the factor is one of three: in the
    environment and in the output (``batch``: one problem per value), in the environment only (``inner``: the
    unknowns), or in the output only (``free``: the right-hand sides). ``kept`` are the equations.
    """

    term: Term
    factor: Factor
    outer: Group

    @property
    def rest(self) -> Term:
        """The term without the factor."""
        k = next(k for k, factor in enumerate(self.term.factors) if factor is self.factor)
        return Term(self.term.factors[:k] + self.term.factors[k + 1 :])

    def solve(self, arrays: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """The factor's best value, axes in its own order.

        Args:
            arrays: every factor of the term by name, the one to be solved for included.
            target: axes ``outer``; where the term lacks an index of it, the term is broadcast over it.
        """
        places, around = self.term.places(), self.rest.places()
        gone = [k for k, index in enumerate(self.outer) if index not in places]
        target = target.mean(gone) if gone else target
        axes = tuple(index for index in self.outer if index in places)
        own = self.factor.indices
        batch = tuple(index for index in own if index in around and index in axes)
        inner = tuple(index for index in own if index in around and index not in axes)
        free = tuple(index for index in own if index not in around)
        kept = tuple(index for index in axes if index not in own)
        dims = dict(zip(own, arrays[self.factor.name].shape, strict=True)) | dict(
            zip(axes, target.shape, strict=True)
        )
        rows, cols, several = (prod(dims[i] for i in group) for group in (kept, inner, batch))
        wanted = _matrices(target, axes, batch, kept, free)
        if not self.rest.factors:
            solution = wanted
        elif several * rows * cols <= DENSE_LIMIT:
            environment = term_network(self.rest, (*batch, *kept, *inner))
            matrix = dense(environment, _used(environment, arrays)).reshape(several, rows, cols)
            solution = torch.linalg.lstsq(matrix, wanted, driver="gelsd").solution
        else:
            return self._by_gradients(arrays, target)
        order = (*batch, *inner, *free)
        found = solution.reshape([dims[index] for index in order])
        return found.permute([order.index(index) for index in own]).contiguous()

    def _by_gradients(self, arrays: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Conjugate gradients on the least-squares problem, from the present value on, without its matrix."""
        forward = term_network(self.term, self.outer)
        name = fresh("residual", [factor.name for factor in self.term.factors])
        probe = Factor(name, tuple(group[0] for group in forward.output), "constant")
        backward = Network((Term((probe, *self.rest.factors)),), tuple((index,) for index in self.factor.indices))

        def apply(value: Tensor) -> Tensor:
            return dense(forward, {**_used(forward, arrays), self.factor.name: value})  # type: ignore[no-any-return]

        def adjoint(value: Tensor) -> Tensor:
            return dense(backward, {**_used(backward, arrays), probe.name: value})  # type: ignore[no-any-return]

        return conjugate_gradients(apply, adjoint, arrays[self.factor.name], target)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], start: Tensor, target: Tensor
) -> Tensor:
    """The least-squares solution of ``apply(x) = target`` near ``start``, by conjugate gradients (CGLS).

    >>> matrix = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    >>> target = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    >>> found = conjugate_gradients(lambda x: matrix @ x, lambda y: matrix.T @ y, torch.zeros(2).double(), target)
    >>> [round(x, 9) for x in found.tolist()]
    [1.0, 3.0]
    """
    x, residual = start.clone(), target - apply(start)
    direction = gradient = adjoint(residual)
    size = first = gradient.square().sum()
    for _ in range(min(_ITERATIONS, start.numel())):
        if size <= first * torch.finfo(start.dtype).eps ** 2:
            break
        image = apply(direction)
        step = size / image.square().sum()
        x = x + step * direction
        residual = residual - step * image
        gradient = adjoint(residual)
        size, before = gradient.square().sum(), size
        direction = gradient + (size / before) * direction
    return x


def _used(net: Network, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {factor.name: arrays[factor.name] for factor in net.factors if factor.name in arrays}


def _matrices(target: Tensor, axes: Group, batch: Group, rows: Group, cols: Group) -> Tensor:
    """The target as a stack of matrices."""
    seen, _ = view(singly(axes), singly((*batch, *rows, *cols)), Sizes(dict(zip(axes, target.shape, strict=True))))
    stacked = target if seen is None else seen(target)
    shape = stacked.shape
    middle = len(batch) + len(rows)
    return stacked.reshape(prod(shape[: len(batch)]), prod(shape[len(batch) : middle]), prod(shape[middle:]))  # type: ignore[no-any-return]
