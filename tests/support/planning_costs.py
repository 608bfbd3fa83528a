"""What the planner is judged by: every tree of a small network, with_costs from the definitions and nothing else.

Written without looking at how the planner searches or prices: sets of indices, ``math.prod``, recursion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations
from math import prod
from typing import NamedTuple

from tnpeft.networks import Network, Term

Leaf = tuple[str, frozenset[str]]  # a name, and the indices that the operand carries


class Cost(NamedTuple):
    """Multiply-adds forward and backward, elements written, elements that autograd keeps."""

    macs: int = 0
    backward: int = 0
    written: int = 0
    saved: int = 0

    def time(self) -> int:
        return self.macs + self.backward + 64 * (self.written + self.saved)


def plus(*costs: Cost) -> Cost:
    return Cost(*(sum(column) for column in zip(*costs, strict=True)))


def trees(leaves: tuple[int, ...]) -> Iterator[object]:
    """Every way to multiply the leaves two at a time, as nested pairs."""
    if len(leaves) == 1:
        yield leaves[0]
        return
    first, rest = leaves[0], leaves[1:]
    for count in range(len(rest)):
        for joined in combinations(rest, count):
            others = tuple(leaf for leaf in rest if leaf not in joined)
            for left in trees((first, *joined)):
                for right in trees(others):
                    yield left, right


def members(tree: object) -> set[int]:
    return {tree} if isinstance(tree, int) else set.union(*map(members, tree))  # type: ignore[arg-type]


def tree_cost(
    tree: object, leaves: Sequence[Leaf], output: frozenset[str], sizes: dict[str, int], live: set[str]
) -> Cost:
    """The cost of one tree: ``live`` names the leaves that need a gradient, ``x`` is the activations."""
    if isinstance(tree, int):
        return Cost()
    left, right = tree  # type: ignore[misc]

    def carried(node: object) -> frozenset[str]:
        inside = members(node)
        if len(inside) == 1:
            return leaves[next(iter(inside))][1]
        outside = output.union(*(leaves[k][1] for k in range(len(leaves)) if k not in inside))
        return frozenset.union(*(leaves[k][1] for k in inside)) & outside

    def size(indices: frozenset[str]) -> int:
        return prod(sizes[index] for index in indices)

    def kept(node: object, partner: object) -> int:
        names = {leaves[k][0] for k in members(node)}
        needed = any(leaves[k][0] in live for k in members(partner))
        return size(carried(node)) if needed and (len(members(node)) > 1 or names == {"x"}) else 0

    macs = size(carried(left) | carried(right))
    grads = sum(any(leaves[k][0] in live for k in members(side)) for side in (left, right))
    here = Cost(macs, macs * grads, size(carried(tree)), kept(left, right) + kept(right, left))
    below = (tree_cost(side, leaves, output, sizes, live) for side in (left, right))
    return plus(here, *below)


def term_leaves(net: Network, term: Term, applied: bool) -> tuple[list[Leaf], frozenset[str]]:
    leaves = [(net.label(factor), frozenset(factor.indices)) for factor in term.factors]
    if applied:
        return [*leaves, ("x", frozenset(("token", *net.cols)))], frozenset(("token", *net.rows))
    return leaves, frozenset((*net.rows, *net.cols))


def least_tree_macs(leaves: Sequence[Leaf], output: frozenset[str], sizes: dict[str, int]) -> int:
    """The fewest multiply-adds of any tree: the cheapest split of every set of leaves, all splits tried."""
    everything = frozenset(range(len(leaves)))

    def carried(inside: frozenset[int]) -> frozenset[str]:
        outside = output.union(*(leaves[k][1] for k in everything - inside))
        return frozenset.union(*(leaves[k][1] for k in inside)) & outside

    @cache
    def least(inside: frozenset[int]) -> int:
        if len(inside) == 1:
            return 0
        first, *rest = sorted(inside)
        splits = (frozenset((first, *some)) for count in range(len(rest)) for some in combinations(rest, count))
        return min(
            least(left) + least(inside - left) + prod(sizes[i] for i in carried(left) | carried(inside - left))
            for left in splits
        )

    return least(everything)


def least_macs(net: Network, sizes: dict[str, int], tokens: int, base: bool) -> int:
    """The fewest multiply-adds of one site's update, over every program that forms none, some or all terms first."""
    sizes = {**sizes, "token": tokens}
    through, formed = (
        [least_tree_macs(*term_leaves(net, term, applied), sizes) for term in net.terms] for applied in (True, False)
    )
    matmul = tokens * prod(sizes[i] for i in (*net.rows, *net.cols))
    options = [sum(through)]
    every = range(len(net.terms))
    for count in every:
        for chosen in combinations(every, count + 1):
            weights = sum(formed[t] for t in chosen)
            others = sum(through[t] for t in every if t not in chosen)
            options += [weights + others + matmul] + [weights + others] * base
    return min(options)
