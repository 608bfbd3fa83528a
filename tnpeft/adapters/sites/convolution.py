"""A convolution with the updates of its adapters: two thin kernels where the network has a cut that is cheaper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.layer.merging import rescaled
from tnpeft.adapters.sites.call import Apply, CalledLayer, network_of
from tnpeft.nn.dense import evaluator
from tnpeft.nn.executor.groups import Groups
from tnpeft.nn.lowrank import compiled_sides, cut_rank
from tnpeft.planning.planner import planned

_FUNCTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


class TensorNetworkConvolution(CalledLayer):
    """An ``nn.Conv1d``, ``Conv2d`` or ``Conv3d`` and the updates of its adapters.

    Its matrix is the unfolded kernel: rows (``out``) are output channels, columns ``(inp kh kw)`` the input channels
    of one group and the taps of the kernel, in the order of the weight. An update whose smallest cut between rows and
    columns is narrow is two convolutions, with the kernel of the columns' side and with one tap; else it is formed.
    """

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _stored(self, matrix: Tensor) -> Tensor:
        module: Any = self.get_base_layer()
        return matrix.reshape(module.weight.shape)

    def compiled(self, item: SiteUpdate) -> tuple[str, Apply]:
        """Two convolutions where they take fewer multiply-adds than one with the formed update."""
        out, inp, base = self.out_features, self.in_features, self.get_base_layer()
        net, sizes = network_of(item), item.site_layout.sizes
        width = 0 if item.side else cut_rank(net, sizes)
        if width and width * (base.groups * inp + out) < out * inp:  # type: ignore[operator]
            return f"a kernel of {width} channels, then one tap", partial(_narrow, compiled_sides(net, sizes))
        form = evaluator(planned(net, tuple((index, sizes[index]) for index in net.indices), None))
        shape = tuple(prod(sizes[index] for index in group) for group in (net.rows, net.cols))

        def formed(base: Any, x: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
            matrix = form(arrays).reshape(shape)
            if item.side:
                whole = matrix.new_zeros(out, inp)
                whole.narrow(0 if item.side == "out" else 1, item.start, item.length).copy_(matrix)
                matrix = whole
            return _convolved(base, x, matrix.reshape(base.weight.shape))

        why = "it is of slices of the layer" if item.side else "no cut of its network is narrower"
        return f"the update is formed: {why}", formed

    def change(self, adapter: str, x: Tensor, base: Tensor) -> Tensor:
        """Return what an adapter adds to ``base``, the output of the base layer alone."""
        drop, dtype = self.dropouts[adapter], self._compute_dtype(adapter, x)
        dropped = bool(drop) and self.training
        x = nn.functional.dropout(x, drop).to(dtype) if dropped else x.to(dtype)
        update = self.update_of(adapter, x, dtype)
        if adapter not in self.tnpeft_magnitude:
            return update
        module: Any = self.get_base_layer()
        each = (-1, *(1 for _ in module.weight.shape[2:]))  # of channels
        bias = None if module.bias is None else module.bias.reshape(each)
        product = _convolved(module, x, module.weight.to(dtype)) if dropped else None
        return rescaled(self._ratio(adapter, dtype).reshape(each), base, bias, update, product)

    def patches(self, x: Tensor, most: int) -> tuple[Tensor, Groups]:
        """Some of the patches of ``x`` that the matrix is multiplied with, ``[patches, inp]``, and their groups."""
        base: Any = self.get_base_layer()
        taps = base.weight.shape[2:]
        x = x if x.dim() == len(taps) + 2 else x[None]
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=mode)
        for axis, (size, step, gap) in enumerate(zip(taps, base.stride, base.dilation, strict=True), start=2):
            x = x.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
        x = x.unflatten(1, (base.groups, -1)).movedim(2, 2 + len(taps))  # [batch, group, *places, channels, *taps]
        x = x.movedim(1, 0)
        places = x.shape[1 : 2 + len(taps)]
        chosen = torch.arange(0, prod(places), -(-prod(places) * base.groups // most), device=x.device)
        x = x[:, *torch.unravel_index(chosen, places)].flatten(2)
        ids = torch.arange(base.groups, device=x.device).repeat_interleave(len(chosen))
        return x.flatten(0, 1), Groups(ids, base.groups)


def _narrow(
    sides: Callable[..., tuple[Tensor, Tensor]], base: Any, x: Tensor, arrays: Mapping[str, Tensor]
) -> Tensor:
    """A convolution with the kernel of the columns' side of an update, and one of one tap with the rows' side."""
    left, right = sides(arrays)
    _, channels, *taps = base.weight.shape
    kernel = right.reshape(-1, channels, *taps).repeat(base.groups, *(1 for _ in base.weight.shape[1:]))
    return _FUNCTIONS[len(taps)](
        _convolved(base, x, kernel), left.reshape(*left.shape, *(1 for _ in taps)), groups=base.groups
    )


def _convolved(base: Any, x: Tensor, kernel: Tensor) -> Tensor:
    return base._conv_forward(x, kernel, None)  # type: ignore[no-any-return]  # its stride, padding and groups
