"""Which sizes a family offers: its ranks nearest to a parameter budget, and the budgets it can meet at all."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, prod
from numbers import Integral

from tnpeft._text import Printed, Table
from tnpeft.counting.cuts import RankWarning, bond_cuts, clipped_ranks
from tnpeft.counting.dof import dof, dof_on
from tnpeft.counting.parameters import parameters as count_parameters
from tnpeft.counting.parameters import with_sizes
from tnpeft.families.catalogue import factorization
from tnpeft.layout import layout, stack_sizes
from tnpeft.models.cards import Model, Targets, sites
from tnpeft.networks import Factorization, Network, NetworkError, Site
from tnpeft.networks.sizes import Size, Sizes, integers, joined

BY = ("parameters", "dof")
LONGEST = 64  # rungs of a ladder that are listed
_UNLIMITED = 1 << 40  # a rank beyond every cut, to find the cut


@dataclass(frozen=True)
class Rung:
    """One size of a family: its free ranks and its count, of parameters or of degrees of freedom.

    >>> print(Rung({"r": 21}, 194544))
    194,544 (r=21)
    """

    ranks: Mapping[str, int]
    count: int

    def __str__(self) -> str:
        ranks = ", ".join(f"{rank}={size}" for rank, size in self.ranks.items())
        return f"{self.count:,} ({ranks or 'no free rank'})"


@dataclass(frozen=True)
class BudgetRow:
    """The counts that a family can reach at a budget.

    ``nearest`` is the size closest to it (the smaller one of two), ``below`` the largest that stays within it, None
    if there is none; ``ladder`` all sizes from rank 1 on to the first above the budget, at most 64. A family that
    does not fit the sites has none of these but the ``problem``.

    >>> row = budget(["cp"], parameters=196608, model="facebook/opt-1.3b")[0]
    >>> row.family, row.nearest.ranks, row.below.count, [rung.count for rung in row.ladder[:3]]
    ('cp', {'r': 21}, 194544, [9264, 18528, 27792])
    """

    family: str
    nearest: Rung | None
    below: Rung | None
    ladder: tuple[Rung, ...]
    problem: str = ""


@dataclass(frozen=True)
class Budget(Printed):
    """Rows by family for a budget of so many parameters, or degrees of freedom; prints as a table.

    >>> print(budget(["lora", "cp"], parameters=200_000, model="facebook/opt-1.3b"))
    budget 200,000
    family  nearest         below           ladder
    lora    196,608 (r=1)   196,608 (r=1)   196,608  393,216
    cp      203,808 (r=22)  194,544 (r=21)  9,264  18,528  27,792  ...  203,808
    """

    parameters: int
    rows: tuple[BudgetRow, ...]
    by: str = "parameters"

    def __iter__(self) -> Iterator[BudgetRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> BudgetRow:
        return self.rows[place]

    def _parts(self) -> tuple[str, Table]:
        rows = (
            (row.family, str(row.nearest or "none"), str(row.below or "none"), row.problem or _steps(row.ladder))
            for row in self.rows
        )
        title = f"budget {self.parameters:,}{' degrees of freedom' * (self.by == 'dof')}"
        return title, Table(("family", "nearest", "below", "ladder"), tuple(rows))


def budget(
    families: str | Network | Factorization | Sequence[str | Network | Factorization],
    sizes: Sizes | None = None,
    /,
    *,
    parameters: int | Factorization,
    model: Model = None,
    targets: Targets = None,
    ratios: Mapping[str, float] | None = None,
    by: str = "parameters",
    **more: Size,
) -> Budget:
    """For each family the ranks nearest to, and the largest within, a number of trainable parameters.

    The whole numbers among a family's ranks are free, unless nothing trainable carries them; rules are not. All
    free ranks share one number, times their ratio, and each is capped at what its cut allows: small modes come to
    their full size and the large ones go on. The search halves intervals, so it is exact where the count grows with
    the rank; a rule may break that, and the best size seen is given then.

    Args:
        families: names, lines (text or networks), factorizations, or a mix; one alone will do.
        sizes: without a model: ``out``, ``inp``, ``layer``, ``proj``, ``heads``, or the line's own indices.
        parameters: the budget, or another adapter whose count is the budget.
        model: count over the sites of a model, as :func:`tnpeft.parameters` does.
        targets: the model's projections.
        ratios: a rank's size relative to the others, 1 if not named.
        by: the quantity that the budget limits, "parameters" or "dof" (degrees of freedom).
        more: sizes by name. A bond whose size is given is held there.

    Raises:
        NetworkError: a family, a size or a ratio's rank is unknown, a size is missing, or no family fits the sites.

    >>> row = budget("lora", parameters=10_000, out=768, inp=768, layer=1, proj=1)[0]
    >>> row.nearest.ranks, row.below.count, len(row.ladder)
    ({'r': 7}, 9216, 7)
    """
    listed = [families] if isinstance(families, str | Network | Factorization) else families
    chosen = [factorization(each) for each in listed]
    given = joined(sizes, more)
    refuse_unknown(chosen, given, ratios or {}, model)
    if by not in BY:
        raise NetworkError(f"unknown budget by={by!r}", remedy=f"choose from {', '.join(BY)}")
    on = _Ground(None if model is None else sites(model, targets), given, by)
    goal = on.count(parameters) if isinstance(parameters, Factorization) else parameters
    if not isinstance(goal, Integral) or goal < 1:
        raise NetworkError(f"the budget is {goal!r}", remedy="pass parameters= a positive whole number")
    rows = [_row_or_problem(f, int(goal), on, ratios or {}) for f in chosen]
    refused = [row for row in rows if isinstance(row, NetworkError)]
    if len(refused) == len(rows):
        raise refused[0]
    return Budget(
        int(goal),
        tuple(
            BudgetRow(f.name, None, None, (), row.problem) if isinstance(row, NetworkError) else row
            for f, row in zip(chosen, rows, strict=True)
        ),
        by,
    )


def nearest_ranks(
    declare: Callable[[int], Factorization],
    goals: Iterable[int],
    *,
    model: Model,
    targets: Targets = None,
    by: str = "parameters",
    largest: int = 4096,
) -> Iterator[tuple[int, Factorization]]:
    """Yield for each goal the rank nearest to it and its factorization on a model, without repeats.

    Where that comes nearer, the first bonds that grow with the rank have those of the next rank; no bond is larger
    than what it carries at all sites. The count is taken to grow with the rank, up to ``largest``.

    >>> from tnpeft import families
    >>> [rank for rank, _ in nearest_ranks(families.lora, [4096 * 48, 400_000], model="facebook/opt-1.3b")]
    [1, 2]
    >>> tensor = lambda rank: families.tenslora("qkv_depth", ranks=rank)
    >>> rank, f = next(nearest_ranks(tensor, [15_000], model="facebook/opt-125m"))
    >>> rank, f.ranks
    (8, {'a': 9, 'b': 9, 'c': 2, 'd': 8})
    """
    on = _Ground(sites(model, targets), {}, by)

    @cache
    def at(rank: int, raised: int) -> Factorization:
        f, higher = declare(rank), declare(rank + 1).ranks
        varied = [bond for bond in f.ranks if f.ranks[bond] != higher[bond]][:raised]
        return _capped(f.with_ranks(**{bond: higher[bond] for bond in varied}), on)

    @cache
    def count(rank: int, raised: int = 0) -> int:
        return on.count(at(rank, raised))

    seen = []
    for goal in goals:
        high = 2
        while count(high) <= goal and high < largest:
            high *= 2
        low = max(1, bisect_right(range(1, high), goal, key=count))
        choices = [(low, raised) for raised in range(len(at(low, 0).ranks))] + [(low + 1, 0)]
        best = min(choices, key=lambda its: (abs(count(*its) - goal), its))
        if at(*best).ranks not in seen:
            seen.append(at(*best).ranks)
            yield best[0], at(*best)


def refuse_unknown(
    chosen: Sequence[Factorization], given: Mapping[str, Size], ratios: Mapping[str, float], model: Model
) -> None:
    """Raise at a size or a ratio that no family uses or that is unfit, and at a size that the model decides.

    Raises:
        NetworkError: there is one.

    >>> refuse_unknown([Factorization.of("A[out inp] -> out inp")], {"out": 8, "inp": 8}, {}, None)
    """
    ranks = {rank for f in chosen for rank in f.ranks}
    for rank, ratio in ratios.items():
        if rank not in ranks:
            raise NetworkError(f"no family has the rank {rank!r}", remedy=f"the ranks are {', '.join(sorted(ranks))}")
        if not isinstance(ratio, int | float) or not 0 < ratio < inf:
            raise NetworkError(f"the ratio of {rank!r} is {ratio!r}", remedy="pass a positive number")
    nets = [rule.network for f in chosen for rule in f.lines]
    known = {index for net in nets for index in net.indices}
    for name in given:
        if name not in known | {"task", "replica"} | (
            set() if model is not None else {"out", "inp", "heads", "layer", "proj", "expert"}
        ):
            remedy = f"the indices are {', '.join(sorted(known))}"
            raise NetworkError(f"unknown index {name!r}: no family has it", remedy=remedy)
        if model is not None and name in ("layer", "proj", "expert", "out", "inp"):
            raise NetworkError(f"the size of {name!r} comes from the model", remedy="leave it out")


def capped(f: Factorization, *, model: Model, targets: Targets = None) -> Factorization:
    """The factorization with no numbered rank larger than what its bond carries at all sites.

    Of bonds between the same factors it is a choice which one to lower: they stay as they are.

    >>> from tnpeft import families
    >>> capped(families.tucker((8, 8, 8), modes=["proj"], stack=["layer", "proj"]), model="facebook/opt-125m").ranks
    {'a': 8, 'b': 8, 'c': 2}
    """
    return _capped(f, _Ground(sites(model, targets), {}, "parameters"))


def _capped(f: Factorization, on: _Ground) -> Factorization:
    for _ in range(len(f.ranks) + 1):  # a smaller bond may lower the cuts of others
        cuts = {name: cut for net, sizes in on.placed(f) for name, cut in clipped_ranks(net, sizes).items()}
        lowered = {name: cut for name, cut in cuts.items() if " " not in name}
        if not lowered:
            break
        f = f.with_ranks(**lowered)
    return f


def _row_or_problem(
    f: Factorization, goal: int, on: _Ground, ratios: Mapping[str, float]
) -> BudgetRow | NetworkError:
    held = {name: size for name, size in on.given.items() if any(name in rule.network.indices for rule in f.lines)}
    try:
        return _row(with_sizes(f, held, {}), goal, on, ratios)
    except NetworkError as error:
        return error


@dataclass(frozen=True)
class _Ground:
    """The place of the count: sites of a model, or given sizes."""

    sites: tuple[Site, ...] | None
    given: Mapping[str, Size]
    by: str

    def count(self, f: Factorization) -> int:
        if self.sites is not None:
            found = layout(f, self.sites, stack=stack_sizes(f, self.given))
            return dof_on(found) if self.by == "dof" else found.count()
        [(net, sizes)] = self.placed(f)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RankWarning)
            return int(dof(net, sizes) if self.by == "dof" else count_parameters(net, sizes))

    def placed(self, f: Factorization) -> list[tuple[Network, dict[str, int]]]:
        """The networks in use with their sizes, one for each shape of sites."""
        if self.sites is None:
            return [(f.network, integers(f.network, f.bind(self.given, {})))]
        seen = {
            (p.line.network, tuple(p.sizes.items()))
            for p in layout(f, self.sites, stack=stack_sizes(f, self.given)).site_layouts
        }
        return [(net, dict(sizes)) for net, sizes in seen]


def _row(f: Factorization, goal: int, on: _Ground, ratios: Mapping[str, float]) -> BudgetRow:
    caps = _caps(f, on)
    share = {rank: ratios.get(rank, 1) for rank in caps}
    top = max((-int(-cap // share[rank]) for rank, cap in caps.items()), default=1)
    seen: dict[int, Rung] = {}

    def rung(step: int) -> Rung:
        if step not in seen:
            ranks = {rank: min(cap, max(1, int(step * share[rank]))) for rank, cap in caps.items()}
            seen[step] = Rung(ranks, on.count(f.with_ranks(**ranks)))
        return seen[step]

    _search(lambda step: rung(step).count <= goal, top)
    ladder = _ladder(rung, top, goal)
    found = sorted(seen.values(), key=lambda its: its.count)
    nearest = min(found, key=lambda its: (abs(its.count - goal), its.count))
    below = [its for its in found if its.count <= goal]
    return BudgetRow(f.name, nearest, below[-1] if below else None, ladder)


def _search(within: Callable[[int], bool], top: int) -> None:
    """Evaluate both sides of every place between powers of two where the count crosses the budget."""
    grid = [1 << k for k in range(top.bit_length())]
    for low, high in zip(grid, [*grid[1:], top], strict=True):
        side = within(low)
        if within(high) != side:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if within(middle) == side else (low, middle)


def _ladder(rung: Callable[[int], Rung], top: int, goal: int) -> tuple[Rung, ...]:
    steps = [rung(1)]
    for step in range(2, top + 1):
        last, here = steps[-1].count, rung(step)
        if len(steps) == LONGEST or goal < last < here.count:
            break
        if here.count != last:
            steps.append(here)
    return tuple(steps)


def _caps(f: Factorization, on: _Ground) -> dict[str, int]:
    """The largest useful size of every free rank at all sites, the other free ranks taken as unlimited."""
    carried = {
        index
        for line in f.lines
        for factor in line.network.factors
        if factor.kind == "trainable"
        for index in factor.indices
    }
    free = [
        rank for rank, size in f.ranks.items() if isinstance(size, int) and rank in carried and rank not in on.given
    ]
    caps: dict[str, int] = {}
    for net, sizes in on.placed(f.with_ranks(**dict.fromkeys(free, _UNLIMITED))):
        dense = prod(sizes[index] for index in net.outer)
        sizes |= {bond: dense + 1 for bond in free if bond in net.bonds}
        for name, cut in bond_cuts(net, sizes, lambda leg: dense).items():  # noqa: B023
            together = name.split()
            wide = [bond for bond in together if bond in free]
            narrow = prod(sizes[bond] for bond in together if bond not in free)
            for bond in wide:
                cap = _root(max(1, cut // narrow), len(wide))
                caps[bond] = min(cap, caps.get(bond, cap))
    return {rank: caps[rank] for rank in free if rank in caps}


def _root(value: int, degree: int) -> int:
    """The largest whole number whose power of ``degree`` is at most ``value``."""
    low, high = 1, value + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle)
    return low


def _steps(ladder: tuple[Rung, ...]) -> str:
    counts = [f"{its.count:,}" for its in ladder]
    return "  ".join(counts if len(counts) < 6 else [*counts[:3], "...", counts[-1]])
