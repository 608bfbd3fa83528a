"""A site's update by plain einsum, from the line alone."""

from __future__ import annotations

import oracles
from torch import Tensor

from tnpeft.layout import ParameterSpec, SiteLayout
from tnpeft.networks import Factorization


def dense(site_layout: SiteLayout, values: dict[ParameterSpec, Tensor], f: Factorization, weight: Tensor) -> Tensor:
    """One site's scaled update in the shape of its weight, ``[out, inp]``."""
    net, sizes = site_layout.network, site_layout.sizes
    sides, factors = (*net.rows, *net.cols), {}
    for factor in net.factors:
        label = net.label(factor)
        base = f.init.get(label) == "base"
        value = weight.reshape([sizes[i] for i in sides]) if base else values[site_layout.parameters[label]]
        if label in f.unit_norm:
            axes = [axis for axis, index in enumerate(factor.indices) if index in sides]
            value = value / value.norm(dim=axes, keepdim=True)
        factors[label] = value
    return f.scale * oracles.dense(net, factors).reshape(weight.shape)
