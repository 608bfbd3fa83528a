"""The best plan for every number of tokens: costs are affine in them, so it is a short table of intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tnpeft._text import Printed, Table
from tnpeft.models.cards import Model, Targets
from tnpeft.networks import Factorization, Network
from tnpeft.networks.sizes import Size, Sizes
from tnpeft.planning.planner import plan, score, weights, whole_tokens
from tnpeft.planning.steps import Plan

_FAR = 1 << 40  # stands for any larger number of tokens


@dataclass(frozen=True)
class PlanTable(Printed):
    """Plans with the number of tokens from which each is the best, ascending; the first starts at 1.

    >>> from tnpeft import network
    >>> table = plan_table(network("B[out r] A[r inp] -> out inp"), out=64, inp=32, r=2, minimize="macs")
    >>> [(start, best.form) for start, best in zip(table.starts, table.plans)]
    [(1, 'factored'), (22, 'merged')]
    """

    plans: tuple[Plan, ...]
    starts: tuple[int, ...]

    def at(self, tokens: int) -> Plan:
        """The best plan for this number of tokens, with_costs for it.

        Raises:
            NetworkError: it is not a positive whole number.

        >>> from tnpeft import network
        >>> plans = plan_table(network("B[out r] A[r inp] -> out inp"), out=64, inp=32, r=2, minimize="macs")
        >>> plans.starts, plans.at(21).form, plans.at(22).form
        ((1, 22), 'factored', 'merged')
        """
        wanted = whole_tokens(tokens)
        best = max(k for k, start in enumerate(self.starts) if start <= wanted)
        return self.plans[best].resized(tokens=wanted)

    def _parts(self) -> list[str | Table]:
        rows: list[tuple[object, ...]] = []
        ends = [*(f"{start - 1:,}" for start in self.starts[1:]), "..."]
        for start, end, best in zip(self.starts, ends, self.plans, strict=True):
            macs, written = _line([p.macs for p in _probe(best)]), _line([p.written for p in _probe(best)])
            rows.append((f"{start:,} to {end}", best.form, *macs, *written))
        head = ("tokens", "form", "macs = fixed", "+ per token", "written", "+ per token")
        parts: list[str | Table] = [Table(head, tuple(rows), "<>", rule=True)]
        for start, best in zip(self.starts, self.plans, strict=True):
            parts += ["", f"from {start:,} tokens", *best._parts()]
        return parts


def plan_table(
    net: Network | Factorization,
    sizes: Sizes | None = None,
    *,
    minimize: str = "time",
    training: bool = True,
    base: str | None = "fp32",
    model: Model = None,
    targets: Targets = None,
    **more: Size,
) -> PlanTable:
    """The best plans for every number of tokens from 1 on; the arguments are those of :func:`plan`.

    The best cost is a concave, piecewise linear function of the tokens: where two plans' lines meet, the search is
    asked again, so the intervals are exact wherever the plans are.

    >>> from tnpeft import network
    >>> plans = plan_table(network("A[out a] B[a b] C[b inp] -> out inp"), out=64, a=8, b=4, inp=64, base=None)
    >>> [(start, p.form) for start, p in zip(plans.starts, plans.plans)]
    [(1, 'factored'), (21, 'factored')]
    """

    def best(tokens: int) -> Plan:
        asked: dict[str, Any] = {"tokens": tokens, "minimize": minimize, "training": training, "base": base}
        return plan(net, sizes, model=model, targets=targets, **asked, **more)

    price = weights(minimize, training)

    def line(p: Plan) -> tuple[int, int]:
        fixed, slope = _line([score(at, price) for at in _probe(p)])
        return fixed, slope

    envelope: dict[tuple[int, int], Plan] = {}
    pending = [(1, best(1), _FAR, best(_FAR))]
    while pending:
        low, left, high, right = pending.pop()
        (fixed, slope), (other, flatter) = line(left), line(right)
        envelope.setdefault((fixed, slope), left)
        envelope.setdefault((other, flatter), right)
        if slope <= flatter or fixed >= other:
            continue
        middle = (other - fixed) // (slope - flatter)  # the last number of tokens at which the left one is as good
        for tokens in {middle, middle + 1} - {low, high}:
            if low < tokens < high:
                found = best(tokens)
                if line(found) not in envelope:
                    pending += [(low, left, tokens, found), (tokens, found, high, right)]
                    break
    return _intervals(envelope)


def _intervals(envelope: dict[tuple[int, int], Plan]) -> PlanTable:
    """The lower envelope of the lines over whole numbers of tokens."""
    starts: list[int] = []
    lines: list[tuple[int, int]] = []
    for fixed, slope in sorted(envelope, key=lambda line: (-line[1], line[0])):
        while lines:
            before, steeper = lines[-1]
            start = (fixed - before) // (steeper - slope) + 1 if steeper > slope else _FAR
            if max(start, 1) > starts[-1]:
                break
            starts.pop()
            lines.pop()
        else:
            start = 1
        if start < _FAR:
            starts.append(max(start, 1))
            lines.append((fixed, slope))
    return PlanTable(
        tuple(envelope[line].resized(tokens=start) for line, start in zip(lines, starts, strict=True)), tuple(starts)
    )


def _probe(p: Plan) -> tuple[Plan, Plan]:
    return p.resized(tokens=1), p.resized(tokens=2)


def _line(values: list[int]) -> tuple[int, int]:
    """Intercept and slope of an affine cost known at 1 and 2."""
    slope = values[1] - values[0]
    return values[0] - slope, slope
