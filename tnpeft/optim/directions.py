"""Directions of steps: gradients of factors times the inverse Gram matrices of their environments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from tnpeft.adapters.state import arrays, bank_of
from tnpeft.layout import Layout, ParameterSpec
from tnpeft.networks import REPLICA, NetworkError
from tnpeft.optim.grams import Block, Group, groups, inner_product, linked
from tnpeft.scaling.gain import squares_on

_Arrays = Mapping[ParameterSpec, Tensor]
_EXACT = 1e-5  # damping, relative to the mean eigenvalue, that still inverts in single precision


class Directions:
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
            squares, places = squares_on(self.layout), self.layout.site_layouts
            live = [{p for p in site.parameters.values() if p.kind == "trainable"} for site in places]
            self.component = {
                param: k for k, its in enumerate(linked(live)) for param in its
            }  # of arrays that share sites
            self.gains: dict[int, dict[str, list[float]]] = {}
            self.entries: dict[int, int] = {}
            totals: dict[str, float] = {}
            for site, own in zip(places, live, strict=True):
                component = self.component[next(iter(own))]
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
            for label, blocks in group.environments.items():
                params = [site.parameters[label] for site in group.sites]
                if not any(param in gradients for param in params):
                    continue
                grams = [self.factor * group.gram(block, stacked) for block in blocks]
                if label in group.unit:
                    grams = [self._lengths(group, label, blocks, grams)]
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
                        batches[param] = blocks[0].batch
                    continue
                kept = [k for k, param in enumerate(unique) if param in gradients]
                stack = torch.stack([torch.stack(gradients[unique[k]]) for k in kept], 1).to(dtype)
                for block, gram in zip(blocks, grams, strict=True):
                    chosen = gram if len(gram) == 1 else gram[kept]
                    stack = self._solve(stack, dampings, chosen, unique[0].indices, block.batch, block.bonds)
                for place, k in enumerate(kept):
                    found[unique[k]] = list(stack[:, place])
        outer = {index for group in self.groups for index in group.network.outer}
        for param, gram in sums.items():
            if param in gradients:
                bonds = tuple(i for i in param.indices if i not in outer)
                stack = torch.stack(gradients[param])[:, None].to(gram.dtype)
                solved = self._solve(stack, dampings, gram[None], param.indices, batches[param], bonds)
                found[param] = list(solved[:, 0])
        return found

    def _lengths(self, group: Group, label: str, blocks: tuple[Block, ...], grams: list[Tensor]) -> Tensor:
        """The Gram matrix of a factor that is normalised: over the lengths of its columns on both sides."""
        (gram,), (block,) = grams, blocks
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

    def __init__(self, adapter: Directions) -> None:
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
