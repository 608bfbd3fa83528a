"""A site's update by plain einsum, from the line alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tnpeft.layout import ParameterSpec, SiteLayout
from tnpeft.networks import Factorization


def dense(site_layout: SiteLayout, values: dict[ParameterSpec, Tensor], f: Factorization, weight: Tensor) -> Tensor:
    """One site's scaled update by one unordered einsum per term, ``[out, inp]``."""
    net, sizes = site_layout.network, site_layout.sizes
    letters = {index: chr(ord("a") + k) for k, index in enumerate(net.indices)}
    sides = (*net.rows, *net.cols)
    total: Any = 0.0
    for term in net.terms:
        operands = []
        for factor in term.factors:
            label = net.label(factor)
            value = (
                weight.reshape([sizes[i] for i in sides])
                if f.init.get(label) == "base"
                else values[site_layout.parameters[label]]
            )
            if label in f.unit_norm:
                axes = [axis for axis, index in enumerate(factor.indices) if index in sides]
                value = value / value.norm(dim=axes, keepdim=True)
            operands.append(value)
        spec = ",".join("".join(letters[i] for i in factor.indices) for factor in term.factors)
        total = total + term.sign * torch.einsum(spec + "->" + "".join(letters[i] for i in sides), operands)
    return f.scale * total.reshape(weight.shape)
