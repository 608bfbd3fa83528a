"""Factors whose network is nearest to a given dense tensor: alternating least squares, then all at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnpeft.networks import Factorization, Network, NetworkError
from tnpeft.networks.sizes import Sizes, bind, integers, joined, require_network
from tnpeft.nn.dense import dense
from tnpeft.nn.init.philox import normal
from tnpeft.nn.least_squares import FactorLeastSquares, term_network
from tnpeft.nn.refine import polish

_MOST = 2**32  # entries of a factor: 32 GiB
_SQUARABLE = 400  # binary exponent up to which the square of a norm is a float64


@dataclass(frozen=True)
class Fit:
    """Factors by label, of the target's kind and dtype, and how far their network is from it.

    ``error`` is the Frobenius norm of the difference relative to the target's; ``sweeps`` and ``restarts`` are what
    it took.
    """

    factors: Mapping[str, Any]
    error: float
    sweeps: int
    restarts: int

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.factors.items())
        return f"relative error {self.error:.3g} after {self.sweeps} sweeps and {self.restarts} starts: {shapes}"


def fit(
    net: Network | Factorization,
    target: Any,
    sizes: Sizes | None = None,
    /,
    *,
    fixed: Mapping[str, Any] | None = None,
    restarts: int = 8,
    sweeps: int = 100,
    tolerance: float = 1e-12,
    seed: int = 0,
    **more: int,
) -> Fit:
    """The factors whose network comes nearest to ``target``, so that ``dense(net, factors)`` is close to it.

    Each sweep solves for one factor after another, exactly (indices that a factor shares with the rest and that the
    output keeps are a batch of separate problems; a problem too large for its matrix is solved by conjugate
    gradients). Where that stalls above ``tolerance``, Levenberg-Marquardt, or LBFGS for large problems, goes on over
    all factors at once. The first start of a line that is CP, Tucker or a tensor train is TensorLy's decomposition
    (which is the answer for a matrix), all others are random. Starts are repeated until one reaches ``tolerance``,
    two agree, or ``restarts`` are used up; the best is polished and returned. All of it runs in float64, on the
    target scaled to entries near 1; the factors share its scale, and ``error`` is theirs before they are rounded to
    the target's dtype.

    Args:
        net: a network, or a factorization, whose ranks and splits fill the sizes (its scale is left out).
        target: numpy array or torch tensor ``[*stack, rows, cols]``, one axis per output group.
        sizes: sizes of bonds and of the indices inside groups; one index per group is deduced.
        fixed: values of frozen and constant factors, and of trainable ones that are to stay as they are.
        restarts: random starts at most.
        sweeps: of alternating least squares per start, at most.
        tolerance: the relative error that is good enough.
        seed: of the random starts.
        more: sizes as keywords.

    Raises:
        NetworkError: a size is missing or does not match the target, a frozen or constant factor has no value, or a
            trainable factor stands twice, so that no step is linear.

    >>> from tnpeft.networks import network
    >>> target = np.outer([1.0, 2.0], [3.0, 4.0]) + np.outer([1.0, -1.0], [1.0, 1.0])
    >>> fit(network("B[out r] A[r inp] -> out inp"), target, r=2).error < 1e-12
    True
    """
    line = net.network if isinstance(net, Factorization) else net
    require_network(line)
    target = target if isinstance(target, Tensor) else np.asarray(target)
    dims = _sizes(net, line, tuple(target.shape), sizes, more)
    for name, value in (("restarts", restarts), ("sweeps", sweeps)):
        if not isinstance(value, int):
            raise NetworkError(f"{name} is {value!r}", remedy="pass a whole number")
    if not isinstance(tolerance, int | float):
        raise NetworkError(f"tolerance is {tolerance!r}", remedy="pass a number, such as 1e-6")
    wanted, exponent = _scaled(_real(target))
    if not torch.isfinite(wanted).all() or not wanted.any():
        raise NetworkError("the target is zero or not finite", remedy="pass a tensor of finite numbers, not all zero")
    held = _fixed(line, dims, fixed or {})
    shares = _shares(line, held)
    if exponent and not shares:
        if abs(exponent) > _SQUARABLE:
            raise NetworkError(
                f"the target's entries are near 2**{exponent}, beyond what squares hold, and a term of fixed factors "
                "alone cannot be scaled with it",
                line=str(line),
                remedy="scale the target and the fixed factors yourself",
            )
        wanted, exponent = torch.ldexp(wanted, torch.tensor(exponent)), 0
    best = _Solver(line, dims, wanted, held).best(restarts, sweeps, tolerance, seed)
    for label, share in shares.items():
        best.factors[label].mul_(2.0 ** (exponent * share))  # type: ignore[attr-defined]
    if isinstance(target, Tensor):
        found: dict[str, Any] = {k: v.to(target.device, target.dtype) for k, v in best.factors.items()}
    else:
        found = {k: v.numpy().astype(np.result_type(target.dtype, np.float32)) for k, v in best.factors.items()}
    for label, value in found.items():
        if not bool(torch.isfinite(value).all() if isinstance(value, Tensor) else np.isfinite(value).all()):
            raise NetworkError(
                f"factor {label!r} has entries that {value.dtype} does not hold", remedy="pass the target in float64"
            )
    return Fit(found, best.error, best.sweeps, best.restarts)


class _Solver:
    """A fit in float64: the target over its single indices, the values that stay, and the factors to find."""

    def __init__(self, net: Network, dims: Mapping[str, int], target: Tensor, fixed: Mapping[str, Tensor]) -> None:
        self.net, self.dims, self.fixed = net, dims, fixed
        self.target = target.reshape([dims[index] for index in net.outer])
        self.norm = float(target.norm())
        self.free = [factor for factor in net.factors if net.label(factor) not in fixed]
        _refuse_tied(net, [net.label(factor) for factor in self.free])
        self.flat = Network(net.terms, tuple((index,) for index in net.outer))

    def best(self, restarts: int, sweeps: int, tolerance: float, seed: int) -> Fit:
        """The best of several starts."""
        found: list[Fit] = []
        given = [*self._decomposed()]
        starts = chain(given, (self._start(seed, attempt) for attempt in range(max(restarts, 1))))
        for attempt, start in enumerate(starts):
            arrays = {**self.fixed, **start}
            used = self._alternate(arrays, sweeps, tolerance)
            if self.error(arrays) > tolerance:
                self._polish(arrays, tolerance, stalled=0.02)
            error = self.error(arrays)
            agreed = any(abs(error - other.error) <= 1e-4 * error for other in found if other.error <= error)
            found.append(Fit(arrays, error, used, attempt + 1))
            known = given and len(self.net.outer) == 2  # a singular value decomposition: nothing is nearer
            if error <= tolerance or known or (agreed and error <= min(other.error for other in found) * (1 + 1e-4)):
                break
        best = dict(min(found, key=lambda fit: fit.error).factors)
        if self.error(best) > tolerance:
            self._polish(best, tolerance, stalled=1e-9)
        return Fit(best, self.error(best), sum(fit.sweeps for fit in found), len(found))

    def error(self, arrays: Mapping[str, Tensor]) -> float:
        """Relative distance to the target."""
        return float((dense(self.flat, arrays) - self.target).norm()) / self.norm

    def _start(self, seed: int, attempt: int) -> dict[str, Tensor]:
        shapes = {self.net.label(f): tuple(self.dims[index] for index in f.indices) for f in self.free}
        return {
            label: torch.from_numpy(normal(prod(shape), seed, attempt, label)).reshape(shape)
            for label, shape in shapes.items()
        }

    def _decomposed(self) -> Iterator[dict[str, Tensor]]:
        """The start that TensorLy finds for a line that is CP, Tucker or a tensor train, if nothing in it is held."""
        if not self.fixed:
            from tnpeft.nn.tensorly_formats import decomposed

            if found := decomposed(self.flat, self.dims, self.target.numpy()):
                yield {label: torch.from_numpy(value) for label, value in found.items()}

    def _alternate(self, arrays: dict[str, Tensor], sweeps: int, tolerance: float) -> int:
        """Solve for one factor after another, in place; the number of sweeps until it stalls."""
        before = float("inf")
        for sweep in range(1, sweeps + 1):
            for t, term in enumerate(self.net.terms):
                residual = self.target - self._others(t, arrays)
                for factor in term.factors:
                    if factor in self.free:
                        arrays[factor.name] = FactorLeastSquares(term, factor, self.net.outer).solve(
                            self._named(t, arrays), residual * term.sign
                        )
            error = self.error(arrays)
            if error <= tolerance or error > before * (1 - 1e-3):
                return sweep
            before = error
        return sweeps

    def _named(self, t: int, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arrays of one term by the names that its factors have there."""
        return {factor.name: arrays[self.net.label(factor)] for factor in self.net.terms[t].factors}

    def _others(self, t: int, arrays: Mapping[str, Tensor]) -> Tensor:
        """The sum of all terms but one, ready to broadcast against the target."""
        total = torch.zeros_like(self.target)
        for k, term in enumerate(self.net.terms):
            if k != t:
                places = term.places()
                shape = [self.dims[index] if index in places else 1 for index in self.net.outer]
                total = total + term.sign * dense(term_network(term, self.net.outer), self._named(k, arrays)).reshape(
                    shape
                )
        return total

    def _polish(self, arrays: dict[str, Tensor], tolerance: float, *, stalled: float) -> None:
        """Improve all free factors at once, in place."""
        labels = [self.net.label(factor) for factor in self.free]
        shapes = [arrays[label].shape for label in labels]

        def split(x: Tensor) -> dict[str, Tensor]:
            parts = torch.split(x, [shape.numel() for shape in shapes])
            return {label: part.reshape(shape) for label, part, shape in zip(labels, parts, shapes, strict=True)}

        def residual(x: Tensor) -> Tensor:
            return (dense(self.flat, {**arrays, **split(x)}) - self.target).flatten() / self.norm  # type: ignore[no-any-return]

        start = torch.cat([arrays[label].flatten() for label in labels])
        arrays.update(split(polish(residual, start, tolerance, stalled)))


