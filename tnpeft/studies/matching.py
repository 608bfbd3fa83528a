"""Sizes at matched budgets: which rank of a family comes nearest to a number of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tnpeft import families
from tnpeft.studies import methods
from tnpeft.studies.files import StudyError


def ranks_for(
    family: str,
    fixed: Mapping[str, Any],
    budgets: Sequence[int],
    model: Any,
    targets: tuple[str, ...],
    *,
    largest: int = 4096,
) -> Iterator[dict[str, int]]:
    """For each budget the rank whose parameter count is nearest to it, without repeats.

    A family with several ranks gets one common rank in all of them. The count grows with the rank, so a bisection
    finds both neighbours of the budget.

    Raises:
        StudyError: the family has no such rank.

    >>> list(ranks_for("lora", {}, [4096 * 48, 400000], "facebook/opt-1.3b", ("q_proj", "v_proj")))
    [{'rank': 1}, {'rank': 2}]
    """

    known = inspect.signature(families.get(family)).parameters
    vary = "rank" if "rank" in known else "ranks"
    if vary not in known:
        raise StudyError(f"{family!r} has one size only", remedy="name it without budgets")

    def count(rank: int) -> int:
        found = methods.count({"family": family, "args": {**fixed, vary: rank}}, model, targets)
        if found is None:
            raise StudyError(f"the size of {family!r} cannot be counted", remedy="give a grid instead of budgets")
        return found

    seen: set[int] = set()
    for budget in budgets:
        low, high = 1, 2
        while count(high) <= budget and high < largest:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) <= budget else (low, middle)
        best = min((low, high), key=lambda rank: abs(count(rank) - budget))
        if best not in seen:
            seen.add(best)
            yield {vary: best}
