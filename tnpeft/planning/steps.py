"""A plan is a short program: steps on two operands, what each costs, and a table that shows both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from tnpeft._text import Printed, Table
from tnpeft.networks import Network, NetworkError
from tnpeft.networks.factor import Group
from tnpeft.networks.sizes import Size, Sizes, check_size, product


@dataclass(frozen=True)
class Step:
    """One assignment: ``result[indices]`` from operands, each with its indices in this use.

    ``contract`` multiplies two operands and sums what ``indices`` leave out; ``add`` sums operands with ``signs``,
    broadcast over indices that one lacks; ``reshape`` fuses or splits indices and costs nothing. ``frozen`` marks
    the matmul that the frozen model does anyway. Costs are in elements and multiply-adds.

    >>> print(Step("contract", "t1", ("token", "r"), ("x", "A"), (("token", "inp"), ("r", "inp"))))
    t1[token r] = x[token inp] * A[r inp]
    """

    kind: Literal["contract", "add", "reshape"]
    result: str
    indices: Group
    operands: tuple[str, ...]
    uses: tuple[Group, ...]
    signs: tuple[int, ...] = ()
    frozen: bool = False
    macs: Size = 0
    backward_macs: Size = 0
    written: Size = 0
    saved: Size = 0

    def __str__(self) -> str:
        parts = [f"{name}[{' '.join(use)}]" for name, use in zip(self.operands, self.uses, strict=True)]
        if self.kind == "add":
            signs = ["- " if sign < 0 else "+ " if k else "" for k, sign in enumerate(self.signs)]
            text = " ".join(sign + part for sign, part in zip(signs, parts, strict=True))
        else:
            text = " * ".join(parts)
        verb = "reshape " if self.kind == "reshape" else ""
        return f"{self.result}[{' '.join(self.indices)}] = {verb}{text}"


@dataclass(frozen=True)
class Plan(Printed):
    """The steps of one site's update (or of the dense tensor), and what they cost.

    ``form`` says what kind of program won: ``"factored"`` (activations through the factors), ``"rebuilt"`` (the
    update is formed, then one matmul), ``"merged"`` (formed and added to the fp32 base weight, whose matmul the
    frozen model does anyway) or ``"dense"`` (no activations). ``exact`` is False where the network was too large
    for an exact search, or an ``optimizer`` of opt_einsum chose the order. Costs are what the update adds to the
    frozen forward: ``macs`` (one per multiply-add),
    ``flops`` (two), ``written`` (elements created), ``largest`` (elements of the largest result), ``saved``
    (elements autograd keeps: of each contraction the operands that a needed gradient reads; activations and
    intermediate results once each, Parameters and other factors never) and ``backward_macs`` (of each contraction
    its macs once per operand that leads to something trainable, the activations among them). Without training
    ``saved`` and ``backward_macs`` are 0.

    >>> import tnpeft
    >>> best = tnpeft.plan(tnpeft.network("B[out r] A[r inp] -> out inp"), out=64, inp=32, r=2, tokens=8)
    >>> best.form, best.macs, [str(step) for step in best.steps]
    ('factored', 1536, ['t1[token r] = x[token inp] * A[r inp]', 'y[token out] = t1[token r] * B[out r]'])
    """

    network: Network
    dims: tuple[tuple[str, Size], ...]
    steps: tuple[Step, ...]
    minimize: str
    training: bool
    form: str
    exact: bool
    activation: str = ""
    optimizer: str = ""

    @property
    def sizes(self) -> dict[str, Size]:
        """The size of every index, that of the activations' rows included."""
        return dict(self.dims)

    @property
    def path(self) -> list[tuple[int, int]]:
        """The order of contraction in opt_einsum's form: positions among the operands that are left, which are the
        factors of the line in order, then the activations.

        Raises:
            NetworkError: the line is a sum, or the plan adds the update to the base weight.
        """
        if any(step.kind == "add" for step in self.steps):
            raise NetworkError("a sum has no single path", remedy="ask for the plan of one term, with base=None")
        left = [self.network.label(factor) for factor in self.network.uses()]
        left += [fresh("x", left)] if self.activation else []
        path = []
        for step in self.steps:
            if step.kind == "contract":
                first = left.index(step.operands[0])
                second = left.index(step.operands[1], first + 1 if step.operands[0] == step.operands[1] else 0)
                path.append((min(first, second), max(first, second)))
                left = [name for k, name in enumerate(left) if k not in (first, second)] + [step.result]
        return path

    @cached_property
    def macs(self) -> Size:
        """Multiply-adds of the forward pass."""
        return sum(step.macs for step in self.steps)

    @property
    def flops(self) -> Size:
        """Floating-point operations of the forward pass, two per multiply-add."""
        return 2 * self.macs

    @cached_property
    def backward_macs(self) -> Size:
        """Multiply-adds of the backward pass."""
        return sum(step.backward_macs for step in self.steps)

    @cached_property
    def written(self) -> Size:
        """Elements created by the forward pass."""
        return sum(step.written for step in self.steps)

    @cached_property
    def saved(self) -> Size:
        """Elements kept for the backward pass."""
        return sum(step.saved for step in self.steps)

    @cached_property
    def largest(self) -> Size:
        """Elements of the largest result; with symbolic sizes a sympy maximum."""
        sizes = [product(self.sizes[i] for i in step.indices) for step in self.steps if step.kind != "reshape"]
        if all(isinstance(size, int) for size in sizes):
            return max(sizes, default=0)
        from sympy import Max

        return Max(*sizes)

    def resized(self, **sizes: Size) -> Plan:
        """The same steps at other sizes, numbers or symbols; ``tokens`` is the number of activation rows.

        Raises:
            NetworkError: a name is not an index of the plan.

        >>> from tnpeft import network, plan
        >>> from sympy import Symbol
        >>> p = plan(network("B[out r] A[r inp] -> out inp"), out=64, inp=32, r=2, tokens=8)
        >>> p.resized(tokens=Symbol("b")).macs
        192*b
        """
        if "tokens" in sizes and self.activation:
            sizes[self.activation] = sizes.pop("tokens")
        for name in sizes:
            if name not in self.sizes:
                known = ", ".join([*self.sizes, *(["tokens"] if self.activation else [])])
                raise NetworkError(f"unknown index {name!r}", remedy=f"the indices are {known}")
        new = {**self.sizes, **{name: check_size(name, size) for name, size in sizes.items()}}
        steps = with_costs(self.steps, new, self.network, self.activation, self.training)
        return replace(self, dims=tuple(new.items()), steps=steps)

    def _parts(self) -> tuple[str, Table, str]:
        """The line with its sizes, the table of steps, and the kind of program."""
        rows = [
            (str(s) + ("  (frozen forward)" if s.frozen else ""), s.macs, s.backward_macs, s.written, s.saved)
            for s in self.steps
        ]
        total = ("total", self.macs, self.backward_macs, self.written, self.saved)
        table = Table(("step", "macs", "backward", "written", "saved"), (*rows, total), "<>", rule=True)
        sizes = " ".join(f"{index}={size}" for index, size in self.dims)
        search = "exact search" if self.exact else "greedy search: too many operands for an exact one"
        search = f"order by {self.optimizer}" if self.optimizer else search
        what = f"{self.form}, least {self.minimize}, {'training' if self.training else 'inference'}, {search}"
        return f"{self.network}\n{sizes}", table, what


