"""Another gauge for the same update: equal Gram matrices on both sides of every bond, equal norms elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tnpeft.adapters.state import arrays, bank_of, refresh
from tnpeft.layout import Layout, ParameterSpec
from tnpeft.networks import Factor, Network, NetworkError, Term
from tnpeft.optim.grams import Group, groups, linked, products

_Arrays = dict[ParameterSpec, Tensor]


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
    carriers = sum(bond in factor.indices for factor in terms[0].factors)
    shared = [p for p in layout.parameters if p.label in {f.name for f in free}]
    if len(terms) > 1 or len(free) < 2 or any(_uses(layout, p, net) for p in shared):
        return
    halves = _halves(terms[0], free, bond) if len(free) == carriers == 2 else None
    places = [site.parameters for site in layout.site_layouts if site.network == net]
    for members in linked({place[factor.name] for factor in free} for place in places):
        own = [{p for p in members if p.label == factor.name} for factor in free]
        if halves is None:
            _rescale(free, own, bond, new)
        else:
            _equalise(parts, members, free, own, halves, bond, new)


def _uses(layout: Layout, param: ParameterSpec, net: Network) -> bool:
    """True if a site of another line holds the array."""
    return any(site.network != net for site in layout.site_layouts if param in site.parameters.values())


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


def _rescale(
    ends: Sequence[Factor], own: Sequence[set[ParameterSpec]], bond: str, new: dict[ParameterSpec, Tensor]
) -> None:
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
    members: set[ParameterSpec],
    ends: Sequence[Factor],
    own: Sequence[set[ParameterSpec]],
    halves: tuple[list[Factor], list[Factor]],
    bond: str,
    new: dict[ParameterSpec, Tensor],
) -> None:
    """Give both halves one diagonal Gram matrix."""
    left, right = (sum(_gram(part, members, half, bond, new) for part in parts) for half in halves)
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    low = torch.finfo(left.dtype).eps * 1e3
    values, vectors = torch.linalg.eigh(left)
    if not float(values[0]) > low * float(values[-1]):
        return
    root, inverse = vectors * values.sqrt(), vectors / values.sqrt()  # left = root root^T
    squares, turn = torch.linalg.eigh(root.T @ right @ root)
    if not float(squares[0]) > low * float(squares[-1]):
        return
    sides = (inverse @ turn * squares**0.25, root @ turn / squares**0.25)
    for params, factor, matrix in zip(own, ends, sides, strict=True):
        axis = factor.indices.index(bond)
        for p in params:
            new[p] = torch.tensordot(new[p], matrix, ([axis], [0])).movedim(-1, axis)


def _gram(
    part: Group, members: set[ParameterSpec], half: list[Factor], bond: str, new: Mapping[ParameterSpec, Tensor]
) -> Tensor:
    """The Gram matrix of one half over a bond, summed over the sites of the arrays."""
    sites = tuple(site for site in part.sites if members & set(site.parameters.values()))
    if not sites:
        some = new[next(iter(members))]
        size = part.sites[0].sizes[bond]
        return some.new_zeros(size, size)
    group = Group(sites, part.unit, part.joint)
    block = products(group.network, half, (bond,), group.varying)
    return group.gram(block, group.stacked(new, torch.float64)).sum(0)