# ---- what comes in


def _real(target: Any) -> Tensor:
    """The target in float64 on the CPU; a complex one is refused."""
    kind = str(target.dtype)
    if "complex" in kind or (isinstance(target, np.ndarray) and target.dtype.kind not in "fiub"):
        raise NetworkError(
            f"the target holds {kind} numbers, and factors are real",
            remedy="pass real numbers; fit the real and the imaginary part of complex ones apart",
        )
    if isinstance(target, np.ndarray):
        with np.errstate(over="ignore"):
            target = target.astype(np.float64)
    return torch.as_tensor(target).detach().to("cpu", torch.float64)


def _scaled(target: Tensor) -> tuple[Tensor, int]:
    """The target with its largest entry between 1/2 and 1, and the power of two that was taken out of it."""
    largest = target.abs().max() if target.numel() else torch.zeros(())
    if not torch.isfinite(largest) or not largest:
        return target, 0
    exponent = int(torch.frexp(largest).exponent)
    half = exponent // 2  # in two steps: a power of two below 2**-1022 may lose digits
    return target * 2.0**-half * 2.0 ** (half - exponent), exponent


def _shares(net: Network, fixed: Mapping[str, Tensor]) -> dict[str, float]:
    """The power with which each free factor takes part in a scaling of the whole network; empty if there is none."""
    shares: dict[str, float] = {}
    for term in net.terms:
        free = [label for factor in term.factors if (label := net.label(factor)) not in fixed]
        if not free:
            return {}
        shares |= dict.fromkeys(free, 1 / len(free))
    return shares


