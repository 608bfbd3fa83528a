"""The dense tensor of a network from its factors, in numpy or torch, by the instructions of its best plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, reduce
from math import prod
from typing import Any

import numpy as np

from tnpeft.networks import Factorization, Network, NetworkError
from tnpeft.networks.sizes import Sizes, bind, require_network
from tnpeft.nn.executor.compile import compile_plan
from tnpeft.nn.executor.kernels import run
from tnpeft.nn.executor.listing import Listing
from tnpeft.planning.planner import planned
from tnpeft.planning.steps import Plan

Array = Any  # a numpy array or a torch tensor
LARGE = 8  # operands of a term beyond which opt_einsum orders at once what an exact search would take longer over


def dense(net: Network | Factorization, factors: Mapping[str, Array], *, sizes: Sizes | None = None) -> Array:
    """The dense tensor ``[*stack, rows, cols]``, one axis per output group, of the factors' own kind and dtype.

    ``factors`` maps each factor's name to its array (``"~G"`` is the frozen start value of a trainable ``G``);
    sizes are read off the arrays; opt_einsum orders the products of more than 8 factors. Torch tensors stay on their
    device and are differentiable, twice as well.

    Args:
        net: a network, or a factorization, of which the first line is taken.
        factors: numpy arrays or torch tensors, one per factor, axes in the order of the factor's indices.
        sizes: sizes that the arrays must have; what is not given is free.

    Raises:
        NetworkError: a factor is missing, unknown or of the wrong shape, or both kinds of array are mixed.

    >>> from tnpeft.networks import network
    >>> dense(network("B[out r] A[r inp] -> out inp"), {"B": np.ones((2, 3)), "A": np.ones((3, 1))})
    array([[3.],
           [3.]])
    """
    line = net.network if isinstance(net, Factorization) else net
    require_network(line)
    arrays = _checked(line, factors)
    dims = _measured(line, arrays, sizes)
    training = any(getattr(array, "requires_grad", False) for array in arrays.values())
    result = _run(_compiled(line, tuple(dims.items()), training), line, arrays)
    return result.reshape(tuple(prod(dims[index] for index in group) for group in line.output))


def evaluator(plan: Plan, token: str = "") -> Callable[[Mapping[str, Array]], Array]:
    """Return the function of the factors by label that a dense plan is, one axis per open index.

    The index ``token`` may have any size at run time.
    """
    net = plan.network
    listing = compile_plan(plan, [net.label(factor) for factor in net.factors], token=token)
    return lambda arrays: _run(listing, net, arrays)


def _run(listing: Listing, net: Network, arrays: Mapping[str, Array]) -> Array:
    values = listing.registers([arrays[net.label(factor)] for factor in net.factors])
    run(listing.forward, values)
    return values[listing.output]


@lru_cache(maxsize=512)
def _compiled(net: Network, dims: tuple[tuple[str, int], ...], training: bool) -> Listing:
    optimize = "auto" if max(len(term.factors) for term in net.terms) > LARGE else None
    plan = planned(net, dims, None, "time", training, None, optimize)
    return compile_plan(plan, [net.label(factor) for factor in net.factors])


# ---- what comes in


def _checked(net: Network, factors: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays by label, all numpy or all torch and then of one dtype."""
    labels = [net.label(factor) for factor in net.factors]
    if not isinstance(factors, Mapping):
        raise NetworkError(f"the factors are {str(factors)[:60]!r}", remedy="pass them by name, such as {'A': array}")
    for name in factors:
        if name not in labels:
            known = ", ".join(labels)
            raise NetworkError(f"the line has no factor {name!r}", line=str(net), remedy=f"the factors are {known}")
    for label in labels:
        if label not in factors:
            raise NetworkError(f"no array for the factor {label!r}", line=str(net), remedy=f"add {label!r}")
    tensors = [label for label in labels if hasattr(factors[label], "requires_grad")]
    if not tensors:
        return {label: np.asarray(factors[label]) for label in labels}
    for label in labels:
        if label not in tensors:
            raise NetworkError(
                f"{tensors[0]!r} is a torch tensor and {label!r} is not",
                line=str(net),
                remedy="pass torch tensors only, or numpy arrays only",
            )
    return _one_dtype({label: factors[label] for label in labels})


def _one_dtype(tensors: dict[str, Array]) -> dict[str, Array]:
    """Torch multiplies matrices of one dtype only, so all take the widest."""
    from torch import promote_types

    dtype = reduce(promote_types, (tensor.dtype for tensor in tensors.values()))
    return {label: tensor.to(dtype) for label, tensor in tensors.items()}


def _measured(net: Network, arrays: Mapping[str, Array], sizes: Sizes | None) -> dict[str, int]:
    """The size of every index, read off the arrays and checked to agree with each other and with ``sizes``."""
    dims = dict(bind(net, sizes, {}))
    for factor in net.uses():
        label, shape = net.label(factor), tuple(arrays[net.label(factor)].shape)
        needed = tuple(dims.get(index, "any") for index in factor.indices)
        fits = len(shape) == len(needed) and all(n in ("any", s) for n, s in zip(needed, shape, strict=True))
        if not fits or 0 in shape:
            raise NetworkError(
                f"the array for {label!r} {'has' if not fits else 'is empty: it has'} shape {shape}, "
                f"{factor} needs ({', '.join(map(str, needed))})",
                line=str(net),
                remedy=f"give {label!r} one axis per index, in their order, of the sizes that the other factors have",
            )
        dims |= zip(factor.indices, shape, strict=True)
    return {index: dims[index] for index in net.indices}
