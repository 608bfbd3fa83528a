"""Every question of the algebra asked of several families at one budget on one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from math import sqrt
from time import perf_counter
from typing import Any

from tnpeft.comparison.table import MEASURES, Comparison, ComparisonRow
from tnpeft.counting.budgets import BY, budget, refuse_unknown
from tnpeft.counting.cuts import rank_bound
from tnpeft.counting.dof import dof_on
from tnpeft.families import get as family_called
from tnpeft.layout import Layout, layout, stack_sizes
from tnpeft.models.bare import SIZES, bare
from tnpeft.models.cards import Model, Targets, card, sites
from tnpeft.networks import Factorization, Network, NetworkError, Site, network
from tnpeft.networks.sizes import Size, require_network
from tnpeft.planning.planner import plan, whole_tokens
from tnpeft.scaling.gain import squares_on

Member = str | Network | Factorization | tuple[str, str | Network | Factorization]
_BYTES = 4  # of an fp32 element


def compare(
    networks: str | Network | Factorization | Sequence[Member],
    /,
    *,
    model: Model = None,
    parameters: int | str | Factorization | None = None,
    targets: Targets = None,
    tokens: int = 2048,
    sort: str = "parameters",
    by: str = "parameters",
    ratios: Mapping[str, float] | None = None,
    **sizes: Size,
) -> Comparison:
    """Return one table of families and lines, each at the ranks nearest to a budget.

    Args:
        networks: families (``"lora"``; ``"lora:4"`` at that rank), lines, factorizations, or pairs of a name and one.
        model: a name, a folder or a config.json, a configuration, or a card. Without one the sites come from
            the sizes ``out``, ``inp``, ``layer``, ``proj`` (1 if not given) and ``heads``.
        parameters: the budget: a number, or an adapter whose count it is, such as ``"lora:1"``. None takes the ranks
            as they are given.
        targets: the model's projections; by default its q and v.
        tokens: rows of activations that the plans are for.
        sort: the column that rows are sorted by, ascending; ``"-gain"`` descending, ``""`` as given. Rows that lack
            the number come last.
        by: the quantity that the budget limits, "parameters" or "dof" (degrees of freedom).
        ratios: a rank's size relative to the others, as :func:`tnpeft.budget` takes them.
        sizes: bonds to hold, and sizes of stack indices that no model decides.

    Raises:
        NetworkError: a family, the model, a target, a size or a column is unknown. A family that does not fit the
            sites is a row that says so.

    >>> table = compare(["lora", ("mine", "B[layer out k] A[k inp] -> layer out inp")],
    ...                 parameters="lora:1", model="facebook/opt-1.3b", targets=["q_proj"])
    >>> [(row.name, row.parameters, row.macs) for row in table]
    [('lora', 98304, 4096.0), ('mine', 102400, 8192.0)]
    >>> [row.parameters for row in compare(["lora:1", "cp"], out=2048, inp=2048, layer=24, proj=2)]
    [194544, 196608]
    """
    column = sort.removeprefix("-")
    if column and column not in ("name", *MEASURES):
        raise NetworkError(f"unknown column {sort!r}", remedy=f"sort by {', '.join(('name', *MEASURES))}")
    if by not in BY:
        raise NetworkError(f"unknown budget by={by!r}", remedy=f"choose from {', '.join(BY)}")
    members = [*_members(networks)]
    if not members:
        raise NetworkError("nothing to compare", remedy='pass such as ["lora", "cp"]')
    if model is None:
        model, sizes = bare(sizes), {name: size for name, size in sizes.items() if name not in SIZES}
    refuse_unknown([f for _, f in members], sizes, ratios or {}, model)
    its, rows = card(model), whole_tokens(tokens)
    selected = sites(its, targets)
    goal = _goal(parameters, selected, by)
    found = [
        _row(name, f, its, targets, selected, goal, by=by, ratios=ratios or {}, tokens=rows, sizes=sizes)
        for name, f in members
    ]
    if column:
        answered = [row for row in found if getattr(row, column) is not None]
        answered.sort(key=lambda row: getattr(row, column), reverse=sort.startswith("-"))
        found = [*answered, *(row for row in found if getattr(row, column) is None)]
    projs = tuple(dict.fromkeys(site.proj for site in selected))
    return Comparison(tuple(found), its.name, projs, len(selected), rows, goal, by, sort)


def _members(networks: str | Network | Factorization | Sequence[Member]) -> Iterable[tuple[str, Factorization]]:
    """The name and the factorization of everything that is to be compared."""
    listed: Any = [networks] if isinstance(networks, str | Network | Factorization) else networks
    for member in listed:
        name, each = member if isinstance(member, tuple) else ("", member)
        f = factorization(each)
        yield str(name) or f.name, f


def factorization(each: str | Network | Factorization) -> Factorization:
    """Return what a family's name (with a rank, ``"lora:4"``), a line or a network stands for; its bonds start at 1.

    Raises:
        NetworkError: it is none of these.

    >>> factorization("lora:4").ranks, factorization("B[out k] A[k inp] -> out inp").ranks
    ({'r': 4}, {'k': 1})
    """
    if isinstance(each, Factorization):
        return each
    if isinstance(each, Network) or (isinstance(each, str) and ("[" in each or "->" in each)):
        net = network(each) if isinstance(each, str) else each
        return Factorization.of(net, name=str(net), ranks=dict.fromkeys(net.bonds, 1))
    if not isinstance(each, str):
        require_network(each)
    name, colon, rank = str(each).partition(":")
    declare = family_called(name.strip())
    if not colon:
        return declare()
    option = next((p for p in ("rank", "ranks") if p in signature(declare).parameters), None)
    if option is None or not rank.strip().isdecimal():
        problem = f"{name!r} has no rank to choose" if option is None else f"invalid rank {rank!r} in {each!r}"
        raise NetworkError(problem, remedy=f"write {name}" if option is None else f"write such as {name}:8")
    return declare(**{option: int(rank)})


def _goal(parameters: Any, selected: Sequence[Site], by: str) -> int | None:
    """The budget as a number."""
    if isinstance(parameters, str | Factorization | Network):
        found = layout(factorization(parameters), selected)
        return dof_on(found) if by == "dof" else found.count()
    if parameters is None:
        return None
    if isinstance(parameters, bool) or not isinstance(parameters, int) or parameters < 1:
        raise NetworkError(
            f"the budget is {parameters!r}", remedy='pass parameters= a positive whole number, or such as "lora:1"'
        )
    return parameters


def _row(
    name: str,
    f: Factorization,
    model: Model,
    targets: Targets,
    selected: Sequence[Site],
    goal: int | None,
    *,
    by: str,
    ratios: Mapping[str, float],
    tokens: int,
    sizes: Mapping[str, Size],
) -> ComparisonRow:
    """All answers for one family; the problem where it does not fit the sites."""
    line = str(f.network)
    own = {index: size for index, size in sizes.items() if any(index in rule.network.indices for rule in f.lines)}
    stack = stack_sizes(f, own)
    f = f.with_ranks(**{index: size for index, size in own.items() if index not in stack})
    shares = {rank: ratio for rank, ratio in ratios.items() if rank in f.ranks}
    try:
        ranks: Mapping[str, int | str] = f.ranks
        if goal is not None:
            [rung] = budget([f], own, parameters=goal, model=model, targets=targets, ratios=shares, by=by)
            assert rung.nearest is not None  # else the budget has raised
            ranks = rung.nearest.ranks
        f = f.with_ranks(**{rank: size for rank, size in ranks.items() if isinstance(size, int)})
        found = layout(f, selected, stack=stack)
    except NetworkError as error:
        return ComparisonRow(name, line, problem=error.problem)
    problems: list[str] = []

    def asked(question: str, answer: Any) -> Any:
        try:
            return answer()
        except NetworkError as error:
            problems.append(f"{question}: {error.problem}")
            return None

    start = perf_counter()
    macs, saved = asked("plan", lambda: _costs(found, len(selected), tokens)) or (None, None)
    seconds = perf_counter() - start
    return ComparisonRow(
        name,
        str(found.site_layouts[0].line.network),
        dict(ranks),
        found.count(),
        asked("dof", lambda: dof_on(found)),
        asked("rank bound", lambda: max(rank_bound(shape.network, shape.sizes) for shape in found.shapes())),
        asked("gain", lambda: _gain(found)),
        macs,
        saved,
        None if macs is None else seconds,
        "; ".join(problems),
    )


def _costs(found: Layout, count: int, tokens: int) -> tuple[float, float]:
    """Macs, and bytes saved, per token and site; square slices of a site count together."""
    macs = saved = 0
    for shape in found.shapes():
        best = plan(shape.network, shape.sizes, tokens=tokens)
        macs, saved = macs + shape.count * best.macs, saved + shape.count * best.saved
    return macs / (count * tokens), _BYTES * saved / (count * tokens)


def _gain(found: Layout) -> float:
    """The root mean square over the sites."""
    squares = [sum(of.values()) for of in squares_on(found).values()]
    return sqrt(sum(squares) / len(squares))
