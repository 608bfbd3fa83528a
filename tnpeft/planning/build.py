"""Paths to steps: names for the results, the order of their indices, and the sum of the terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from tnpeft.networks import Network
from tnpeft.networks.factor import Group
from tnpeft.networks.sizes import Sizes
from tnpeft.planning.search import Path
from tnpeft.planning.steps import Step, fresh, with_costs

Use = tuple[str, Group]  # an operand and its indices


class Builder:
    """Steps in the making for one network; ``token`` names the index of the activations' rows, if there are any."""

    def __init__(self, net: Network, token: str) -> None:
        labels = {net.label(factor) for factor in net.factors}
        self.net, self.token = net, token
        self.x, self.base = fresh("x", labels), fresh("W", labels)
        self.y = fresh("y", labels)
        self.taken = {*labels, self.x, self.base, self.y}
        self.steps: list[Step] = []
        self.count = 0
        self.activations: Group = (*net.stack, token, *net.cols)
        self.applied: Group = (*net.stack, token, *net.rows)
        self.matrix: Group = (*net.stack, *net.rows, *net.cols)

    # ---- the forms of a program

    def dense(self, paths: Sequence[Path]) -> Builder:
        """The dense tensor: every term formed, then summed."""
        self._sum([self.term(t, path, applied=False) for t, path in enumerate(paths)], self.net.outer, self.y)
        return self

    def factored(self, paths: Sequence[Path]) -> Builder:
        """Activations through the factors, term by term."""
        self._split_columns()
        self._sum([self.term(t, path, applied=True) for t, path in enumerate(paths)], self.applied, self.y)
        return self._fuse_rows()

    def rebuilt(self, paths: Sequence[Path], formed: Collection[int], merge: bool) -> Builder:
        """The ``formed`` terms summed (``merge``: into the base weight) before one matmul, the others applied."""
        self._split_columns()
        parts = [self.term(t, paths[t], applied=False) for t in sorted(formed)]
        signs = [self.net.terms[t].sign for t in sorted(formed)]
        if merge:
            parts, signs = [(self.base, self.matrix), *parts], [1, *signs]
        weight = self._add(parts, signs, self.matrix, "")
        product = self._contract((self.x, self.activations), weight, self.applied, "")
        if merge:
            self.steps[-1] = replace(self.steps[-1], frozen=True)
        rest = [t for t in range(len(paths)) if t not in formed]
        others = [self.term(t, paths[t], applied=True) for t in rest]
        self._add([product, *others], [1, *(self.net.terms[t].sign for t in rest)], self.applied, self.y)
        return self._fuse_rows()

    def with_costs(self, sizes: Sizes, training: bool) -> tuple[Step, ...]:
        """The finished steps with their costs."""
        return with_costs(tuple(self.steps), sizes, self.net, self.token, training)

    # ---- one term

    def term(self, number: int, path: Path, applied: bool) -> Use:
        """The steps of one term along its path; what they result in."""
        uses: list[Use] = [(self.net.label(f), f.indices) for f in self.net.terms[number].factors]
        if applied:
            uses.append((self.x, self.activations))
        wanted = self.applied if applied else self.net.outer
        left = Counter(index for _, indices in uses for index in indices) + Counter(wanted)
        for a, b in path:
            pair = sorted((uses[a], uses[b]), key=lambda use: self.token not in use[1])
            left.subtract(index for _, indices in pair for index in indices)
            union = dict.fromkeys(pair[0][1] + pair[1][1])
            result = tuple(index for index in union if left[index])
            if len(uses) - len(self.net.terms[number].factors) - applied == len(path) - 1:
                result = tuple(index for index in wanted if index in union)
            left.update(result)
            uses.append(self._contract(pair[0], pair[1], result, ""))
        return uses[-1]

    # ---- single steps

    def _contract(self, left: Use, right: Use, indices: Group, name: str) -> Use:
        return self._emit(Step("contract", name, indices, (left[0], right[0]), (left[1], right[1])))

    def _sum(self, parts: Sequence[Use], indices: Group, name: str) -> Use:
        return self._add(parts, [term.sign for term in self.net.terms], indices, name)

    def _add(self, parts: Sequence[Use], signs: Sequence[int], indices: Group, name: str) -> Use:
        """The signed sum; no step where the only part is a result that already has the wanted indices and sign."""
        (first, own), *more = parts
        made = [step for step in self.steps if step.result == first and step.kind != "reshape"]
        if not more and signs[0] > 0 and own == indices and made:
            if name:
                self.steps = [replace(s, result=name) if s.result == first else s for s in self.steps]
            return name or first, indices
        names, uses = zip(*parts, strict=True)
        return self._emit(Step("add", name, indices, names, uses, tuple(signs)))

    def _emit(self, step: Step) -> Use:
        if not step.result:
            self.count += 1
            while f"t{self.count}" in self.taken:
                self.count += 1
            step = replace(step, result=f"t{self.count}")
        self.steps.append(step)
        return step.result, step.indices

    def _split_columns(self) -> None:
        if len(self.net.cols) != 1:
            self.steps.append(_reshape(self.x, self.activations, (*self.net.stack, self.token, self._fused("cols"))))

    def _fuse_rows(self) -> Builder:
        if len(self.net.rows) != 1:
            self.steps.append(_reshape(self.y, (*self.net.stack, self.token, self._fused("rows")), self.applied))
        return self

    def _fused(self, side: str) -> str:
        return f"({' '.join(getattr(self.net, side))})"


def _reshape(name: str, result: Group, operand: Group) -> Step:
    return Step("reshape", name, result, (name,), (operand,))
