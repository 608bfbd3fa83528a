"""Gram matrices of environments: the network without one factor, times its copy, outer indices traced.

The sites of one line and one shape are one contraction: factors that differ from site to site are stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import prod

import torch
from torch import Tensor

from tnpeft.layout import Layout, ParameterSpec, SiteLayout
from tnpeft.networks import Factor, Network, Term
from tnpeft.nn.dense import evaluator
from tnpeft.planning.planner import planned

SITE, COPY = "site__", "__copy"

Values = Mapping[ParameterSpec, Tensor]


@dataclass(frozen=True)
class Block:
    """A part of an environment that shares no index with the rest: its Gram matrix is a Kronecker factor.

    ``batch`` are outer indices of the factor that the part carries, ``bonds`` the factor's bonds that it closes,
    ``averaged`` outer indices that some terms carry and others do not; ``repeated`` says that the part is the same at
    all sites of the group, over which it is summed.
    """

    networks: tuple[Network, ...]
    batch: tuple[str, ...]
    bonds: tuple[str, ...]
    by_site: bool
    averaged: tuple[str, ...] = ()
    repeated: bool = False


@dataclass(frozen=True)
class Group:
    """Sites of one line and one shape, their environments, and which factors differ from site to site."""

    sites: tuple[SiteLayout, ...]
    unit: Mapping[str, tuple[int, ...]]
    joint: frozenset[str]
    _plans: dict[Network, Callable[[Mapping[str, Tensor]], Tensor]] = field(default_factory=dict, repr=False)

    @property
    def network(self) -> Network:
        """The network of one site."""
        return self.sites[0].network

    @cached_property
    def varying(self) -> frozenset[str]:
        """Labels of the factors that are not one array at all sites."""
        labels = self.sites[0].parameters
        return frozenset(k for k in labels if len({site.parameters[k] for site in self.sites}) > 1)

    @cached_property
    def environments(self) -> dict[str, tuple[Block, ...]]:
        """The environment of every trained factor in blocks, by label; of a joint one in one block."""
        net = self.network
        labels = [net.label(factor) for factor in net.factors if factor.kind == "trainable"]
        return {label: _blocks(net, label, self.varying, label in self.joint) for label in labels}

    @cached_property
    def closed(self) -> tuple[tuple[Network, tuple[str, ...]], ...]:
        """Every term times every term of a copy, all indices summed, and the outer indices that neither carries."""
        found = []
        for left, right in product(self.network.terms, repeat=2):
            factors = tuple(_at(self, f, end) for end, term in (("", left), (COPY, right)) for f in term.factors)
            net = Network((Term(factors, left.sign * right.sign),), ())
            found.append((net, tuple(i for i in (SITE, *self.network.outer) if i not in net.indices)))
        return tuple(found)

    def stacked(self, values: Values, dtype: torch.dtype) -> dict[str, Tensor]:
        """The arrays as the forward pass has them, those that vary stacked over the sites."""
        found = {}
        for label in self.sites[0].parameters:
            params = [site.parameters[label] for site in self.sites]
            each = [values[param].to(dtype) for param in (params if label in self.varying else params[:1])]
            array = torch.stack(each) if label in self.varying else each[0]
            if axes := self.unit.get(label, ()):
                shift = label in self.varying
                length = torch.linalg.vector_norm(array, dim=[a + shift for a in axes], keepdim=True)
                array = array / length.clamp_min(torch.finfo(dtype).tiny)
            found[label] = array
        return found

    def gram(self, block: Block, arrays: Mapping[str, Tensor]) -> Tensor:
        """The Gram matrix of a block: ``[sites or 1, *batch, bonds, bonds]``."""
        sizes = {**self.sites[0].sizes, SITE: len(self.sites)}
        total: Tensor | None = None
        for net in block.networks:
            value = self.run(net, arrays, sizes) / prod(sizes[i] for i in block.averaged if i in net.indices)
            total = value if total is None else total + value
        n = prod(sizes[i] for i in block.bonds)
        assert total is not None
        total = total * len(self.sites) if block.repeated else total
        return total.reshape(len(self.sites) if block.by_site else 1, *(sizes[i] for i in block.batch), n, n)

    def run(self, net: Network, arrays: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
        """Contract a network of factors and copies of factors."""
        if net not in self._plans:
            dims = tuple((i, sizes[i.removesuffix(COPY)]) for i in net.indices)
            plan = planned(net, dims, None, "time", False)
            names = [factor.name for factor in net.factors]
            value = evaluator(plan)
            self._plans[net] = lambda given: value({name: given[_original(name)] for name in names})
        if net.terms[0].factors == (_ONE,):
            return next(iter(arrays.values())).new_ones(())
        return self._plans[net](arrays)


_ONE = Factor("one__", ())


def groups(layout: Layout) -> tuple[Group, ...]:
    """Return the sites of a layout in groups of one line and one shape.

    >>> from tnpeft.layout import layout as build
    >>> from tnpeft.networks import Factorization, Site
    >>> f = Factorization.of("B[layer out r] A[r inp] -> layer out inp", ranks={"r": 2})
    >>> (group,) = groups(build(f, [Site(k, "q", 8, 4) for k in (0, 1)]))
    >>> sorted(group.varying), [block.bonds for block in group.environments["A"]]
    (['B'], [('r',)])
    """
    found: dict[object, list[SiteLayout]] = {}
    for site in layout.site_layouts:
        found.setdefault((site.line, tuple(site.sizes.items())), []).append(site)
    uses: dict[ParameterSpec, set[int]] = {}
    for k, members in enumerate(found.values()):
        for site in members:
            for param in site.parameters.values():
                uses.setdefault(param, set()).add(k)
    joint = frozenset(param.label for param, where in uses.items() if len(where) > 1)
    unit = layout.factorization.unit_norm
    return tuple(Group(tuple(members), _columns(members[0], unit), joint) for members in found.values())


def linked(sets: Iterable[set[ParameterSpec]]) -> list[set[ParameterSpec]]:
    """Return the unions of sets that share arrays, directly or through others."""
    found: list[set[ParameterSpec]] = []
    for its in sets:
        near = [other for other in found if other & its]
        found = [other for other in found if not other & its] + [its.union(*near)]
    return found


def inner_product(parts: Iterable[Group], one: Values, other: Values, dtype: torch.dtype) -> Tensor:
    """Return the inner product of the updates of two sets of factors, summed over all sites: no update is formed.

    >>> from tnpeft.layout import layout
    >>> from tnpeft.networks import Factorization, Site
    >>> its = layout(Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 1}), [Site(0, "q", 2, 3)])
    >>> values = {param: torch.ones(param.shape) for param in its.parameters}
    >>> float(inner_product(groups(its), values, values, torch.float32))
    6.0
    """
    total = next(iter(one.values())).new_zeros((), dtype=dtype)
    for group in parts:
        twins = {label + COPY: array for label, array in group.stacked(other, dtype).items()}
        arrays, sizes = {**group.stacked(one, dtype), **twins}, {**group.sites[0].sizes, SITE: len(group.sites)}
        for net, missing in group.closed:
            total = total + group.run(net, arrays, sizes) * prod(sizes[i] for i in missing)
    return total


def _at(group: Group, factor: Factor, end: str) -> Factor:
    """A factor of the line or of its copy, which share the outer indices."""
    label = group.network.label(factor)
    indices = tuple(i if i in group.network.outer else i + end for i in factor.indices)
    return Factor(label.replace("~", "twin__") + end, (SITE,) * (label in group.varying) + indices, factor.kind)


def products(net: Network, half: Sequence[Factor], bonds: tuple[str, ...], varying: Iterable[str]) -> Block:
    """Return the Gram matrix, over some bonds, of the product of some factors; summed over the sites.

    >>> from tnpeft.networks import network
    >>> net = network("B[out r] A[r inp] -> out inp")
    >>> print(products(net, net.factors[1:], ("r",), ()).networks[0])
    A[r inp] A[r__copy inp] -> r r__copy
    """
    return _block(net, Factor("", bonds), [(half, half, 1)], varying)


def _columns(site: SiteLayout, unit: Sequence[str]) -> dict[str, tuple[int, ...]]:
    features = {*site.network.rows, *site.network.cols}
    return {
        label: tuple(axis for axis, index in enumerate(param.indices) if index in features)
        for label, param in site.parameters.items()
        if label in unit
    }


def _blocks(net: Network, label: str, varying: Iterable[str], joint: bool) -> tuple[Block, ...]:
    """The blocks of a factor's environment; one block where the factor stands twice or in several groups."""
    uses = [
        (term, place) for term in net.terms for place, factor in enumerate(term.factors) if net.label(factor) == label
    ]
    term, place = uses[0]
    own = term.factors[place]
    outer = [i for i in own.indices if i in net.outer]
    rest = [factor for k, factor in enumerate(term.factors) if k != place]
    if len(uses) == 1:
        parts = [rest] if joint else _parts(rest, outer)
        blocks = [_block(net, own, [(part, part, 1)], varying) for part in parts]
        if label in varying:
            return tuple(blocks)
        split = [part for part in parts if any(net.label(f) in varying for f in part)]
        if len(split) > 1:  # a sum over sites of Kronecker products does not factor
            return (_block(net, own, [(rest, rest, 1)], varying),)
        return tuple(blocks) if split or not blocks else (replace(blocks[0], repeated=True), *blocks[1:])
    pairs = []
    for one, k in uses:
        for other, j in uses:
            a, b = one.factors[k], other.factors[j]
            if [i for i in a.indices if i in net.outer] == [i for i in b.indices if i in net.outer]:
                left = [f for n, f in enumerate(one.factors) if n != k]
                right = [f for n, f in enumerate(other.factors) if n != j]
                pairs.append((_named(left, a, own), _named(right, b, own), one.sign * other.sign))
    return (_block(net, own, pairs, varying),)


