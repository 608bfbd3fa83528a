"""Parameter counts: of a line, by factor, of one more rank, on a model; and the memory they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tnpeft.layout import Layout, Shape, layout, stack_sizes
from tnpeft.models.cards import Model, Targets, sites
from tnpeft.networks import Factor, Factorization, Network, NetworkError
from tnpeft.networks.sizes import Size, Sizes, bind, check_size, joined, product, require_network

MIB = 1024 * 1024


def parameters(
    net: Network | Factorization,
    sizes: Sizes | None = None,
    /,
    *,
    frozen: bool = False,
    model: Model = None,
    targets: Targets = None,
    **more: Size,
) -> Any:
    """The number of trainable parameters: an int if all sizes are known, else a sympy expression.

    Args:
        net: a network, or a factorization, whose ranks and splits fill the sizes (without a model: its first line).
        sizes: a mapping that may hold more than the line's indices.
        frozen: count frozen random factors as well. Constants are never counted.
        model: count over the sites of a model: a name, a folder with a config.json, a configuration, or a card.
        targets: the model's projections; by default its q and v.
        more: sizes by name. Only those of the counted factors are needed; an unbound one is a symbol.

    Raises:
        NetworkError: a size is not a positive whole number or symbol, an index is unknown, or a rank is missing on a
            model.

    >>> import tnpeft
    >>> lora = tnpeft.network("B[layer proj out r] A[layer proj r inp] -> layer proj out inp")
    >>> parameters(lora)
    inp*layer*proj*r + layer*out*proj*r
    >>> parameters(lora, r=1, model="facebook/opt-1.3b", targets=["q_proj", "v_proj"])
    196608
    """
    counts = parameters_by_factor(net, sizes, frozen=frozen, model=model, targets=targets, **more)
    total: Size = 0
    for count in counts.values():
        total = total + count
    return total


def parameters_by_factor(
    net: Network | Factorization,
    sizes: Sizes | None = None,
    /,
    *,
    frozen: bool = False,
    model: Model = None,
    targets: Targets = None,
    **more: Size,
) -> dict[str, Any]:
    """The number of parameters of each trainable factor, by label; arguments and errors as :func:`parameters`.

    >>> import tnpeft
    >>> parameters_by_factor(tnpeft.network("B[out r] A[r inp] -> out inp"), r=2, out=8)
    {'B': 16, 'A': 2*inp}
    """
    if model is not None:
        return dict(layout_on(net, sizes, model=model, targets=targets, **more).by_factor(frozen=frozen))
    [alone] = site_shapes(net, sizes, targets=targets, **more)
    network, bound = alone.network, alone.sizes
    counted = counted_factors(network, frozen=frozen)
    return {
        label: product(bound[i] if i in bound else _symbol(i) for i in factor.indices)
        for label, factor in counted.items()
    }


def parameter_step(
    net: Network | Factorization,
    rank: str,
    sizes: Sizes | None = None,
    /,
    *,
    frozen: bool = False,
    model: Model = None,
    targets: Targets = None,
    **more: Size,
) -> Any:
    """The parameters that one more of ``rank`` costs: an int if the other sizes are known, else an expression.

    A factor carries an index once, so the step of a network does not depend on the rank itself. Other arguments and
    errors as :func:`parameters`.

    Raises:
        NetworkError: ``rank`` is not an index of the line, or follows from a rule.

    >>> import tnpeft
    >>> parameter_step(tnpeft.network("B[out r] A[r inp] -> out inp"), "r", out=2048, inp=2048)
    4096
    """
    network = net.network if isinstance(net, Factorization) else net
    require_network(network)
    if isinstance(net, Factorization) and isinstance(net.ranks.get(rank), str):
        raise NetworkError(
            f"the rank {rank!r} follows from the rule {net.ranks[rank]!r}",
            line=str(network),
            remedy="ask for the step of a rank that is a number",
        )
    if rank not in network.indices:
        remedy = f"the indices are {', '.join(network.indices)}"
        raise NetworkError(f"unknown index {rank!r}", line=str(network), remedy=remedy)
    given = joined(sizes, more)
    size = given.get(rank, net.ranks.get(rank, 1) if isinstance(net, Factorization) else 1)

    def count(value: Size) -> Any:
        at = {**more, rank: value}
        return parameters(net, sizes, frozen=frozen, model=model, targets=targets, **at)

    step = count(size + 1) - count(size)
    return step if isinstance(step, int) else step.expand()


def stored_megabytes(parameters: int, bytes_each: int = 4) -> float:
    """The size of so many stored elements in MiB (2**20 bytes); fp32 by default, 2 bytes each for bf16 and fp16.

    >>> stored_megabytes(196608)
    0.75
    """
    return parameters * bytes_each / MIB


def optimizer_megabytes(parameters: int) -> float:
    """The size of Adam's state for so many parameters in MiB (2**20 bytes): two fp32 moments each.

    >>> optimizer_megabytes(196608)
    1.5
    """
    return 2 * stored_megabytes(parameters)


def bound_sizes(
    net: Network | Factorization, sizes: Sizes | None = None, /, **more: Size
) -> tuple[Network, dict[str, Size]]:
    """The network and the sizes of its indices that are known; a factorization fills in its ranks and splits.

    >>> bound_sizes(Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2}), out=4)[1]
    {'out': 4, 'r': 2}
    """
    if isinstance(net, Factorization):
        return net.network, net.bind(sizes, more)
    return net, bind(net, sizes, more)


def counted_factors(net: Network, *, frozen: bool = False) -> dict[str, Factor]:
    """The factors that are counted, by label: the trainable ones, and with ``frozen`` the frozen ones.

    >>> import tnpeft
    >>> [*counted_factors(tnpeft.network("d[r] B[out r] ~A[r inp] -> out inp"))]
    ['d', 'B']
    """
    kinds = ("trainable", "frozen") if frozen else ("trainable",)
    return {net.label(factor): factor for factor in net.factors if factor.kind in kinds}


def layout_on(
    net: Network | Factorization,
    sizes: Sizes | None = None,
    /,
    *,
    model: Model,
    targets: Targets = None,
    **more: Size,
) -> Layout:
    """The layout over a model's sites; ranks, splits and the sizes of other stack indices come by name.

    Raises:
        NetworkError: a rank is missing, or a size is given that the model decides.

    >>> import tnpeft
    >>> vera = tnpeft.network("b[layer proj out] ~B[out r] d[layer proj r] ~A[r inp] -> layer proj out inp")
    >>> layout_on(vera, r=256, model="roberta-base").count()
    24576
    """
    given = joined(sizes, more)
    f = with_sizes(net, given, more)
    return layout(f, sites(model, targets), stack=stack_sizes(f, given))


def site_shapes(
    net: Network | Factorization,
    sizes: Sizes | None = None,
    /,
    *,
    model: Model = None,
    targets: Targets = None,
    **more: Size,
) -> tuple[Shape, ...]:
    """Return the networks and sizes that are asked about: the given ones, or one for each shape of a model's sites.

    Raises:
        NetworkError: targets are given without a model, or a size is unknown, missing or decided by the model.

    >>> lora = Factorization.of("B[layer proj out r] A[layer proj r inp] -> layer proj out inp", ranks={"r": 2})
    >>> [str(shape) for shape in site_shapes(lora, model="meta-llama/Llama-3.2-1B", targets=["q_proj", "v_proj"])]
    ['q_proj 2048 x 2048', 'v_proj 512 x 2048']
    """
    if model is None:
        if targets is not None:
            raise NetworkError("targets are given without a model", remedy="pass model= as well")
        return (Shape(None, *bound_sizes(net, sizes, **more), 1),)
    return layout_on(net, sizes, model=model, targets=targets, **more).shapes()


def with_sizes(net: Network | Factorization, given: Mapping[str, Size], keywords: Sizes) -> Factorization:
    """A factorization with the given bonds as ranks and the given row and column indices as splits.

    Raises:
        NetworkError: a bond of a network has no size, or a keyword is decided by the model or unknown.

    >>> import tnpeft
    >>> with_sizes(tnpeft.network("B[out r] A[r inp] -> out inp"), {"r": 2}, {}).ranks
    {'r': 2}
    """
    nets = [line.network for line in net.lines] if isinstance(net, Factorization) else [net]
    require_network(nets[0])
    bonds = {bond for its in nets for bond in its.bonds}
    grouped = {i for its in nets for group in (its.rows, its.cols) if len(group) > 1 for i in group}
    stacks = {index for its in nets for index in its.stack} - {"layer", "proj", "expert"}
    for name in keywords:
        if name not in bonds | grouped | stacks | {"task", "replica"}:
            known = name in nets[0].indices
            raise NetworkError(
                f"the size of {name!r} comes from the model" if known else f"unknown index {name!r}",
                line=str(nets[0]),
                remedy="leave it out" if known else f"the indices are {', '.join(nets[0].indices)}",
            )
    ranks = {bond: check_size(bond, given[bond], str(nets[0])) for bond in sorted(bonds) if bond in given}
    splits = {
        side: tuple(given.get(i) for i in group)
        for side, group in (("out", nets[0].rows), ("inp", nets[0].cols))
        if any(i in given and i in grouped for i in group)
    }
    if isinstance(net, Factorization):
        return replace(net, ranks={**net.ranks, **ranks}, splits={**net.splits, **splits})
    missing = [bond for bond in net.bonds if bond not in ranks]
    if missing:
        raise NetworkError(
            f"no rank for the bond {', '.join(map(repr, missing))}",
            line=str(net),
            remedy=f"pass {', '.join(f'{bond}=...' for bond in missing)}",
        )
    return Factorization.of(net, ranks=ranks, splits=splits)


def _symbol(name: str) -> Any:
    from sympy import Symbol

    return Symbol(name)