def with_costs(
    steps: tuple[Step, ...], sizes: Sizes, net: Network, activation: str, training: bool
) -> tuple[Step, ...]:
    """The steps with their costs at the given sizes; only ``+`` and ``*`` are used, so symbols serve as well.

    >>> from tnpeft import network
    >>> step = Step("contract", "y", ("token", "out"), ("x", "A"), (("token", "inp"), ("out", "inp")))
    >>> net, sizes = network("A[out inp] -> out inp"), {"token": 5, "out": 3, "inp": 4}
    >>> (done,) = with_costs((step,), sizes, net, "token", True)
    >>> done.macs, done.backward_macs, done.written, done.saved
    (60, 120, 15, 20)
    """
    labels = {net.label(factor): factor.kind for factor in net.factors}
    live = {name for name, kind in labels.items() if kind == "trainable"} if training else set()
    if training and activation:
        live.add(fresh("x", labels))
    leaves = {*labels, fresh("W", labels)}
    kept: set[str] = set()
    done = []
    for step in steps:
        needs = [name in live for name in step.operands]
        if any(needs):
            live.add(step.result)
        if step.kind == "add":
            step = replace(step, written=_volume(step.indices, sizes))
        elif step.kind == "contract":
            step = _contract_costs(step, sizes, needs, leaves, kept)
        done.append(step)
    return tuple(done)


def fresh(name: str, taken: Iterable[str]) -> str:
    """The name, with underscores appended until it is not taken.

    >>> fresh("x", {"x", "B"})
    'x_'
    """
    while name in taken:
        name += "_"
    return name


def _volume(indices: Group, sizes: Sizes) -> Size:
    return product(sizes[index] for index in indices)


def _contract_costs(step: Step, sizes: Sizes, needs: list[bool], leaves: set[str], kept: set[str]) -> Step:
    left, right = step.uses
    macs = _volume(tuple(dict.fromkeys(left + right)), sizes)
    saved: Size = 0
    for k, name in enumerate(step.operands):
        if needs[1 - k] and name not in leaves and name not in kept:
            kept.add(name)
            saved = saved + _volume(step.uses[k], sizes)
    if step.frozen:  # the frozen model pays for the product and for the gradient of its input
        return replace(step, backward_macs=macs * int(needs[1]), saved=saved)
    return replace(
        step, macs=macs, backward_macs=macs * sum(needs), written=_volume(step.indices, sizes), saved=saved
    )