def _named(rest: Sequence[Factor], use: Factor, own: Factor) -> list[Factor]:
    """The rest of a term with the bonds of this use called as those of the first one."""
    names = dict(zip(use.indices, own.indices, strict=True))
    return [Factor(f.name, tuple(names.get(i, i) for i in f.indices), f.kind) for f in rest]


def _parts(rest: Sequence[Factor], outer: Sequence[str]) -> list[list[Factor]]:
    """The factors in parts whose common indices are all in ``outer``."""
    parts: list[list[Factor]] = []
    for factor in rest:
        linked = [part for part in parts if any(set(f.indices) & set(factor.indices) - set(outer) for f in part)]
        parts = [part for part in parts if part not in linked]
        parts.append([f for part in linked for f in part] + [factor])
    return parts


def _block(
    net: Network, own: Factor, pairs: Sequence[tuple[Sequence[Factor], Sequence[Factor], int]], varying: Iterable[str]
) -> Block:
    sides = [{i for f in (*left, *right) for i in f.indices} for left, right, _ in pairs]
    carried = set.intersection(*sides)
    batch = tuple(i for i in own.indices if i in net.outer and i in carried)
    traced = {i for i in own.indices if i in net.outer and any(i in side for side in sides)} - carried
    if traced:  # some terms are broadcast over an index of others: no cross terms, and the mean over that index
        pairs = [pair for pair in pairs if pair[0] == pair[1]]
    bonds = tuple(i for i in own.indices if i not in net.outer and (i in carried or not pairs[0][0]))
    by_site = (
        any(net.label(f) in varying for left, right, _ in pairs for f in (*left, *right)) and own.name in varying
    )
    networks = []
    for left, right, sign in pairs:
        factors = []
        for side, copied in ((left, False), (right, True)):
            for f in side:
                indices = tuple(i + COPY if copied and i not in net.outer else i for i in f.indices)
                name = f"twin__{f.name}" if net.label(f).startswith("~") else f.name
                factors.append(Factor(name, (*([SITE] if net.label(f) in varying else []), *indices), f.kind))
        opened = [*([SITE] if by_site else []), *batch, *bonds, *(i + COPY for i in bonds)]
        networks.append(Network((Term(tuple(factors) or (_ONE,), sign),), tuple((i,) for i in opened)))
    return Block(tuple(networks), batch, bonds, by_site, tuple(sorted(traced)))


def _original(name: str) -> str:
    return name.replace("twin__", "~", 1)
