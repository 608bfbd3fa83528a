"""Every question of the algebra asked of several families at one budget on one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from time import perf_counter
from typing import Any

from tnpeft.comparison.table import MEASURES, Comparison, ComparisonRow
from tnpeft.counting.budgets import BY, budget, refuse_unknown
from tnpeft.counting.cuts import rank_bound
from tnpeft.counting.dof import dof_on
from tnpeft.families.catalogue import factorization
from tnpeft.layout import Layout, layout, stack_sizes
from tnpeft.models.bare import SIZES, bare
from tnpeft.models.cards import Model, Targets, card, sites
from tnpeft.networks import Factorization, Network, NetworkError
from tnpeft.networks.sizes import Size
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
    listed: Any = [networks] if isinstance(networks, str | Network | Factorization) else networks
    named = (member if isinstance(member, tuple) else ("", member) for member in listed)
    members = [(str(name) or f.name, f) for name, f in ((name, factorization(each)) for name, each in named)]
    if not members:
        raise NetworkError("nothing to compare", remedy='pass such as ["lora", "cp"]')
    if model is None:
        model, sizes = bare(sizes), {name: size for name, size in sizes.items() if name not in SIZES}
    refuse_unknown([f for _, f in members], sizes, ratios or {}, model)
    its, rows = card(model), whole_tokens(tokens)
    selected = sites(its, targets)
    goal: Any = parameters
    if isinstance(parameters, str | Factorization | Network):
        counted = layout(factorization(parameters), selected)
        goal = dof_on(counted) if by == "dof" else counted.count()
    if goal is not None and (isinstance(goal, bool) or not isinstance(goal, int) or goal < 1):
        remedy = 'pass parameters= a positive whole number, or such as "lora:1"'
        raise NetworkError(f"the budget is {goal!r}", remedy=remedy)

    def row(name: str, f: Factorization) -> ComparisonRow:
        line = str(f.network)
        own = {index: size for index, size in sizes.items() if any(index in rule.network.indices for rule in f.lines)}
        stack = stack_sizes(f, own)
        f = f.with_ranks(**{index: size for index, size in own.items() if index not in stack})
        try:
            ranks: Mapping[str, int | str] = f.ranks
            if goal is not None:
                shares = {rank: ratio for rank, ratio in (ratios or {}).items() if rank in f.ranks}
                [rung] = budget([f], own, parameters=goal, model=its, targets=targets, ratios=shares, by=by)
                assert rung.nearest is not None  # else the budget has raised
                ranks = rung.nearest.ranks
            f = f.with_ranks(**{rank: size for rank, size in ranks.items() if isinstance(size, int)})
            found = layout(f, selected, stack=stack)
        except NetworkError as error:
            return ComparisonRow(name, line, problem=error.problem)
        return _answers(name, dict(ranks), found, len(selected) * rows, rows)

    found = [row(name, f) for name, f in members]
    if column:
        answered = [row for row in found if getattr(row, column) is not None]
        answered.sort(key=lambda row: getattr(row, column), reverse=sort.startswith("-"))
        found = [*answered, *(row for row in found if getattr(row, column) is None)]
    projs = tuple(dict.fromkeys(site.proj for site in selected))
    return Comparison(tuple(found), its.name, projs, len(selected), rows, goal, by, sort)


def _answers(name: str, ranks: dict[str, int | str], found: Layout, passes: int, tokens: int) -> ComparisonRow:
    """All answers for one family on its sites; a question without an answer has its problem."""
    shapes, problems = found.shapes(), list[str]()

    def asked(question: str, answer: Any) -> Any:
        try:
            return answer()
        except NetworkError as error:
            problems.append(f"{question}: {error.problem}")
            return None

    def costs(quantity: str) -> float:
        """Per token and site (of which there are so many ``passes``); square slices of a site count together."""
        plans = ((shape.count, plan(shape.network, shape.sizes, tokens=tokens)) for shape in shapes)
        return float(sum(many * getattr(best, quantity) for many, best in plans) / passes)

    def gain() -> float:
        """The root mean square over the sites."""
        squares = [sum(of.values()) for of in squares_on(found).values()]
        return sqrt(sum(squares) / len(squares))

    start = perf_counter()
    macs = asked("plan", lambda: costs("macs"))
    seconds = perf_counter() - start
    return ComparisonRow(
        name,
        str(found.site_layouts[0].line.network),
        ranks,
        found.count(),
        asked("dof", lambda: dof_on(found)),
        asked("rank bound", lambda: max(rank_bound(shape.network, shape.sizes) for shape in shapes)),
        asked("gain", gain),
        macs,
        None if macs is None else _BYTES * costs("saved"),
        None if macs is None else seconds,
        "; ".join(problems),
    )
