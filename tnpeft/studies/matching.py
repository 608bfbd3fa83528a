"""Sizes at matched budgets: the rank of a family nearest to a number of parameters, or of degrees of freedom."""

from __future__ import annotations

import inspect
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from tnpeft import counting, families
from tnpeft.counting.cuts import RankWarning
from tnpeft.counting.parameters import layout_on
from tnpeft.networks import Factorization
from tnpeft.studies import methods
from tnpeft.studies.files import StudyError

BY = ("parameters", "dof")
Method = Mapping[str, Any]


def matched(
    family: str,
    fixed: Mapping[str, Any],
    budgets: Sequence[int],
    model: Any,
    targets: tuple[str, ...],
    *,
    by: str = "parameters",
    largest: int = 4096,
) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Yield for each budget the rank nearest to it and the bonds of another rank, without repeats.

    A family with several ranks gets one common rank, one more in its first bonds where that comes nearer, and in no
    bond more than it carries between its neighbours. The count grows with the rank, so a bisection finds it.

    Args:
        family: name of the family.
        fixed: arguments that do not vary.
        budgets: numbers of parameters or degrees of freedom.
        model: as :func:`tnpeft.counting.card` takes it.
        targets: projections that get an adapter.
        by: what a budget counts, of ``BY``.
        largest: the rank where the search ends.

    Raises:
        StudyError: the family has no such rank, or cannot be counted so.

    >>> list(matched("lora", {}, [4096 * 48, 400000], "facebook/opt-1.3b", ("q_proj", "v_proj")))
    [({'rank': 1}, {}), ({'rank': 2}, {})]
    >>> next(matched("tenslora", {}, [15_000], "facebook/opt-125m", ("q_proj", "v_proj")))
    ({'ranks': 8}, {'a': 9, 'b': 9, 'c': 2})
    """
    known = inspect.signature(families.get(family)).parameters
    vary = "rank" if "rank" in known else "ranks"
    if vary not in known:
        raise StudyError(f"{family!r} has one size only", remedy="name it without budgets")

    @cache
    def at(rank: int, raised: int) -> Factorization:
        f = methods.factorization({"family": family, "args": {**fixed, vary: rank}})
        higher = methods.factorization({"family": family, "args": {**fixed, vary: rank + 1}})
        varied = [bond for bond in f.ranks if f.ranks[bond] != higher.ranks[bond]][:raised]
        return capped(f.with_ranks(**{bond: higher.ranks[bond] for bond in varied}), model, targets)

    @cache
    def count(rank: int, raised: int = 0) -> int:
        found = (dof if by == "dof" else parameters)(at(rank, raised), model, targets)
        if found is None:
            raise StudyError(
                f"the {by} of {family!r} cannot be counted on {model}", remedy="give a grid, or match by parameters"
            )
        return found

    seen: set[tuple[tuple[str, Any], ...]] = set()
    for budget in budgets:
        low = _below(count, budget, largest)
        choices = [
            (rank, raised) for rank, most in ((low, len(at(low, 0).ranks)), (low + 1, 1)) for raised in range(most)
        ]
        rank, raised = min(choices, key=lambda its: (abs(count(*its) - budget), its))
        ranks = at(rank, raised).ranks
        if (key := tuple(ranks.items())) not in seen:
            seen.add(key)
            wide = methods.factorization({"family": family, "args": {**fixed, vary: rank}}).ranks
            yield {vary: rank}, {n: int(r) for n, r in ranks.items() if r != wide[n]}


def _below(count: Callable[[int], int], budget: int, largest: int) -> int:
    """Return the largest rank whose count is within the budget, at least 1."""
    high = 2
    while count(high) <= budget and high < largest:
        high *= 2
    return max(1, bisect_right(range(1, high), budget, key=count))


def capped(f: Factorization, model: Any, targets: tuple[str, ...]) -> Factorization:
    """Return the factorization with every numbered rank at most what its bond carries at all sites.

    >>> capped(families.tucker((8, 8, 8), modes=["proj"], stack=["layer", "proj"]), "facebook/opt-125m", ()).ranks
    {'a': 8, 'b': 8, 'c': 2}
    """
    for _ in range(len(f.ranks) + 1):  # a smaller bond may lower the cuts of others
        cuts = {name: cut for net, sizes in _shapes(f, model, targets) for name, cut in _cuts(net, sizes).items()}
        if not cuts:
            break
        f = f.with_ranks(**cuts)
    return f


def _cuts(net: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bonds that alone exceed their cut; parallel bonds are left as they are: which one to lower is a choice."""
    return {name: cut for name, cut in counting.clipped_ranks(net, sizes).items() if " " not in name}


def _shapes(f: Factorization, model: Any, targets: tuple[str, ...]) -> list[tuple[Any, dict[str, int]]]:
    placed = layout_on(f, model=model, targets=list(targets) or None).site_layouts
    return [(net, dict(sizes)) for net, sizes in {(p.line.network, tuple(p.sizes.items())) for p in placed}]


def parameters(f: Factorization, model: Any, targets: tuple[str, ...]) -> int:
    """Return the trainable parameters over the model's sites.

    >>> parameters(families.lora(1), "facebook/opt-1.3b", ("q_proj", "v_proj"))
    196608
    """
    return int(counting.parameters(f, model=model, targets=list(targets) or None))


def dof(f: Factorization, model: Any, targets: tuple[str, ...]) -> int | None:
    """Return the degrees of freedom over the model's sites; None where no formula gives them.

    Of sites of several shapes that share a trainable factor the count is an upper bound only, hence none.

    >>> dof(families.lora(2), {"model_type": "opt", "hidden_size": 64, "num_hidden_layers": 4,
    ...                        "num_attention_heads": 4, "ffn_dim": 256}, ("q_proj", "v_proj"))
    2016
    """
    shapes = counting.site_shapes(f, model=model, targets=list(targets) or None)
    trained = [factor for shape in shapes for factor in shape.network.factors if factor.kind == "trainable"]
    if len(shapes) > 1 and not all({"layer", "proj"} <= {*factor.indices} for factor in trained):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        try:
            return int(counting.dof(f, model=model, targets=list(targets) or None))
        except ValueError:  # a tied factor
            return None