def _refuse_tied(net: Network, free: list[str]) -> None:
    uses = Counter(map(net.label, net.uses()))
    for name in free:
        if uses[name] > 1:
            raise NetworkError(
                f"factor {name!r} stands {uses[name]} times, so that no step is a linear problem",
                line=str(net),
                remedy=f"give its uses names of their own, or hold it with fixed={{{name!r}: ...}}",
            )


def _sizes(
    net: Network | Factorization, line: Network, shape: tuple[int, ...], sizes: Sizes | None, more: Sizes
) -> dict[str, int]:
    if len(shape) != len(line.output):
        raise NetworkError(
            f"the target has {len(shape)} axes, the output {len(line.output)} groups",
            line=str(line),
            remedy="pass one axis per output group: the stack indices, rows, columns",
        )
    if isinstance(net, Factorization):
        groups = {group[0]: size for group, size in zip(line.output[:-2], shape, strict=False) if len(group) == 1}
        given = net.bind(joined({**groups, "out": shape[-2], "inp": shape[-1]}, joined(sizes, {})), more)
    else:
        given = bind(line, sizes, more)
    for group, size in zip(line.output, shape, strict=True):
        missing = [index for index in group if index not in given]
        known = prod(given[index] for index in group if index not in missing)
        if len(missing) == 1 and size % known == 0:
            given[missing[0]] = size // known
        elif len(missing) == 1 or (not missing and known != size):
            raise NetworkError(
                f"({' '.join(group)}) has the size {known}, the target {size}",
                line=str(line),
                remedy="pass sizes whose product is the target's",
            )
    dims = integers(line, bind(line, given, {}))
    for factor in line.factors:
        if (count := prod(dims[index] for index in factor.indices)) > _MOST:
            raise NetworkError(
                f"factor {factor.name!r} has {count:,} entries", remedy=f"fit one of at most {_MOST:,}"
            )
    return dims


def _fixed(net: Network, dims: Mapping[str, int], given: Mapping[str, Any]) -> dict[str, Tensor]:
    labels = [net.label(factor) for factor in net.factors]
    for label in given:
        if label not in labels:
            net.factor(label)
    for factor in net.factors:
        label, shape = net.label(factor), tuple(dims[index] for index in factor.indices)
        if factor.kind != "trainable" and label not in given:
            raise NetworkError(
                f"the {factor.kind} factor {label!r} has no value",
                line=str(net),
                remedy=f"pass fixed={{{label!r}: an array of shape {shape}}}",
            )
        if label in given and tuple(given[label].shape) != shape:
            raise NetworkError(
                f"the value of {label!r} has the shape {tuple(given[label].shape)}, not {shape}",
                line=str(net),
                remedy="give it one axis per index, in the order of the line",
            )
    return {label: torch.as_tensor(value).detach().to("cpu", torch.float64) for label, value in given.items()}
