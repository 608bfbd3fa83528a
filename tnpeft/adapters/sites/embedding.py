"""An embedding with the updates of its adapters: tokens are looked up in the factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.layer.binding import SiteUpdate
from tnpeft.adapters.sites.call import Apply, CalledLayer, network_of
from tnpeft.networks import Factor, Network, NetworkError, Term
from tnpeft.nn.dense import evaluator
from tnpeft.planning.planner import planned
from tnpeft.planning.steps import fresh

Lookup = Callable[[Tensor, Mapping[str, Tensor]], Tensor]  # numbers [...] and factors by label to rows [..., rows]
_Read = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class TensorNetworkEmbedding(CalledLayer):
    """An ``nn.Embedding`` and the updates of its adapters.

    Its matrix is that of the linear that it is on one-hot tokens, ``[embedding_dim, num_embeddings]``: rows (``out``)
    are features, columns (``inp``) tokens. With ``padding_idx`` the padding's row gets no gradient, as in torch.
    Dropout leaves out the update of whole tokens.
    """

    @property
    def num_embeddings(self) -> int:
        """The number of tokens."""
        return self.in_features

    @property
    def embedding_dim(self) -> int:
        """The number of features."""
        return self.out_features

    @property
    def padding_idx(self) -> int | None:
        """The token whose row gets no gradient."""
        module: Any = self.get_base_layer()
        return module.padding_idx  # type: ignore[no-any-return]

    def _stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def compiled(self, item: SiteUpdate) -> tuple[str, Apply]:
        """The rows of tokens; zero for tokens outside a slice, and among zeros those of a slice of the features."""
        look = lookup(network_of(item), item.site_layout.sizes, item.tokens)
        behind = self.out_features - item.start - item.length

        def apply(base: nn.Embedding, x: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
            if item.side == "inp":
                inside = (x >= item.start) & (x < item.start + item.length)
                return look((x - item.start).clamp(0, item.length - 1), arrays) * inside[..., None]
            found = look(x, arrays)
            return nn.functional.pad(found, (item.start, behind)) if item.side else found

        return "tokens are looked up in the factors", apply

    def change(self, adapter: str, x: Tensor, base: Tensor) -> Tensor:
        """Return what an adapter adds to ``base``, the output of the base layer alone."""
        module: Any = self.get_base_layer()
        found = self.update_of(adapter, x, self._compute_dtype(adapter, module.weight))
        if module.padding_idx is not None:
            found = torch.where((x == module.padding_idx)[..., None], found.detach(), found)
        drop = self.dropouts[adapter]
        if drop and self.training:
            found = found * nn.functional.dropout(found.new_ones(x.shape), drop)[..., None]
        scale = embed_scale(module)
        return found if scale is None else found * torch.as_tensor(scale, dtype=found.dtype, device=found.device)


def embed_scale(module: nn.Module) -> Any:
    """The number that an embedding of its own class multiplies its rows by; None of torch's class."""
    return None if type(module).forward is nn.Embedding.forward else getattr(module, "embed_scale", None)


def check_embedding(name: str, module: nn.Embedding, dora: bool) -> None:
    """Raise if an embedding does something to its rows that an update of them would not meet."""
    if module.max_norm is not None:
        raise NetworkError(
            f"{name} has max_norm, which changes its weight at every call",
            remedy="leave it out of target_modules, or set max_norm to None",
        )
    if module.scale_grad_by_freq:
        raise NetworkError(
            f"{name} scales gradients by the frequency of tokens, and factors have no tokens of their own",
            remedy="leave it out of target_modules, or set scale_grad_by_freq to False",
        )
    if dora:
        raise NetworkError(
            f"{name} is an embedding, and the lengths that dora needs run over all its tokens at every call",
            remedy="adapt embeddings with an adapter of their own, without dora",
        )


@torch.no_grad()
def only_scaled(module: nn.Embedding) -> bool:
    """True if an embedding of a class of its own multiplies its rows by a number and does nothing else."""
    scale = embed_scale(module)
    if scale is None or module.weight.is_meta:
        return False
    token = torch.zeros(1, 1, dtype=torch.long, device=module.weight.device)
    try:
        found = module(token)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    plain = module.weight[0] * torch.as_tensor(scale, dtype=module.weight.dtype, device=module.weight.device)
    return isinstance(found, Tensor) and found.shape == (1, 1, len(plain)) and torch.equal(found[0, 0], plain)


# ---- columns of a network's matrix by number: from the factors, never from the dense update


def lookup(net: Network, sizes: Mapping[str, int], tokens: int) -> Lookup:
    """The columns of a network's matrix by number, as rows, planned for so many numbers.

    They are the network in which every factor has one axis of numbers in place of its column indices.
    """
    number = fresh("number", net.indices)
    reads: dict[str, _Read] = {}

    def read(factor: Factor) -> Factor:
        name = f"F{len(reads)}"
        cols, rest = ([i for i in factor.indices if (i in net.cols) is own] for own in (True, False))
        reads[name] = _table(net, sizes, factor, cols, rest)
        return Factor(name, (*(number,) * bool(cols), *rest), factor.kind)

    terms = tuple(Term(tuple(map(read, term.factors)), term.sign) for term in net.terms)
    line = Network(terms, ((number,), net.rows))
    dims = tuple((index, tokens if index == number else sizes[index]) for index in line.indices)
    form = evaluator(planned(line, dims, None), number)
    rows = prod(sizes[index] for index in net.rows)

    def look(numbers: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        flat = numbers.reshape(-1)
        found: Tensor = form({name: its(flat, arrays) for name, its in reads.items()})
        return found.reshape(*numbers.shape, rows)

    return look


def _table(net: Network, sizes: Mapping[str, int], factor: Factor, cols: list[str], rest: list[str]) -> _Read:
    """The rows of a factor at its own digits of the numbers; all of it if it has no column indices."""
    label, order = net.label(factor), [factor.indices.index(index) for index in (*cols, *rest)]
    shape, length = [sizes[index] for index in rest], prod(sizes[index] for index in cols)
    step = {index: prod(sizes[i] for i in net.cols[k + 1 :]) for k, index in enumerate(net.cols)}
    digits = [] if cols == [*net.cols] else [(step[index], sizes[index]) for index in cols]

    def read(flat: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        if not cols:
            return arrays[label]
        place = torch.zeros_like(flat) if digits else flat
        for worth, size in digits:
            place = place * size + flat // worth % size
        table = arrays[label].permute(order).reshape(length, -1)
        return nn.functional.embedding(place, table).reshape(len(flat), *shape)

    return read
