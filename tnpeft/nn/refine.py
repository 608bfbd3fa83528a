"""Nonlinear least squares over all factors at once: Levenberg-Marquardt where its matrix fits, else LBFGS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_JACOBIAN_LIMIT = 2**24  # elements of the matrix of derivatives
_UNKNOWNS_LIMIT = 2_000
_STEPS = 300


def polish(residual: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, stalled: float) -> Tensor:
    """A vector near ``start`` with a smaller norm of ``residual``, never a larger one.

    Stops at a norm of ``tolerance``, or when ten steps lower the squared norm by less than the share ``stalled``.

    >>> found = polish(lambda x: x**2 - torch.tensor([4.0, 9.0]), torch.ones(2).double(), 1e-12, 0.02)
    >>> [round(x, 9) for x in found.tolist()]
    [2.0, 3.0]
    """
    equations = residual(start).numel()
    small = start.numel() <= _UNKNOWNS_LIMIT and start.numel() * equations <= _JACOBIAN_LIMIT
    found = _marquardt(residual, start, tolerance, stalled) if small else _lbfgs(residual, start, tolerance)
    return found if residual(found).norm() < residual(start).norm() else start


def _marquardt(residual: Callable[[Tensor], Tensor], x: Tensor, tolerance: float, stalled: float) -> Tensor:
    wide = residual(x).numel() < x.numel()
    jacobian = torch.func.jacrev(residual) if wide else torch.func.jacfwd(residual)
    now = residual(x)
    history, damping = [float(now.square().sum())], 1e-2
    for _ in range(_STEPS):
        slopes = jacobian(x)
        normal, gradient = slopes.T @ slopes, slopes.T @ now
        scale = normal.diagonal().mean() * torch.eye(len(x), dtype=x.dtype)
        for _ in range(12):
            step, info = torch.linalg.solve_ex(normal + damping * scale, gradient)
            after = residual(x - step)
            if not info and after.square().sum() < history[-1]:
                break
            damping *= 4
        else:
            break
        x, now, damping = x - step, after, max(damping / 3, 1e-15)
        history.append(float(now.square().sum()))
        slow = len(history) > 10 and history[-1] > history[-11] * (1 - stalled)
        if slow or history[-1] <= tolerance**2:
            break
    return x


def _lbfgs(residual: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> Tensor:
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=200, tolerance_grad=0.0, tolerance_change=tolerance**2, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = residual(x).square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return x.detach()
