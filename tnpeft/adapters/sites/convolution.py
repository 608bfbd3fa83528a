"""A convolution with the updates of its adapters: two thin kernels where the network has a cut that is cheaper."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.sites.call import CalledLayer, network_of
from tnpeft.networks import NetworkError
from tnpeft.nn.dense import evaluator
from tnpeft.nn.executor.groups import Groups
from tnpeft.nn.lowrank import compiled_sides, cut_rank
from tnpeft.planning.planner import planned

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
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

    def compute_dtype(self, adapter: str, x: Tensor) -> torch.dtype:
        """The wider dtype of input and factors."""
        return self._compute_dtype(adapter, x)

    def how(self, adapter: str) -> str:
        """Return how an adapter's update is applied, in words."""
        item = self.updates[adapter][0]
        if item.side:
            return "the update is formed: it is of slices of the layer"
        width = self.compiled(item)[0]
        if not width:
            return "the update is formed: no cut of its network is narrower"
        return f"a kernel of {width} channels, then one tap"

    def compiled(self, item: SiteUpdate) -> tuple[int, Any]:
        """The channels between the two kernels of an update, and the function of the factors that gives these.

        0 channels if forming the update takes fewer multiply-adds: the function gives its matrix then.
        """
        return item.cached("sides", lambda: self._sides(item))  # type: ignore[no-any-return]

    def _sides(self, item: SiteUpdate) -> tuple[int, Any]:
        base: Any = self.get_base_layer()
        net, sizes = network_of(item), item.site_layout.sizes
        cut = 0 if item.side else cut_rank(net, sizes)
        if cut and cut * (base.groups * self.in_features + self.out_features) < self.out_features * self.in_features:
            return cut, compiled_sides(net, sizes)
        shape = tuple(prod(sizes[index] for index in group) for group in (net.rows, net.cols))
        form = evaluator(planned(net, tuple((index, sizes[index]) for index in net.indices), None))
        return 0, lambda arrays: form(arrays).reshape(shape)

    def apply_update(self, item: SiteUpdate, x: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """The update of ``x [batch, channels, *places]``."""
        base: Any = self.get_base_layer()
        taps = base.weight.shape[2:]
        batched = x if x.dim() == len(taps) + 2 else x[None]
        width, form = self.compiled(item)
        if width:
            left, right = form(arrays)
            kernel = right.reshape(width, -1, *taps).repeat(base.groups, *(1 for _ in base.weight.shape[1:]))
            narrow = self._convolved(batched, kernel)
            result = _FUNCTIONS[len(taps)](narrow, left.reshape(*left.shape, *(1 for _ in taps)), groups=base.groups)
        else:
            result = self._convolved(batched, self._stored(self._whole(item, form(arrays))))
        return result if batched is x else result[0]

    def _whole(self, item: SiteUpdate, matrix: Tensor) -> Tensor:
        """The matrix of one site's update, zero outside the site's slice."""
        if not item.side:
            return matrix
        whole = matrix.new_zeros(self.out_features, self.in_features)
        whole.narrow(0 if item.side == "out" else 1, item.start, item.length).copy_(matrix)
        return whole

    def _convolved(self, x: Tensor, kernel: Tensor) -> Tensor:
        module: Any = self.get_base_layer()
        return module._conv_forward(x, kernel, None)  # type: ignore[no-any-return]  # its stride, padding and groups

    def change(self, adapter: str, x: Tensor, base: Tensor) -> Tensor:
        """Return what an adapter adds to ``base``, the output of the base layer alone."""
        drop, dtype = self.dropouts[adapter], self.compute_dtype(adapter, x)
        dropped = bool(drop) and self.training
        x = nn.functional.dropout(x, drop).to(dtype) if dropped else x.to(dtype)
        update = self.update_of(adapter, x)
        if adapter not in self.tnpeft_magnitude:
            return update
        ratio = self._channels(self._ratio(adapter, dtype))
        module: Any = self.get_base_layer()
        if dropped:
            plain = self._convolved(x, module.weight.to(dtype))
        else:
            plain = base.to(ratio.dtype)
            plain = plain if module.bias is None else plain - self._channels(module.bias.to(plain.dtype))
        return (ratio - 1) * plain + ratio * update

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

    def _channels(self, values: Tensor) -> Tensor:
        module: Any = self.get_base_layer()
        return values.reshape(-1, *(1 for _ in module.weight.shape[2:]))


def check_convolution(name: str, module: nn.Module) -> None:
    """Raise if a convolution does more than torch's own."""
    torchs = {cls.forward for cls in CONVOLUTIONS}
    if type(module).forward not in torchs:
        raise NetworkError(
            f"{name} is a {type(module).__name__}, which does more than convolve",
            remedy="leave it out of target_modules, or name it in exclude_modules",
        )
