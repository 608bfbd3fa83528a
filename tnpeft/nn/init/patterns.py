"""Start values that need no random numbers: constants by position, and decompositions of the base weight."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np
import torch
from torch import Tensor

from tnpeft.layout import ParameterSpec, SiteLayout
from tnpeft.networks import NetworkError
from tnpeft.nn.init.philox import Array


def cosines(positions: int, frequencies: int) -> Array:
    """The orthonormal cosine basis (DCT-II), ``[positions, frequencies]``; above ``positions`` frequencies repeat.

    >>> cosines(4, 2).T.round(2).tolist()
    [[0.5, 0.5, 0.5, 0.5], [0.65, 0.27, -0.27, -0.65]]
    """
    frequency = np.arange(frequencies) % positions
    angles = (2 * np.arange(positions)[:, None] + 1) * frequency * (np.pi / (2 * positions))
    return np.asarray(np.cos(angles) * np.sqrt(np.where(frequency == 0, 1.0, 2.0) / positions))


def dct(param: ParameterSpec, site_layout: SiteLayout) -> Array:
    """A cosine basis: the axis that is a row or column index counts positions (the first, if that does not tell).

    Raises:
        NetworkError: the factor is not a matrix.

    >>> from tnpeft.networks import Factorization, Site
    >>> from tnpeft.layout import layout
    >>> f = Factorization.of("B[out r] ^A[r inp] -> out inp", ranks={"r": 2}, init={"A": "dct"})
    >>> place = layout(f, [Site(0, "q_proj", 4, 4)]).site_layouts[0]
    >>> bool((dct(place.parameters["A"], place) == cosines(4, 2).T).all())
    True
    """
    if len(param.shape) != 2:
        raise _unfit(param, "dct", "give it two axes, a position and a frequency")
    features = {*site_layout.network.rows, *site_layout.network.cols}
    turned = param.indices[0] not in features and param.indices[1] in features
    return cosines(*param.shape[::-1]).T if turned else cosines(*param.shape)


def circulant(param: ParameterSpec, site_layout: SiteLayout) -> Array:
    """1 where the bond equals (column - row) modulo its size, else 0: it turns a kernel into a circulant block.

    Raises:
        NetworkError: the axes are not one row index, one column index and one bond of equal size.

    >>> from tnpeft.networks import Factorization, Site
    >>> from tnpeft.layout import layout
    >>> f = Factorization.of("K[c] ^Circ[out inp c] -> out inp", ranks={"c": 3}, init={"Circ": "circulant"})
    >>> place = layout(f, [Site(0, "q_proj", 3, 3)]).site_layouts[0]
    >>> (circulant(place.parameters["Circ"], place) @ [1, 2, 3]).tolist()
    [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0]]
    """
    net = site_layout.network
    sides = ["row" if i in net.rows else "col" if i in net.cols else "bond" for i in param.indices]
    if sorted(sides) != ["bond", "col", "row"] or len(set(param.shape)) != 1:
        raise _unfit(param, "circulant", "give it a row index, a column index and a bond, all of one size")
    place = np.indices(param.shape)
    row, col, bond = (place[sides.index(side)] for side in ("row", "col", "bond"))
    return np.asarray(bond == (col - row) % param.shape[0], dtype=np.float64)


# ---- from the base weight, a [out, inp] matrix


def base(param: ParameterSpec, site_layout: SiteLayout, weight: Tensor) -> Tensor:
    """The base weight itself, its axes named and ordered as the factor's.

    Raises:
        NetworkError: the factor's axes are not exactly the row and column indices.

    >>> from tnpeft.networks import Factorization, Site
    >>> from tnpeft.layout import layout
    >>> f = Factorization.of("^W[inp out] d[out] -> out inp", init={"W": "base"})
    >>> place = layout(f, [Site(0, "q_proj", 2, 3)]).site_layouts[0]
    >>> base(place.parameters["W"], place, torch.arange(6.0).reshape(2, 3)).tolist()
    [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    net = site_layout.network
    outer = (*(("expert",) if site_layout.site.experts else ()), *net.rows, *net.cols)
    if sorted(param.indices) != sorted(outer):
        raise _unfit(param, "base", f"give it the indices {' '.join(outer)}")
    split = weight.reshape([site_layout.sizes[index] for index in outer])
    return split.permute([outer.index(index) for index in param.indices])


def svd(param: ParameterSpec, site_layout: SiteLayout, parts: Sequence[Tensor], power: float | None) -> Tensor:
    """The leading singular vectors of the base weight, times their singular values to a power.

    A factor that carries the row indices gets left vectors, one that carries the column indices right vectors.
    Without a ``power`` the left ones carry the singular values, so that the two multiply to the best
    approximation of their rank.

    Args:
        param: what to fill; its remaining axes count the singular values, largest first.
        site_layout: where it stands.
        parts: U, S and V^T of the base weight.
        power: of the singular values, None for 1 on the row side and 0 on the column side.

    Raises:
        NetworkError: the axes are not one whole side and a rank, or the rank exceeds the matrix's.

    >>> from tnpeft.networks import Factorization, Site
    >>> from tnpeft.layout import layout
    >>> f = Factorization.of("^U[out a] R[a b] ^V[b inp] -> out inp", ranks={"a": 1, "b": 1})
    >>> place = layout(f, [Site(0, "q_proj", 2, 2)]).site_layouts[0]
    >>> parts = signed_svd(torch.diag(torch.tensor([3.0, 2.0])))
    >>> [svd(place.parameters[name], place, parts, None).abs().tolist() for name in "UV"]
    [[[3.0], [0.0]], [[1.0, 0.0]]]
    """
    net = site_layout.network
    left = set(net.rows) <= set(param.indices)
    side = net.rows if left else net.cols
    other = set(net.cols if left else net.rows)
    rank_axes = tuple(index for index in param.indices if index not in side)
    if not set(side) <= set(param.indices) or other & set(param.indices):
        raise _unfit(param, "svd", f"give it {' '.join(net.rows)} or {' '.join(net.cols)}, and a rank")
    u, s, vt = parts
    rank = prod(site_layout.sizes[index] for index in rank_axes)
    if rank > len(s):
        raise _unfit(param, "svd", f"a rank of at most {len(s)} fits")
    exponent = power if power is not None else float(left)
    vectors = (u[:, :rank] if left else vt[:rank].T) * s[:rank] ** exponent
    axes = (*side, *rank_axes)
    return vectors.reshape([site_layout.sizes[i] for i in axes]).permute([axes.index(i) for i in param.indices])


def tt_svd(labels: Sequence[str], site_layout: SiteLayout, weight: Tensor) -> dict[str, Tensor]:
    """The cores of the tensor train nearest to the base weight (one sweep of SVDs), by label.

    The cores are the factors ``labels`` in order: neighbours share bonds, and each row and column index stands in
    exactly one. Every core but the last is an isometry; a bond above what its cut carries is filled with zeros.

    Raises:
        NetworkError: the factors are not such a train.

    >>> from tnpeft.networks import Factorization, Site
    >>> from tnpeft.layout import layout
    >>> f = Factorization.of("g[o1 i1 a] h[a o2 i2] -> (o1 o2) (i1 i2)", ranks={"a": 4},
    ...                      init={"g": "tt_svd", "h": "tt_svd"})
    >>> place = layout(f, [Site(0, "q_proj", 4, 4)]).site_layouts[0]
    >>> weight = torch.arange(16.0).reshape(4, 4)
    >>> cores = tt_svd(["g", "h"], place, weight)
    >>> back = torch.einsum("xia,ayj->xyij", cores["g"], cores["h"]).reshape(4, 4)
    >>> bool(torch.allclose(back, weight, atol=1e-5))
    True
    """
    net, sizes = site_layout.network, site_layout.sizes
    outer = (*net.rows, *net.cols)
    cores = [site_layout.parameters[label].indices for label in labels]
    own = [tuple(i for i in core if i in outer) for core in cores]
    links = [tuple(i for i in a if i in b and i not in outer) for a, b in pairwise(cores)]
    for core, mine, before, after in zip(cores, own, [(), *links], [*links, ()], strict=True):
        if sorted(core) != sorted((*before, *mine, *after)):
            raise _unfit(site_layout.parameters[labels[0]], "tt_svd", "the factors that start so must form one train")
    if sorted(i for mine in own for i in mine) != sorted(outer):
        raise _unfit(site_layout.parameters[labels[0]], "tt_svd", f"give each of {' '.join(outer)} to one core")
    order = [outer.index(i) for mine in own for i in mine]
    rest = weight.reshape([sizes[i] for i in outer]).permute(order).reshape(1, -1)
    found = {}
    for label, core, mine, before, after in zip(labels, cores, own, [(), *links], [*links, ()], strict=True):
        axes = (*before, *mine, *after)
        rank = prod(sizes[i] for i in after)
        left, rest = _peel(rest.reshape(prod(sizes[i] for i in (*before, *mine)), -1), rank, last=not after)
        found[label] = left.reshape([sizes[i] for i in axes]).permute([axes.index(i) for i in core])
    return found


def _peel(matrix: Tensor, rank: int, *, last: bool) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors, and what is left over for the next cores."""
    if last:
        return matrix, matrix
    u, s, vt = signed_svd(matrix)
    kept = min(rank, len(s))
    left, right = matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
    left[:, :kept], right[:kept] = u[:, :kept], s[:kept, None] * vt[:kept]
    return left, right


def signed_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T, the signs chosen so that the largest entry of each left vector is positive.

    >>> u, s, vt = signed_svd(-2 * torch.eye(2))
    >>> u.abs().equal(u), s.tolist(), (u * s @ vt).equal(-2 * torch.eye(2))
    (True, [2.0, 2.0], True)
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, vt * sign.T


def _unfit(param: ParameterSpec, spec: str, remedy: str) -> NetworkError:
    axes = " ".join(f"{index}={size}" for index, size in zip(param.indices, param.shape, strict=True))
    return NetworkError(f"factor {param.label!r} [{axes}] cannot start as {spec!r}", remedy=remedy)
