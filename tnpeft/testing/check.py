"""Everything that must hold for a network, tried out: what a user calls on a line of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, TypeVar

from tnpeft._text import Printed, Table
from tnpeft.layout import Layout
from tnpeft.networks import STACK, Factorization, Network, NetworkError, Site, network
from tnpeft.networks.sizes import Sizes, bind
from tnpeft.testing import properties
from tnpeft.testing.cases import Case, cases, reduced, small_factorization, small_layout, small_sizes
from tnpeft.testing.properties import Answer

Tried = TypeVar("Tried")


@dataclass(frozen=True)
class Finding:
    """One property: whether it holds, None where it cannot be asked, and the numbers behind the answer.

    >>> check("B[out r] A[r inp] -> out inp").findings[0].passed
    True
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Report(Printed):
    """The result of :func:`check`. Prints as a table; true if nothing failed.

    >>> report = check("B[out r] A[r inp] -> out inp")
    >>> report.passed, sorted(report.as_dict())
    (True, ['findings', 'passed', 'subject'])
    """

    subject: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """True if every property holds or is skipped."""
        return all(finding.passed is not False for finding in self.findings)

    def __bool__(self) -> bool:
        return self.passed

    def _parts(self) -> tuple[str, Table]:
        mark = {True: "ok    ", False: "FAILED", None: "-"}
        rows = tuple((mark[f.passed], f.name, f.detail) for f in self.findings)
        return self.subject, Table((), rows, indent="  ")

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "passed": self.passed}


def check(
    net: Network | Factorization | str,
    sizes: Sizes | None = None,
    /,
    *,
    sites: Iterable[Site] | None = None,
    seed: int = 0,
    **keywords: Any,
) -> Report:
    """A report on a network, a line or a factorization, after every property in it was found to hold.

    Contraction equals brute force for any plan, gradients equal numerical ones, the count equals the stored
    elements, no rank exceeds its bound, the update starts at zero (or is declared not to), and the start is
    not dead. A network is tried at ``sizes``, a factorization at ``sites``; what is not given is chosen small.

    Raises:
        AssertionError: a property does not hold; the message is the report.
        NetworkError: the line is not a network, or a size is unknown or unfit.

    >>> print(check("B[out r] A[r inp] -> out inp", out=4, r=2, inp=3).findings[0].passed)
    True
    """
    report = examine(net, sizes, sites=sites, seed=seed, **keywords)
    if not report:
        raise AssertionError(str(report))
    return report


def examine(
    net: Network | Factorization | str,
    sizes: Sizes | None = None,
    /,
    *,
    sites: Iterable[Site] | None = None,
    seed: int = 0,
    **keywords: Any,
) -> Report:
    """The report of :func:`check`, returned whether or not a property fails.

    >>> examine("A[out inp] -> out inp", out=2, inp=2).passed
    True
    """
    net = network(net) if isinstance(net, str) else net
    plan: Layout | None
    if isinstance(net, Factorization):
        if sizes or keywords:
            raise NetworkError(
                "a factorization is tried at sites, not at sizes", remedy="pass sites=[tnpeft.Site(...)]"
            )
        for line in net.lines:
            line.network.require_matrix()
        name, plan = f"{net.name}: {net.network}", None
        if all(set(line.network.stack) <= set(STACK) for line in net.lines):
            plan = small_layout(net if sites is not None else reduced(net), sites)
        tried = cases(plan) if plan else tuple(Case(n, small_sizes(n)) for n in (line.network for line in net.lines))
    else:
        net.require_matrix()
        whole = small_sizes(net, bind(net, sizes, keywords))
        name, tried, plan = str(net), (Case(net, whole),), _placed(net, whole)
    findings = [
        _over(tried, "contraction equals brute force", lambda case: properties.contraction(case, seed)),
        _over(tried, "gradient equals the numerical one", lambda case: properties.gradient(case, seed)),
        _over(tried, "count equals the stored elements", lambda case: properties.count(case, seed)),
        _over(tried, "rank within its bound", lambda case: properties.rank(case, seed)),
    ]
    starts = () if plan is None else properties.starts(plan, seed)
    findings += [
        _over(starts, "starts as declared", properties.identity),
        _over(starts, "not a dead start", lambda start: properties.alive(start, seed)),
    ]
    return Report(name, tuple(findings))


def _placed(net: Network, sizes: Sizes) -> Layout | None:
    """A bare network on one small site with the general start rule; None if no model has its stack indices."""
    if not set(net.stack) <= set(STACK) or not any(f.kind == "trainable" for f in net.factors):
        return None
    rows, cols = (prod(sizes[index] for index in group) for group in (net.rows, net.cols))
    heads = sizes.get("head", 0)
    return small_layout(
        small_factorization(net, sizes), [Site(0, "q_proj", rows, cols, heads, experts=sizes.get("expert", 0))]
    )


def _over(tried: Iterable[Tried], name: str, ask: Callable[[Tried], Answer]) -> Finding:
    """One finding over all that is tried: the first that fails, else the last."""
    passed: bool | None = None
    detail = "its stack indices have no place in a model, or nothing is trainable"
    for one in tried:
        passed, detail = ask(one)
        if not passed:
            break
    return Finding(name, passed, detail)
