"""Preconditioned steps: gradients times the inverse Gram matrices of environments, for any torch optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import inf, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tnpeft.adapters.layer.bank import find_bank
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.layout import Layout, ParameterSpec
from tnpeft.networks import REPLICA, NetworkError
from tnpeft.optim.grams import Environment, Group, groups, inner_product
from tnpeft.scaling.gain import squares_on

O = TypeVar("O", bound=Optimizer)  # noqa: E741
_Arrays = Mapping[ParameterSpec, Tensor]
_EXACT = 1e-5  # damping, relative to the mean eigenvalue, that still inverts in single precision


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
    made = [_Adapter(model, str(name), damping, invariant) for name in names]
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


class _Adapter:
    """One adapter's arrays, groups of sites, and the directions of steps."""

    def __init__(self, model: nn.Module, name: str, damping: float, invariant: bool) -> None:
        bank = bank_of(model, name)
        self.layout: Layout = bank.layouts[name]
        self.values = arrays(model, bank, name)
        self.trained = {p: a for p, a in self.values.items() if p.kind == "trainable" and a.requires_grad}
        self.damping, self.invariant = damping, invariant
        scale = self.layout.factorization.scale
        self.factor = scale**2 if invariant else 1.0
        self.groups = groups(self.layout)
        self.replicas = any(REPLICA in group.network.stack for group in self.groups)
        for param, array in self.trained.items():
            if tuple(array.shape) != param.shape:
                raise NetworkError(
                    f"factor {param.label!r} has the shape {tuple(array.shape)}, not {param.shape}",
                    remedy="precondition the optimizer of a model whose factors are not sharded",
                )
        if invariant:
            self.component = _components(self.layout)
            squares = squares_on(self.layout)
            self.gains: dict[int, dict[str, list[float]]] = {}
            self.entries: dict[int, int] = {}
            totals: dict[str, float] = {}
            for site in self.layout.site_layouts:
                live = [param for param in site.parameters.values() if param.kind == "trainable"]
                component = self.component[live[0]]
                self.entries[component] = self.entries.get(component, 0) + site.site.out * site.site.inp
                for label, square in squares[site.site].items():
                    self.gains.setdefault(component, {}).setdefault(label, []).append(float(square))
                    totals[label] = totals.get(label, 0.0) + float(square)
            labels = dict.fromkeys(param.label for param in self.trained)
            self.order = sorted(labels, key=lambda label: -totals.get(label, 0.0))

    def directions(
        self, gradients: _Arrays, mean: Callable[[ParameterSpec, Tensor], Tensor] = lambda _, gradient: gradient
    ) -> tuple[_Arrays, _Arrays]:
        """Return gradients times the inverse Gram matrices, and the lengths of the steps along them.

        Invariant ones one factor after the other, in the order of their gains: each of what the ones before it leave
        of the gradient of the update, so that no part of it is stepped along twice. What is left is found without
        damping, so that damping leaves nothing to others.

        Args:
            gradients: of the factors.
            mean: takes a factor and what is left of its gradient, and returns what the step is of.
        """
        if not self.invariant:
            given = {param: [mean(param, gradient)] for param, gradient in gradients.items()}
            return {param: step for param, (step,) in self._solved(given, (self.damping,)).items()}, {}
        steps: dict[ParameterSpec, Tensor] = {}
        spent: dict[ParameterSpec, Tensor] = {}
        energies: dict[ParameterSpec, Tensor] = {}
        overlap: _Overlap | None = None
        for label in self.order:
            own = {param: gradient for param, gradient in gradients.items() if param.label == label}
            if spent and own:
                overlap = overlap or _Overlap(self)
                taken = overlap(spent, own)
                own = {param: gradient - taken[param] for param, gradient in own.items()}
            both = {param: [gradient, mean(param, gradient)] for param, gradient in own.items()}
            for param, (exact, step) in self._solved(both, (min(self.damping, _EXACT), self.damping)).items():
                spent[param], steps[param] = exact, step
                energy = own[param] * exact
                energies[param] = energy.flatten(1).sum(1) if self.replicas else energy.sum()
        return steps, energies

    def _solved(
        self, gradients: Mapping[ParameterSpec, list[Tensor]], dampings: tuple[float, ...]
    ) -> dict[ParameterSpec, list[Tensor]]:
        """Several gradients of each factor, times the inverse Gram matrices of its environment at their dampings."""
        found: dict[ParameterSpec, list[Tensor]] = {}
        sums: dict[ParameterSpec, Tensor] = {}
        batches: dict[ParameterSpec, tuple[str, ...]] = {}
        for group in self.groups:
            dtype = torch.promote_types(next(iter(self.trained.values())).dtype, torch.float32)
            stacked = group.stacked(self.values, dtype)
            for label, environment in group.environments.items():
                params = [site.parameters[label] for site in group.sites]
                if not any(param in gradients for param in params):
                    continue
                grams = [self.factor * group.gram(block, stacked) for block in environment.blocks]
                if label in group.unit:
                    grams = [self._lengths(group, label, environment, grams)]
                unique = list(dict.fromkeys(params))
                for k, gram in enumerate(grams):
                    if len(gram) == 1 or len(unique) == len(params):
                        continue
                    at = torch.tensor([unique.index(param) for param in params], device=gram.device)
                    grams[k] = gram.new_zeros(len(unique), *gram.shape[1:]).index_add_(0, at, gram)
                if label in group.joint:
                    for k, param in enumerate(unique):
                        own = grams[0][k if len(grams[0]) > 1 else 0]
                        sums[param] = sums[param] + own if param in sums else own
                        batches[param] = environment.blocks[0].batch if environment.blocks else ()
                    continue
                kept = [k for k, param in enumerate(unique) if param in gradients]
                stack = torch.stack([torch.stack(gradients[unique[k]]) for k in kept], 1).to(dtype)
                for block, gram in zip(environment.blocks, grams, strict=True):
                    chosen = gram if len(gram) == 1 else gram[kept]
                    stack = self._solve(stack, dampings, chosen, unique[0].indices, block.batch, block.bonds)
                for place, k in enumerate(kept):
                    found[unique[k]] = list(stack[:, place])
        for param, gram in sums.items():
            if param in gradients:
                bonds = tuple(i for i in param.indices if i not in self._outer)
                stack = torch.stack(gradients[param])[:, None].to(gram.dtype)
                solved = self._solve(stack, dampings, gram[None], param.indices, batches[param], bonds)
                found[param] = list(solved[:, 0])
        return found

    @property
    def _outer(self) -> set[str]:
        return {index for group in self.groups for index in group.network.outer}

    def _lengths(self, group: Group, label: str, environment: Environment, grams: list[Tensor]) -> Tensor:
        """The Gram matrix of a factor that is normalised: over the lengths of its columns on both sides."""
        (gram,), (block,) = grams, environment.blocks
        params = list(dict.fromkeys(site.parameters[label] for site in group.sites))
        length = torch.stack(
            [torch.linalg.vector_norm(self.values[p].detach().to(gram.dtype), dim=group.unit[label]) for p in params]
        )
        columns = [i for i in params[0].indices if i not in group.network.rows and i not in group.network.cols]
        order = [1 + columns.index(i) for i in columns if i in block.bonds]
        if len(order) != len(columns) or any(i in (*group.network.rows, *group.network.cols) for i in block.batch):
            return gram
        flat = length.permute(0, *order).reshape(len(params), -1)
        flat = flat if len(gram) > 1 else flat[:1]
        return gram / (flat[:, :, None] * flat[:, None, :]).clamp_min(torch.finfo(gram.dtype).tiny)

    def _solve(
        self,
        stack: Tensor,
        dampings: tuple[float, ...],
        gram: Tensor,
        indices: tuple[str, ...],
        batch: tuple[str, ...],
        bonds: tuple[str, ...],
    ) -> Tensor:
        """``[several, params, *indices]`` times the damped inverses of ``[params or 1, *batch, bonds, bonds]``."""
        order = [*batch, *bonds, *(i for i in indices if i not in batch and i not in bonds)]
        moved = stack.permute(0, 1, *(2 + indices.index(i) for i in order))
        flat = moved.reshape(*moved.shape[: 2 + len(batch)], gram.shape[-1], -1)
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        size = torch.where(mean > 0, mean, 1.0) if self.invariant else torch.ones_like(mean)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        damped = torch.stack([gram + damping * size * eye for damping in dampings])
        solved, info = torch.linalg.solve_ex(damped, flat)
        if bool((info != 0).any()) or not bool(solved.isfinite().all()):
            solved = torch.linalg.pinv(damped, hermitian=True) @ flat
        return solved.reshape(moved.shape).permute(0, 1, *(2 + order.index(i) for i in indices))


