"""Another gauge for the same update: equal Gram matrices on both sides of every bond, equal norms elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tnpeft.adapters.state import arrays, bank_of, refresh
from tnpeft.layout import Layout, ParameterSpec
from tnpeft.networks import Factor, Network, NetworkError, Term
from tnpeft.optim.grams import Group, groups, linked, products


def rebalance(model: nn.Module, adapter: str = "default") -> None:
    """Equalise the Gram matrices on the two sides of each bond, and leave the update as it is.

    A bond of two trained factors that splits its term in two, as in chains and trees, gets the gauge in which both
    halves have the same diagonal Gram matrix: the least condition number (for LoRA, arXiv 2605.31484). A bond whose
    Gram matrices are singular, as at a zero start, is left alone. At every other bond, such as the hyper-index of
    CP, the trained factors are rescaled, for each of its values, to equal norms. Factors of ``unit_norm`` and factors
    that stand twice are left alone. Moments of an optimizer belong to the old gauge: make a new optimizer afterwards.

    Raises:
        NetworkError: the model has no such adapter, or it is merged.

    >>> import peft, tnpeft
    >>> fields = {"ranks": {"r": 2}, "init": {"B": "normal"}}
    >>> config = tnpeft.TensorNetworkConfig(network="lora", target_modules=["0"], **fields)
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> rebalance(model)
    >>> B, A = (value[0, 0] for value in tnpeft.factors(model).values())
    >>> bool(torch.allclose(B.T @ B, A @ A.T, atol=1e-5))
    True
    """
    bank = bank_of(model, adapter)
    if bank.merged:
        raise NetworkError("a merged adapter cannot be changed", remedy="call unmerge_adapter() first")
    layout = bank.layouts[adapter]
    held = arrays(model, bank, adapter)
    new = {p: a.detach().to(torch.promote_types(a.dtype, torch.float64)) for p, a in held.items()}
    parts = groups(layout)
    for net in dict.fromkeys(site.network for site in layout.site_layouts):
        for bond in net.bonds:
            _balance(layout, [group for group in parts if group.network == net], net, bond, new)
    with torch.no_grad():
        for param, array in held.items():
            if param.kind == "trainable":
                array.copy_(new[param])
    refresh(model)


def _balance(
    layout: Layout, parts: Sequence[Group], net: Network, bond: str, new: dict[ParameterSpec, Tensor]
) -> None:
    """Change the gauge of one bond, in the arrays themselves."""
    terms = [term for term in net.terms if bond in term.places()]
    names = [factor.name for factor in net.uses()]
    free = [
        factor
        for factor in terms[0].factors
        if bond in factor.indices
        and factor.kind == "trainable"
        and names.count(factor.name) == 1
        and factor.name not in layout.factorization.unit_norm
    ]
    ends = [factor for factor in terms[0].factors if bond in factor.indices]
    labels = {factor.name for factor in free}
    others = (p for site in layout.site_layouts if site.network != net for p in site.parameters.values())
    places = [{*site.parameters.values()} for site in layout.site_layouts if site.network == net]
    held = {param for param in layout.parameters if param.label in labels}
    if len(terms) > 1 or len(free) < 2 or not held.isdisjoint(others):
        return
    halves = _halves(terms[0], free, bond) if len(free) == len(ends) == 2 else None
    for members in linked(place & held for place in places):
        own = [{p for p in members if p.label == factor.name} for factor in free]
        if halves is None:
            _rescale(own, bond, new)
            continue
        here = []
        for part in parts:
            if sites := tuple(site for site in part.sites if members & {*site.parameters.values()}):
                here.append(Group(sites, part.unit, part.joint))
        _equalise(here, own, halves, bond, new)


def _halves(term: Term, ends: Sequence[Factor], bond: str) -> tuple[list[Factor], list[Factor]] | None:
    """The factors on each side of a bond, or None where the sides hang together without it."""
    left, right = ends[:1], [factor for factor in term.factors if factor is not ends[0]]
    outer = {i for f in term.factors for i in f.indices} - {i for i, n in term.places().items() if n > 1}
    grown = True
    while grown:
        reach = {i for f in left for i in f.indices} - {bond} - outer
        near = [f for f in right if reach & set(f.indices)]
        left, right, grown = left + near, [f for f in right if f not in near], bool(near)
    return (left, right) if ends[1] in right else None


def _rescale(own: Sequence[set[ParameterSpec]], bond: str, new: dict[ParameterSpec, Tensor]) -> None:
    """Give the factors of a bond equal norms for each of its values, their product kept."""
    norms = []
    for params in own:
        rows = [new[p].movedim(p.indices.index(bond), 0) for p in params]
        squares = [array.reshape(len(array), -1).square().mean(1) for array in rows]
        norms.append(torch.stack(squares).mean(0).sqrt())
    logs = torch.stack(norms)
    if bool((logs == 0).any()):
        return
    change = (logs.log().mean(0) - logs.log()).exp()
    for params, by in zip(own, change, strict=True):
        for p in params:
            axis = p.indices.index(bond)
            new[p] = new[p] * by.reshape([-1 if k == axis else 1 for k in range(len(p.indices))])


def _equalise(
    parts: Sequence[Group],
    own: Sequence[set[ParameterSpec]],
    halves: tuple[list[Factor], list[Factor]],
    bond: str,
    new: dict[ParameterSpec, Tensor],
) -> None:
    """Give both halves one diagonal Gram matrix, summed over the sites of the arrays."""
    grams = []
    for half in halves:
        each = ((part, products(part.network, half, (bond,), part.varying)) for part in parts)
        grams.append(sum(part.gram(block, part.stacked(new, torch.float64)).sum(0) for part, block in each))
    left, right = grams
    low = torch.finfo(left.dtype).eps * 1e3
    values, vectors = torch.linalg.eigh(left)
    if not float(values[0]) > low * float(values[-1]):
        return
    root, inverse = vectors * values.sqrt(), vectors / values.sqrt()  # left = root root^T
    squares, turn = torch.linalg.eigh(root.T @ right @ root)
    if not float(squares[0]) > low * float(squares[-1]):
        return
    sides = (inverse @ turn * squares**0.25, root @ turn / squares**0.25)
    for params, matrix in zip(own, sides, strict=True):
        for p in params:
            axis = p.indices.index(bond)
            new[p] = torch.tensordot(new[p], matrix, ([axis], [0])).movedim(-1, axis)
