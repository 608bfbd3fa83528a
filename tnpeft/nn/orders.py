"""How the tensors of a program are stored: the order of their indices, and which of them are fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tnpeft.networks.factor import Group
from tnpeft.planning.steps import Step


@dataclass(frozen=True)
class Value:
    """Where a tensor is and how it is stored: each of its axes is one index or several, fused.

    >>> Value(0, (("replica", "token"), ("i1", "i2"))).order
    ('replica', 'token', 'i1', 'i2')
    """

    place: int
    axes: tuple[Group, ...]

    @property
    def order(self) -> Group:
        """Its indices."""
        return tuple(index for axis in self.axes for index in axis)

    @property
    def fused(self) -> bool:
        """Whether it has other axes than its indices."""
        return self.axes != singly(self.order)


@dataclass(frozen=True)
class Roles:
    """The indices of a product of two operands by where they stand."""

    batch: Group
    left: Group
    right: Group
    summed: Group

    @staticmethod
    def of(left: Group, right: Group, result: Group) -> Roles:
        """The roles in the product of ``left`` and ``right`` that leaves ``result``.

        >>> Roles.of(("token", "inp"), ("r", "inp"), ("token", "r"))
        Roles(batch=(), left=('token',), right=('r',), summed=('inp',))
        """
        return Roles(
            tuple(index for index in result if index in left and index in right),
            tuple(index for index in result if index in left and index not in right),
            tuple(index for index in result if index in right and index not in left),
            tuple(index for index in right if index in left and index not in result),
        )


def singly(order: Group) -> tuple[Group, ...]:
    """One axis per index.

    >>> singly(("a", "b"))
    (('a',), ('b',))
    """
    return tuple((index,) for index in order)


def wanted(steps: Sequence[Step], given: Mapping[str, Group]) -> dict[str, Group]:
    """The order in which every result should keep its indices: what its consumer sums comes last.

    ``given`` holds the orders of what is no result.

    >>> from tnpeft import network, plan
    >>> p = plan(network("A[out a] B[a b] C[b inp] -> out inp"), out=64, a=8, b=4, inp=64, tokens=9, base=None)
    >>> wanted(p.steps, {"x": ("token", "inp"), "A": ("out", "a"), "B": ("a", "b"), "C": ("b", "inp")})["t1"]
    ('token', 'b')
    """
    orders: dict[str, Group] = {}
    for step in reversed(steps):
        order = orders.setdefault(step.result, step.indices)
        for k, (name, use) in enumerate(zip(step.operands, step.uses, strict=True)):
            if name in given:
                continue
            kept = tuple(index for index in order if index in use)
            summed = [index for index in use if index not in kept]
            if step.kind == "contract" and summed:
                other = step.uses[1 - k]
                batch = tuple(index for index in kept if index in other)
                kept = batch + tuple(index for index in kept if index not in other)
                if step.operands[1 - k] in given:
                    summed.sort(key=other.index)
            orders[name] = kept + tuple(summed)
    return orders


def walk(
    steps: Sequence[Step],
    contract: Callable[[Step], None],
    add: Callable[[Step], None],
    accumulate: Callable[[Step, Group, int], None],
) -> None:
    """Hand every step to what deals with it: a part of the output goes, with the output's order and the part's sign,
    to ``accumulate``; the last sum is made of such parts and is no step of its own.

    >>> from tnpeft import network, plan
    >>> p = plan(network("B[out r] A[r inp] -> out inp"), out=64, inp=32, r=2, tokens=8)
    >>> walk(p.steps, lambda step: print(step.kind), print, lambda step, order, sign: print(order, sign))
    contract
    ('token', 'out') 1
    """
    last = steps[-1]
    parts = dict(zip(last.operands, last.signs, strict=True)) if last.kind == "add" else {last.result: 1}
    for step in steps:
        if step.kind == "add":
            if step is not last:
                add(step)
        elif step.result in parts:
            accumulate(step, last.indices, parts[step.result])
        else:
            contract(step)
