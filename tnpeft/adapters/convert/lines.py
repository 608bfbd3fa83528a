"""An adapter as lines: one per site, with its factors; and the packing of factors into stored tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tnpeft.networks import AdapterFileError, Network
from tnpeft.networks.factor import Group

Array = NDArray[np.float64]
_PACKED = re.compile(r"(\w+)\[([^\]]*)\]")


@dataclass(frozen=True)
class SiteAdapter:
    """The update of one weight: its module, the line of this one site, the factors with their axes as declared.

    ``magnitude`` is DoRA's, ``[out]``, None without it. ``rounded`` tells that values were multiplied on the way, so
    that they need not agree to the last bit. ``update`` is ``[*stack, out, inp]`` by the formula of the format that
    the site was read from, None where it was read from none.
    """

    module: str
    network: Network
    factors: Mapping[str, Tensor]
    scale: float = 1.0
    magnitude: Tensor | None = None
    rounded: bool = False
    update: Array | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every index."""
        return {
            index: size
            for factor in self.network.uses()
            for index, size in zip(factor.indices, self.factors[self.network.label(factor)].shape, strict=True)
        }

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        sizes = self.sizes
        rows, cols = (prod(sizes[i] for i in group) for group in (self.network.rows, self.network.cols))
        return rows, cols

    def scaled(self, scale: float) -> SiteAdapter:
        """The same update at another scale: the quotient goes into the first trainable factor."""
        if scale == self.scale:
            return self
        first = next(self.network.label(f) for f in self.network.factors if f.kind == "trainable")
        value = self.factors[first]
        return replace(
            self,
            factors={**self.factors, first: (value.double() * (self.scale / scale)).to(value.dtype)},
            scale=scale,
            rounded=True,
        )


@dataclass(frozen=True)
class AdapterLines:
    """All sites of an adapter, what it names besides (``about``), and tensors other than factors (``others``).

    ``format`` says what it was read from.
    """

    sites: Sequence[SiteAdapter]
    about: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)
    format: str = ""


# ---- packed tensors: "A[(expert r) inp]" is a matrix whose rows count experts slowest


def parse(packed: str) -> tuple[str, tuple[Group, ...]]:
    """The name and the axes of a packed tensor; an axis is a group of indices, ``()`` an axis of size 1."""
    match = _PACKED.fullmatch(packed)
    assert match is not None, packed
    axes = re.findall(r"\(([^)]*)\)|(\S+)", match[2])
    return match[1], tuple(() if one == "1" else tuple((group or one).split()) for group, one in axes)


def sizes_of(tensors: Mapping[str, Tensor], packed: Mapping[str, str], known: Mapping[str, int]) -> dict[str, int]:
    """The sizes of all indices, worked out of the shapes of packed tensors."""
    sizes = dict(known)
    axes = [
        (name, group, length)
        for name, tensor in tensors.items()
        for group, length in zip(parse(packed[name])[1], tensor.shape, strict=True)
    ]
    for _ in axes:
        for _, group, length in axes:
            unknown = [index for index in group if index not in sizes]
            if len(unknown) == 1:
                sizes[unknown[0]] = length // max(prod(sizes[i] for i in group if i in sizes), 1)
    for name, group, length in axes:
        if any(index not in sizes for index in group) or prod(sizes[index] for index in group) != length:
            raise AdapterFileError(
                f"{name} has the shape {tuple(tensors[name].shape)}, which does not fit "
                f"{packed[name]} at {', '.join(f'{i}={n}' for i, n in sizes.items())}",
                remedy="check the rank in the configuration, and that the files belong together",
            )
    return sizes


def unpack(tensor: Tensor, packed: str, declared: Group, sizes: Mapping[str, int]) -> Tensor:
    """A packed tensor as a factor with the declared axes."""
    flat = [index for group in parse(packed)[1] for index in group]
    spread = tensor.reshape([sizes[index] for index in flat])
    return spread.permute([flat.index(index) for index in declared]).contiguous()


def pack(factor: Tensor, packed: str, declared: Group) -> Tensor:
    """The inverse of :func:`unpack`."""
    axes = parse(packed)[1]
    flat = [index for group in axes for index in group]
    sizes = dict(zip(declared, factor.shape, strict=True))
    moved = factor.permute([declared.index(index) for index in flat])
    return moved.reshape([prod(sizes[index] for index in group) for group in axes]).contiguous()


def grown(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with zeros behind its end along each axis, up to a shape."""
    lacking = [size - own for size, own in zip(shape, tensor.shape, strict=True)]
    return torch.nn.functional.pad(tensor, [part for lack in reversed(lacking) for part in (0, lack)])
