"""Random numbers that are the same on every machine: raw Philox words and our own exact transforms of them.

A transform uses only operations that IEEE 754 rounds correctly (``+ - * /`` and the square root), each as an array
operation of its own and always in the same order, so that its result does not depend on the platform's mathematical
library, on its vector width or on fused multiply-adds.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LOG2 = math.log(2.0)
_ROOT_HALF = math.sqrt(0.5)
_SERIES = tuple(1.0 / (2 * k + 1) for k in range(13))  # artanh(t) / t in t * t; t * t < 0.03 leaves no error in fp64


def words(count: int, *key: str | int | None) -> NDArray[np.uint64]:
    """``count`` 64-bit words of the Philox stream that ``key`` names; a longer draw begins with a shorter one.

    >>> words(2, 0, "A"), bool((words(2, 0, "A") == words(9, 0, "A")[:2]).all())
    (array([ 4283649161833226679, 13767655076285094734], dtype=uint64), True)
    """
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return np.asarray(stream.random_raw(count), dtype=np.uint64)


def uniform(count: int, *key: str | int | None) -> Array:
    """``count`` numbers strictly between -1 and 1, symmetric about 0, each exact in fp64.

    >>> bool(abs(uniform(1000, 0, "A")).max() < 1)
    True
    """
    return _symmetric(words(count, *key))


def normal(count: int, *key: str | int | None) -> Array:
    """``count`` standard normal numbers by Marsaglia's polar method.

    >>> x = normal(10_000, 0, "A")
    >>> bool(abs(x.mean()) < 0.05), bool(abs(x.std() - 1) < 0.05)
    (True, True)
    """
    pairs = count // 2 + 16
    while True:
        pairs += pairs // 3
        u, v = _symmetric(words(2 * pairs, *key)).reshape(-1, 2).T
        radius = u * u + v * v
        inside = radius < 1.0
        if 2 * np.count_nonzero(inside) >= count:
            break
    kept = radius[inside]
    length = np.sqrt(-2.0 * _log(kept) / kept)
    return np.stack([u[inside] * length, v[inside] * length], axis=1).reshape(-1)[:count]


def orthonormal(matrix: Array) -> Array:
    """The matrix with its columns (its rows, where it is wide) made orthonormal by Gram and Schmidt, done twice.

    >>> q = orthonormal(normal(12, 0, "A").reshape(4, 3))
    >>> bool(np.allclose(q.T @ q, np.eye(3)))
    True
    """
    if matrix.shape[0] < matrix.shape[1]:
        return np.ascontiguousarray(orthonormal(matrix.T).T)
    columns = matrix.copy()
    for _ in range(2):
        for k in range(columns.shape[1]):
            column = columns[:, k]
            column /= np.sqrt(_sum(column * column))
            rest = columns[:, k + 1 :]
            rest -= column[:, None] * _sum(column[:, None] * rest)
    return columns


def _symmetric(raw: NDArray[np.uint64]) -> Array:
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-51 - 1.0


def _log(x: Array) -> Array:
    mantissa, exponent = np.frexp(x)
    small = mantissa < _ROOT_HALF
    mantissa = np.where(small, mantissa * 2.0, mantissa)
    t = (mantissa - 1.0) / (mantissa + 1.0)
    square = t * t
    series = np.full_like(t, _SERIES[-1])
    for coefficient in _SERIES[-2::-1]:
        series = series * square + coefficient
    return (exponent - small) * _LOG2 + 2.0 * t * series


def _sum(values: Array) -> Array:
    """The sum over the first axis by halving: one order of additions on every machine."""
    while len(values) > 1:
        half = (len(values) + 1) // 2
        upper = values[half:]
        values = values[:half].copy()
        values[: len(upper)] += upper
    return np.asarray(values[0])
