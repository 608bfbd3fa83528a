"""Preconditioned steps: gradients times the inverse Gram matrices of environments, for any torch optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from math import inf, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tnpeft.adapters.layer.bank import find_bank
from tnpeft.adapters.state import bank_of
from tnpeft.layout import ParameterSpec
from tnpeft.networks import NetworkError
from tnpeft.optim.directions import Directions

O = TypeVar("O", bound=Optimizer)  # noqa: E741


def precondition(optimizer: O, model: nn.Module, damping: float = 1e-2, *, invariant: bool = False) -> O:
    """Let an optimizer step by preconditioned gradients, and return it.

    The gradient of a factor, over its bonds, is multiplied by the inverse of ``G + damping``, where ``G`` is the Gram
    matrix of the factor's environment: the network without the factor times its copy, outer indices traced, summed
    over the sites where the factor lives. An environment that falls into parts (that of a Tucker core) has one such
    inverse for each part. For LoRA these are the steps of PEFT's Riemannian optimizer (arXiv 2402.02347).

    *Exactly invariant*: with ``damping=0`` and plain or momentum SGD, an update written in another gauge (any
    invertible matrix on a bond) takes the same step. Damping, which a factor needs whose environment is zero at the
    start, breaks this in proportion to its size; so does an optimizer with a second moment for every entry, as Adam.

    With ``invariant=True`` the step is one of the update, not of its factors. Factors move one after the other, in
    the order of their gains (:func:`tnpeft.gain`), each along what those before it leave of the update's gradient: a
    sweep of least squares, exact where the factors' parts of the update are orthogonal, as in LoRA, Tucker and block
    terms. Lines that span the same updates then train alike, whatever their number of factors. Damping is relative,
    ``damping`` times the mean eigenvalue, and optimizers with ``betas`` leave the factors to this rule: the first
    moment is of what is left of each gradient, the second one is one number for all factors that share sites, the
    squared length of the update's step; the step is as long as the first signed step at the groups' rates. Only
    damping then depends on the gauge (but not on rotations), and weight decay, which is decoupled, on the factors. Do
    not clip gradients by their norm, which depends on the gauge and on the number of factors.

    The optimizer keeps its class, state, groups, schedulers and hooks; gradients are restored after a step.

    Args:
        optimizer: any torch optimizer but those that need a closure, over the parameters of ``model``.
        model: a model with adapters.
        damping: what is added to the diagonal of every Gram matrix.
        invariant: let damping and moments be invariant as well.

    Raises:
        NetworkError: the model has no adapter, the optimizer is preconditioned already or needs a closure, or damping
            is negative or not finite, or the optimizer is of another model.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> optimizer = precondition(torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-2)), model)
    """
    if not isinstance(optimizer, Optimizer):
        raise NetworkError(f"the optimizer is a {type(optimizer).__name__}", remedy="pass optimizer, then model")
    if getattr(optimizer, "_tnpeft_preconditioner", None) is not None:
        raise NetworkError("the optimizer is preconditioned already", remedy="call precondition once")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise NetworkError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, with other Grams each time",
            remedy="use an optimizer with an optional closure, such as SGD or AdamW",
        )
    if not isinstance(damping, int | float) or not 0 <= damping < inf:
        raise NetworkError(f"damping is {damping!r}", remedy="pass a finite number from 0 on")
    bank = find_bank(model)
    names = [*bank.layouts] if bank is not None else [bank_of(model)]  # raises without a bank
    made = [Directions(model, str(name), damping, invariant) for name in names]
    held = {id(array) for group in optimizer.param_groups for array in group["params"]}
    if not any(id(array) in held for array in model.parameters() if array.requires_grad):
        raise NetworkError(
            "the optimizer holds no trained parameter of the model",
            remedy="make it of tnpeft.parameter_groups(model)",
        )
    hooks = _Hooks([adapter for adapter in made if adapter.trained], invariant)
    optimizer.register_step_pre_hook(hooks.before)
    optimizer.register_step_post_hook(hooks.after)
    optimizer._tnpeft_preconditioner = hooks  # type: ignore[attr-defined]
    return optimizer


class _Hooks:
    """Hooks before and after a step of the optimizer."""

    def __init__(self, adapters: list[Directions], invariant: bool) -> None:
        self.adapters, self.invariant = adapters, invariant
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.moves: list[Callable[[], None]] = []  # made after the optimizer's own, where hooks see them

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put directions in the place of gradients, after the closure where there is one."""
        position = 1 if len(args) > 1 else None
        closure = kwargs.get("closure") if position is None else args[position]
        if closure is None:
            self._replace(optimizer)
            return None

        def wrapped() -> Any:
            self._restore()
            loss = closure()
            self._replace(optimizer)
            return loss

        if position is None:
            return args, {**kwargs, "closure": wrapped}
        return (*args[:position], wrapped, *args[position + 1 :]), kwargs

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the invariant steps, and put the gradients back."""
        for move in self.moves:
            move()
        self._restore()

    def _restore(self) -> None:
        for array, grad in self.kept:
            array.grad = grad
        self.kept, self.moves = [], []

    @torch.no_grad()
    def _replace(self, optimizer: Optimizer) -> None:
        owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for adapter in self.adapters:
            live = {p: a for p, a in adapter.trained.items() if a.grad is not None and id(a) in owner}
            gradients: dict[ParameterSpec, Any] = {param: array.grad for param, array in live.items()}
            self.kept += [(array, gradients[param]) for param, array in live.items()]
            own = {p: a for p, a in live.items() if self.invariant and "betas" in owner[id(a)]}
            steps, _ = adapter.directions({p: gradient for p, gradient in gradients.items() if p not in own})
            for param, array in live.items():
                array.grad = None if param in own else steps[param].to(array.dtype).contiguous()
            if own:
                rest = {param: gradients[param] for param in own}
                self.moves.append(partial(_invariant_step, adapter, own, rest, optimizer, owner))


@torch.no_grad()
def _invariant_step(
    adapter: Directions,
    live: Mapping[ParameterSpec, Tensor],
    gradients: Mapping[ParameterSpec, Tensor],
    optimizer: Optimizer,
    owner: Mapping[int, dict[str, Any]],
) -> None:
    """One step of all factors: first moments of gradients, one second moment for all that share sites.

    Replicas have second moments of their own.
    """

    def mean(param: ParameterSpec, gradient: Tensor) -> Tensor:
        """The corrected mean, over steps, of what is left to a factor."""
        state, beta1 = optimizer.state[live[param]], owner[id(live[param])]["betas"][0]
        moment: Tensor = state["tnpeft_moment"].lerp_(gradient.to(state["tnpeft_moment"].dtype), 1 - beta1)
        return moment / (1 - beta1 ** float(state["step"]))

    for array in live.values():
        state = optimizer.state[array]
        if "tnpeft_moment" not in state:
            wide = torch.promote_types(array.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["tnpeft_moment"] = torch.zeros_like(array, dtype=wide)
            state["tnpeft_length"] = array.new_zeros(array.shape[:1] if adapter.replicas else (), dtype=wide)
        state["step"] += 1
    steps, energies = adapter.directions(gradients, mean)
    lengths: dict[int, Tensor] = {}
    for param, array in live.items():
        state, beta2 = optimizer.state[array], owner[id(array)]["betas"][1]
        state["tnpeft_length"].lerp_(energies[param].to(state["tnpeft_length"].dtype), 1 - beta2)
        component = adapter.component[param]
        length = state["tnpeft_length"] / (1 - beta2 ** float(state["step"]))
        lengths[component] = lengths[component] + length if component in lengths else length
    moves: dict[int, float] = {}
    for component in lengths:
        rates = {p.label: owner[id(a)]["lr"] for p, a in live.items() if adapter.component[p] == component}
        squares = adapter.gains.get(component, {})
        moves[component] = sqrt(sum(float(rates[k]) ** 2 * sum(v) / len(v) for k, v in squares.items() if k in rates))
    for param, array in live.items():
        group, component = owner[id(array)], adapter.component[param]
        array.mul_(1 - float(group["lr"]) * group.get("weight_decay", 0.0))
        length = lengths[component].sqrt() + group.get("eps", 1e-8) * 1e-8
        size = moves[component] * sqrt(adapter.entries[component]) / length
        size = size.reshape(-1, *[1] * (array.ndim - 1)) if adapter.replicas else size
        array.sub_((size * steps[param]).to(array.dtype))