class _Overlap:
    """For steps of some factors, the gradients of others with respect to the change of the update.

    The inner product of the updates of two sets of factors is a closed network, the line times its copy; its mixed
    second derivative takes steps of the copy's factors to gradients of the line's.
    """

    def __init__(self, adapter: _Adapter) -> None:
        wide = torch.promote_types(next(iter(adapter.trained.values())).dtype, torch.float32)
        with torch.enable_grad():
            fixed = {p: a.detach().to(wide) for p, a in adapter.values.items()}
            self.here = {p: fixed[p].clone().requires_grad_() for p in adapter.trained}
            there = {p: fixed[p].clone().requires_grad_() for p in adapter.trained}
            product = inner_product(adapter.groups, {**fixed, **self.here}, {**fixed, **there}, wide)
            slopes = torch.autograd.grad(product * adapter.factor, [*there.values()], create_graph=True)
        self.slopes = dict(zip(there, slopes, strict=True))

    def __call__(
        self, step: Mapping[ParameterSpec, Tensor], others: Iterable[ParameterSpec]
    ) -> dict[ParameterSpec, Tensor]:
        """The gradients of ``others`` for a step of the factors in ``step``."""
        wanted = [*others]
        with torch.enable_grad():
            along = sum((self.slopes[p] * change).sum() for p, change in step.items())
        found = torch.autograd.grad(along, [self.here[p] for p in wanted], retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        return {p: torch.zeros_like(self.here[p]) if g is None else g for p, g in zip(wanted, found, strict=True)}


class _Hooks:
    """Hooks before and after a step of the optimizer."""

    def __init__(self, adapters: list[_Adapter], invariant: bool) -> None:
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
            own = {p: a for p, a in live.items() if self.invariant and "betas" in owner[id(a)]}
            plain = {p: a for p, a in live.items() if p not in own}
            given = {p: a.grad for p, a in plain.items() if a.grad is not None}
            steps, _ = adapter.directions(given)
            for param, array in plain.items():
                self.kept.append((array, array.grad))  # type: ignore[arg-type]
                array.grad = steps[param].to(array.dtype).contiguous()
            if own:
                gradients = {p: a.grad for p, a in own.items() if a.grad is not None}
                self.moves.append(partial(_invariant_step, adapter, own, gradients, optimizer, owner))
                for array in own.values():
                    self.kept.append((array, array.grad))  # type: ignore[arg-type]
                    array.grad = None


@torch.no_grad()
def _invariant_step(
    adapter: _Adapter,
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


def _components(layout: Layout) -> dict[ParameterSpec, int]:
    """A number for every array, equal for those that share a site, directly or through others."""
    leader: dict[ParameterSpec, ParameterSpec] = {param: param for param in layout.parameters}

    def find(param: ParameterSpec) -> ParameterSpec:
        while leader[param] is not param:
            param = leader[param]
        return param

    for site in layout.site_layouts:
        live = [param for param in site.parameters.values() if param.kind == "trainable"]
        first, *others = live or list(site.parameters.values())
        for param in others:
            leader[find(param)] = find(first)
    numbers: dict[ParameterSpec, int] = {}
    return {param: numbers.setdefault(find(param), len(numbers)) for param in layout.parameters}
