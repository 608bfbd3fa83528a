"""A kernel written by hand against its line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tnpeft.networks import Network, network
from tnpeft.networks.sizes import Sizes, bind
from tnpeft.testing.cases import small_sizes
from tnpeft.testing.oracle import brute, tolerance
from tnpeft.testing.strategies import random_factors


def agrees(
    net: Network | str,
    function: Callable[[Mapping[str, Any]], Any],
    sizes: Sizes | None = None,
    /,
    *,
    seed: int = 0,
    **keywords: Any,
) -> float:
    """Return the largest relative error of ``function`` against the dense update of a line, at random factors.

    The function takes the factors by label, float64 arrays shaped as in the line, and returns the update: an axis for
    each stack index, one for the rows and one for the columns. Sizes that are not given are chosen small.

    Raises:
        AssertionError: the shape differs, or the error is larger than rounding allows in any order of contraction.
        NetworkError: the line is not a network, or a size is unknown or unfit.

    >>> agrees("B[out r] A[r inp] -> out inp", lambda f: f["B"] @ f["A"]) < 1e-14
    True
    """
    net = network(net) if isinstance(net, str) else net
    whole = small_sizes(net, bind(net, sizes, keywords))
    factors = random_factors(net, whole, seed)
    found, expected = np.asarray(function(factors)), brute(net, factors)
    if found.shape != expected.shape:
        raise AssertionError(f"{net}\n  the function returns the shape {found.shape}, the line {expected.shape}")
    scale = np.maximum(brute(net, factors, absolute=True), np.finfo(np.float64).tiny)
    error, allowed = float((np.abs(found - expected) / scale).max()), tolerance(net, whole)
    if not error <= allowed:
        at = ", ".join(f"{index}={size}" for index, size in whole.items())
        raise AssertionError(f"{net}\n  largest relative error {error:.1e}, rounding allows {allowed:.1e}, at {at}")
    return error
