"""One adapter's update of one linear: which arrays it needs, from where, and the programs that apply them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from tnpeft.adapters.layer.columns import unit_columns
from tnpeft.adapters.layer.weight_cache import Entries, kept
from tnpeft.adapters.sites.selection import Axes, Selected, chosen_rows, one_value, rowwise
from tnpeft.layout import SiteLayout
from tnpeft.networks import REPLICA, Network
from tnpeft.nn.executor.grouped import grouped_program
from tnpeft.nn.executor.kernels import NARROW
from tnpeft.nn.executor.program import Program, program
from tnpeft.nn.init.initializer import without_experts
from tnpeft.nn.init.patterns import base as as_factor
from tnpeft.nn.lowrank import compiled_sides, cut_rank

Source = Literal["site", "bank", "base"]
Side = Literal["", "out", "inp"]
_OTHER: dict[Side, Side] = {"": "", "out": "inp", "inp": "out"}


@dataclass(frozen=True)
class Operand:
    """The owner and key of a factor's array of one site, its normalised axes, and those of named stacks.

    The normalised ones (none: it is not) are counted from the last, as if those of named stacks were not there.
    """

    source: Source
    key: str
    norm: tuple[int, ...] = ()
    stack: Axes = ()


@dataclass(eq=False)
class SiteUpdate:
    """The update of one site: its program, its operands in the program's order, and its part of the linear.

    ``side`` is the side of the linear that the site is a slice of, from ``start`` on, or ``""`` for the whole;
    ``keeps`` says that something is computed from the adapter's own factors alone, ``data`` that it has constants
    besides the base weight. Its program takes :meth:`normalized` operands; it is that of one value of each named
    stack index, ``stack``, and :meth:`by_rows` that of one value for each row. ``fixed`` are values that are
    nobody's to choose: the expert of a linear that is one of a list. ``kept`` holds what inference has computed of
    the factors. Copies and pickles are made anew.

    Args:
        site_layout: the site and the Parameters that its factors are, :func:`transposed` if it is turned.
        unit_norm: factors whose columns are normalised.
        constants: factors that are the base weight itself.
        scale: what the update is multiplied by.
        tokens: the number of rows that its program is best at.
        expert: the expert of which the linear is, where each is a linear of its own.
        turned: its rows are the site's columns, as in a head that is tied to an embedding.
    """

    site_layout: SiteLayout
    unit_norm: tuple[str, ...]
    constants: tuple[str, ...]
    scale: float
    tokens: int
    expert: int = 0
    turned: bool = False

    def __post_init__(self) -> None:
        place, site = self.site_layout, self.site_layout.site
        one = site.listed or not site.experts  # of a linear, which is one expert, too
        self.fixed = {"expert": torch.tensor(self.expert)} if one and "expert" in place.network.stack else {}
        net, sizes, self.stack = one_value(place.network, place.sizes, self.fixed)
        make: Any = program if one else grouped_program
        self.program = make(net, sizes, tokens=self.tokens)
        self.operands = tuple(map(self._operand, self.program.labels))
        own = [pair for pair in zip(self.program.labels, self.operands, strict=True) if pair[1].source != "base"]
        own.sort(key=lambda pair: place.parameters[pair[0]].kind != "trainable")
        self.trained = own[0][1] if own else None
        last = site.proj.rpartition("/")[2]
        side: Side = "out" if last.startswith("out:") else "inp" if last.startswith("inp:") else ""
        self.side = _OTHER[side] if self.turned else side
        self.start, self.length = site.start, site.inp if side == "inp" else site.out
        self.norms = any(operand.norm for operand in self.operands)
        self.keeps = (self.program.has_weight_steps or self.norms) and not self.constants
        self.data = any(p.kind == "constant" and name not in self.constants for name, p in place.parameters.items())
        self._cached: dict[Hashable, Any] = {}
        self.kept: Entries = {}

    def _operand(self, label: str) -> Operand:
        place, param = self.site_layout, self.site_layout.parameters[label]
        stack = tuple((axis, index) for axis, index in enumerate(param.indices) if index in self.stack)
        columns = {*place.network.rows, *place.network.cols} if label in self.unit_norm else ()
        kept = [index for index in param.indices if index not in self.stack]
        norm = tuple(axis - len(kept) for axis, index in enumerate(kept) if index in columns)
        if label in self.constants:
            return Operand("base", label, norm)
        return Operand("site" if param.home else "bank", param.key, norm, stack)

    def __reduce__(self) -> tuple[object, ...]:
        return SiteUpdate, tuple(getattr(self, field.name) for field in fields(self))

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what ``make`` made for the key at the first call; a copy of the update makes it anew."""
        if key not in self._cached:
            self._cached[key] = make()
        return self._cached[key]

    @cached_property
    def thin(self) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """The update through its smallest cut: a function from arrays to ``[narrow, out]`` and ``[inp, narrow]``.

        The two are computed in fp32 or wider, without the scale, in the dtype of the arrays. None where they are more
        than half as large as the update or, unless they are narrow, cost more than the plan; also where the update is
        several, or of the base weight.
        """
        its, plan = self.program, self.program.plan
        if plan.network.stack or self.constants:
            return None
        narrow = cut_rank(plan.network, plan.sizes)
        macs = narrow * (its.rows + its.cols)
        if 2 * macs > its.rows * its.cols or (narrow > NARROW and macs * self.tokens > plan.macs):
            return None
        sides = compiled_sides(plan.network, plan.sizes)

        def matrices(arrays: list[Tensor]) -> list[Tensor]:
            operands = self.normalized([wide(array) for array in arrays])
            both = sides(dict(zip(its.labels, operands, strict=True)))
            return [side.to(arrays[0].dtype).t() for side in both]

        return matrices

    def chosen(self, selected: Selected) -> Selected:
        """The values of all its stack indices: the chosen ones, and those that are fixed."""
        return {**selected, **self.fixed} if self.fixed else selected

    def rows(self, selected: Selected) -> tuple[tuple[str, ...], int]:
        """The stack indices with a value for each row of a batch, and the number of rows, see :func:`chosen_rows`."""
        return chosen_rows(self.stack, self.site_layout.sizes, self.chosen(selected))

    def by_rows(self, rows: tuple[str, ...], count: int) -> Program:
        """Return the program of ``count`` values of the stack indices ``rows``, one for each row of a batch."""
        if not rows:
            return self.program

        def make() -> Program:
            net = rowwise(self.site_layout.network, self.stack, rows)
            sizes = {index: size for index, size in self.site_layout.sizes.items() if index in net.indices}
            tokens = max(1, self.tokens // count)
            return program(net, {**sizes, REPLICA: count}, tokens=tokens)

        return self.cached((rows, count), make)  # type: ignore[no-any-return]

    def run(
        self,
        program: Program,
        x: Tensor,
        result: Tensor | None,
        operands: Callable[[], list[Tensor]],
        sources: list[Tensor] | None,
    ) -> Tensor:
        """``result`` plus what a program adds for ``x``; what it computes of ``sources`` alone is kept, if given."""
        if sources is None:
            return program(x, operands(), result, self.scale)
        key = program, x.dtype, x.device
        values = kept(self.kept, key, sources, lambda: program.prepare(operands()))
        return program.apply(x, values, result, self.scale)

    def normalized(self, arrays: list[Tensor]) -> list[Tensor]:
        """Return the arrays as the line has them: with columns of length one where they are to be."""
        if not self.norms:
            return arrays
        return unit_columns(arrays, [operand.norm for operand in self.operands])


def transposed(place: SiteLayout) -> SiteLayout:
    """The same site as the transposed matrix."""
    *stack, rows, cols = place.network.output
    return replace(place, network=Network(place.network.terms, (*stack, cols, rows)))


def as_base_factor(item: SiteUpdate, label: str, weight: Tensor) -> Tensor:
    """A site's base weight, ``[out, inp]`` or ``[expert, out, inp]``, as the constant factor that stands for it."""
    place = item.site_layout
    if item.fixed:
        place = without_experts(replace(place, site=replace(place.site, experts=0)))
    return as_factor(place.parameters[label], place, weight)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
