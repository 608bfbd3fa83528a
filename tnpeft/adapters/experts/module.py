"""The module of experts that adds tensor-network updates to its grouped products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.experts.fused import check_local, is_eager, matrices
from tnpeft.adapters.experts.weight import ExpertWeight
from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.layer.checkpointing import check_recomputation, refuse_reentrant
from tnpeft.adapters.sites.weight import Weight, grouped_weights, held_weights
from tnpeft.networks import NetworkError
from tnpeft.nn.executor.groups import Groups


class TensorNetworkExperts(nn.Module):
    """A module of experts, and in place of each of its fused Parameters one with the updates of its adapters.

    Without an active adapter it calls the module as it is. With one it does what all of transformers' experts do:
    rows are sorted by expert, and the products with the weights and their updates are one operation each; what gates
    the rows is the module's own. Compiled graphs break here.
    """

    def __init__(self, experts: nn.Module, bank: FactorBank) -> None:
        super().__init__()
        self.base_layer = experts
        found = grouped_weights(experts)
        self.names = tuple(weight.name for weight in found)
        for weight in found:
            self._modules[weight.name] = ExpertWeight(weight, bank)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module of experts, such as ``num_experts``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def weights(self) -> tuple[ExpertWeight, ExpertWeight]:
        """The weights towards the experts' width, and back."""
        first, second = (self._modules[name] for name in self.names)
        return first, second  # type: ignore[return-value]

    def get_base_layer(self) -> nn.Module:
        """The module of experts."""
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merge adapters into all weights, as unloading asks for."""
        for weight in self.weights():
            weight.merge(safe_merge, adapter_names)

    def forward(
        self, hidden_states: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """The experts' output for every token, ``[tokens, hidden]``, with the updates of the active adapters."""
        first, second = self.weights()
        if adapter_names is not None:
            first.route_by_state(adapter_names)  # it may be none
        wanted = {*(first.active_adapters if adapter_names is None else adapter_names)}
        if wanted.isdisjoint({*first.updates, *second.updates}) or first.idle():
            result: Tensor = self.base_layer(hidden_states, *args, **kwargs)
            return result
        return self._adapted(adapter_names, hidden_states, *args, **kwargs)

    @torch.compiler.disable
    def _adapted(
        self,
        names: Sequence[str] | None,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
    ) -> Tensor:
        first, second = self.weights()
        if (seen := check_recomputation(first)) is not None:  # by a checkpoint
            with first.bank.selecting(seen):
                given = top_k_index, top_k_weights, router_indices, routing_weights
                return self._adapted(names, hidden_states, *given)
        check_local(self.base_layer)
        refuse_reentrant(first.bank)
        index = router_indices if top_k_index is None else top_k_index
        shares = routing_weights if top_k_weights is None else top_k_weights
        assert index is not None  # every class of experts is given both
        assert shares is not None
        tokens, chosen = index.shape
        if names is not None and len(names) != tokens:
            raise NetworkError(
                f"adapter_names has {len(names)} entries for {tokens} rows", remedy="name one adapter per row"
            )
        eager = is_eager(self.base_layer)
        # The order of rows is that of the implementation, so that a product has the same bits.
        ids, order = torch.sort((index.t() if eager else index).reshape(-1), stable=True)
        rows = order % tokens if eager else order.div(chosen, rounding_mode="floor")
        share = (shares.t() if eager else shares).reshape(-1)[order]
        groups = Groups(ids, self.base_layer.num_experts)  # type: ignore[arg-type]
        named = None if names is None else [names[k] for k in rows.tolist()]
        wide = first(hidden_states, groups, lambda states: states.index_select(0, rows), named)
        result = second(wide, groups, self.gate, named)
        if getattr(self.base_layer, "has_post_expert_norm", False):
            result = self.base_layer.post_expert_norm(result)
        result = result * share[:, None]
        if eager:
            result = result.to(hidden_states.dtype)
            return torch.zeros_like(hidden_states).index_add(0, rows, result)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        return result[back].view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def gate(self, rows: Tensor) -> Tensor:
        """Return the module's activation of the first product: the gated, or just activated, rows."""
        apply = self.base_layer._apply_gate if self.base_layer.has_gate else self.base_layer.act_fn
        gated: Tensor = apply(rows)  # type: ignore[operator]
        return gated


def weights_in(module: nn.Module) -> tuple[Weight, ...]:
    """The Parameters that a module reads itself, adapted or not; none of a layer that is called."""
    return held_weights(module.base_layer if isinstance(module, TensorNetworkExperts) else module)


def names_in(module: nn.Module) -> tuple[str, ...]:
    """The names of arrays inside a module by which targets may mean one, whether it can be adapted or not."""
    return (*matrices(module), *(name for weight in weights_in(module) for name in (weight.name, weight.child)))


def experts_at(model: nn.Module, path: str, bank: FactorBank) -> TensorNetworkExperts:
    """The adapted module of experts at a path; it takes the place of the one that is there, unless that is it."""
    parent, _, child = path.rpartition(".")
    owner = model.get_submodule(parent)
    found = getattr(owner, child)
    if not isinstance(found, TensorNetworkExperts):
        found = TensorNetworkExperts(found, bank).train(found.training)
        setattr(owner, child, found)
    return found
