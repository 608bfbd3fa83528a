"""The cheapest program for a network: every form of it is built from searched paths, with_costs, and compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, combinations
from typing import Any

from tnpeft.counting.parameters import site_shapes
from tnpeft.models.cards import Model, Targets
from tnpeft.networks import Factorization, Network, NetworkError, Term
from tnpeft.networks.factor import Group
from tnpeft.networks.sizes import Size, Sizes, check_size, integers
from tnpeft.planning.build import Builder
from tnpeft.planning.search import Operand, Path, Weights, requested, search
from tnpeft.planning.steps import Plan, fresh

OBJECTIVES = ("time", "macs", "written", "saved")

_TIE = 1 << 128  # what is minimised comes first, "time" breaks ties
MACS_PER_ELEMENT = 64  # multiply-adds that moving one element is worth (cotengra's default ratio)
_FEW = 4  # terms up to which every choice of terms to rebuild is tried


def weights(minimize: str, training: bool) -> Weights:
    """The price of each cost under an objective.

    Raises:
        NetworkError: it is none of :data:`OBJECTIVES`.

    >>> weights("time", training=False)
    Weights(macs=1, backward=0, written=64, saved=64)
    """
    time = {"macs": 1, "backward": int(training), "written": MACS_PER_ELEMENT, "saved": MACS_PER_ELEMENT}
    if minimize == "time":
        return Weights(**time)
    if minimize not in OBJECTIVES:
        raise NetworkError(f"unknown objective minimize={minimize!r}", remedy=f"choose from {', '.join(OBJECTIVES)}")
    return Weights(**{**time, minimize: time[minimize] + _TIE})


def score(plan: Plan, price: Weights) -> int:
    """The cost of a plan under the prices of an objective.

    >>> from tnpeft import network
    >>> p = plan(network("B[out r] A[r inp] -> out inp"), out=64, inp=32, r=2, tokens=8, training=False)
    >>> score(p, weights("time", training=False)) == p.macs + 64 * p.written
    True
    """
    return int(
        price.macs * plan.macs
        + price.backward * plan.backward_macs
        + price.written * plan.written
        + price.saved * plan.saved
    )


def plan(
    net: Network | Factorization,
    sizes: Sizes | None = None,
    *,
    tokens: int | None = None,
    minimize: str = "time",
    training: bool = True,
    base: str | None = "fp32",
    optimize: Any = None,
    model: Model = None,
    targets: Targets = None,
    **more: Size,
) -> Plan:
    """The best plan of one site's update on ``tokens`` rows of activations, or of the dense tensor itself.

    With ``tokens`` the stack indices are selected for you, and the programs compared are: activations through the
    factors, term by term; some or all terms formed and summed first, then one matmul; the same added to the base
    weight (``base="fp32"``; in less precision the sum would lose the update, so pass None there), whose matmul the
    frozen model does anyway. With ``tokens=None`` it is the plan of the dense tensor, any output, stack indices open.

    Args:
        net: a network, or a factorization: its first line, its ranks and splits filling the sizes.
        sizes: sizes of the indices; keywords are checked more strictly than a mapping.
        tokens: number of rows of the activations.
        minimize: ``"macs"``, exact over all these programs, ties by time; ``"time"``, macs + backward macs + 64 x
            (written + saved), the last two in elements; ``"written"``; ``"saved"``. Exact term by term.
        training: whether gradients flow, to the activations as well; without, backward and saved are 0.
        optimize: None searches exactly where it can; else an optimiser of opt_einsum, by name ("greedy", "dp") or as
            an object (``opt_einsum.RandomGreedy()``), proposes the order within each term.
        base: ``"fp32"`` lets the plan add the update to the base weight, None forbids it.
        model: take the sizes from a model's sites, as :func:`tnpeft.parameters` does; all need one shape.
        targets: the model's projections.

    Raises:
        NetworkError: a size is missing, unknown or no whole number, the objective is unknown, or the sites have
            several shapes.

    >>> from tnpeft import network
    >>> p = plan(network("B[out r] A[r inp] -> out inp"), out=64, inp=32, r=2, tokens=8, minimize="macs")
    >>> [str(step) for step in p.steps], p.macs
    (['t1[token r] = x[token inp] * A[r inp]', 'y[token out] = t1[token r] * B[out r]'], 1536)
    """
    rows = None if tokens is None else whole_tokens(tokens)
    found: dict[tuple[Network, tuple[tuple[str, int], ...]], str] = {}
    for shape in site_shapes(net, sizes, model=model, targets=targets, **more):
        line, bound = shape.network, shape.sizes
        if rows is not None:
            line.require_matrix()
            line = line.select(*line.stack)
            bound = {index: bound[index] for index in line.indices if index in bound}
        found.setdefault((line, tuple(integers(line, bound).items())), str(shape))
    if len(found) > 1:
        raise NetworkError(
            f"the sites have several shapes: {', '.join(found.values())}",
            remedy="pass targets= of one shape, and ask for one plan after the other",
        )
    [(site, dims)] = found
    return planned(site, dims, rows, minimize, training, None if rows is None else base, optimize)


def whole_tokens(tokens: Size) -> int:
    """The number of activation rows, checked.

    Raises:
        NetworkError: it is not a positive whole number.

    >>> whole_tokens(2048)
    2048
    """
    number = check_size("tokens", tokens)
    if not isinstance(number, int):
        raise NetworkError(f"tokens is the symbol {tokens}", remedy="plan for a number, then use Plan.resized")
    return number


@lru_cache(maxsize=4096)
def planned(
    net: Network,
    dims: tuple[tuple[str, int], ...],
    tokens: int | None,
    minimize: str = "time",
    training: bool = True,
    base: str | None = None,
    optimize: Any = None,
) -> Plan:
    """:func:`plan` with checked sizes, kept by value; a stack index left in ``net`` stays open on the activations.

    >>> from tnpeft import network
    >>> planned(network("A[out inp] -> out inp"), (("out", 3), ("inp", 4)), 5).macs
    60
    """
    if base not in (None, "fp32"):
        raise NetworkError(
            f"base={base!r} cannot take the update without losing it", remedy='pass base="fp32" or base=None'
        )
    price = weights(minimize, training)
    planner = _Planner(net, dict(dims), tokens, minimize, training, price, optimize)
    plans = [planner.dense()] if tokens is None else planner.applied(base)
    return min(plans, key=lambda candidate: score(candidate, price))


class _Planner:
    """The candidate programs of one network at one set of sizes."""

    def __init__(
        self,
        net: Network,
        sizes: dict[str, int],
        tokens: int | None,
        minimize: str,
        training: bool,
        price: Weights,
        optimize: Any = None,
    ) -> None:
        self.optimize = optimize
        self.net, self.minimize, self.training, self.price = net, minimize, training, price
        self.token = fresh("token", net.indices) if tokens is not None else ""
        self.sizes = {**sizes, **({self.token: tokens} if tokens is not None else {})}
        self.exact = True

    def dense(self) -> Plan:
        return self._plan("dense", self._builder().dense(self._paths(applied=False)))

    def applied(self, base: str | None) -> list[Plan]:
        through, formed = self._paths(applied=True), self._paths(applied=False)
        plans = [self._plan("factored", self._builder().factored(through))]
        for chosen in self._rebuilt_terms(plans[0], through, formed):
            mixed = [formed[t] if t in chosen else through[t] for t in range(len(formed))]
            plans.append(self._plan("rebuilt", self._builder().rebuilt(mixed, chosen, merge=False)))
            if base and not self.net.stack:
                plans.append(self._plan("merged", self._builder().rebuilt(mixed, chosen, merge=True)))
        return plans

    def _rebuilt_terms(
        self, factored: Plan, through: Sequence[Path], formed: Sequence[Path]
    ) -> Iterator[frozenset[int]]:
        """Which terms to form: every choice while they are few, else all of them or those cheaper that way."""
        every = range(len(self.net.terms))
        if len(every) <= _FEW:
            yield from map(frozenset, chain.from_iterable(combinations(every, k + 1) for k in every))
            return
        yield frozenset(every)
        cheap = frozenset(t for t in every if self._alone(t, formed[t], False) < self._alone(t, through[t], True))
        if cheap and len(cheap) < len(every):
            yield cheap

    def _alone(self, term: int, path: Path, applied: bool) -> int:
        built = self._builder()
        built.term(term, path, applied)
        return score(self._plan("factored", built), self.price)

    def _builder(self) -> Builder:
        return Builder(self.net, self.token)

    def _plan(self, form: str, built: Builder) -> Plan:
        dims = tuple(self.sizes.items())
        steps = built.with_costs(self.sizes, self.training)
        chosen = self.optimize if isinstance(self.optimize, str | None) else type(self.optimize).__name__
        return Plan(self.net, dims, steps, self.minimize, self.training, form, self.exact, self.token, chosen or "")

    def _paths(self, applied: bool) -> list[Path]:
        """The cheapest path of every term, through the activations or to its dense matrix."""
        return [self._path(term, applied) for term in self.net.terms]

    def _path(self, term: Term, applied: bool) -> Path:
        operands = [Operand(frozenset(f.indices), live=self.training and f.kind == "trainable") for f in term.factors]
        output = set(self.net.outer) & set(term.places())
        if applied:
            indices: Group = (*self.net.stack, self.token, *self.net.cols)
            operands.append(Operand(frozenset(indices), live=self.training, counts_as_saved=True))
            output = {*self.net.stack, self.token, *self.net.rows}
        if self.optimize is not None:
            self.exact = False
            return requested(self.optimize, operands, frozenset(output), self.sizes)
        path, exact = search(operands, frozenset(output), self.sizes, self.price)
        self.exact = self.exact and exact
        return path
