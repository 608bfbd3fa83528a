"""One adapter's update of one linear: which arrays it needs, from where, and the programs that apply them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tnpeft.adapters.sites.selection import Axes, Selected, one_value, rowwise
from tnpeft.layout import ParameterSpec, SiteLayout
from tnpeft.networks import REPLICA, Network
from tnpeft.nn.executor.grouped import grouped_program
from tnpeft.nn.executor.kernels import normalize_columns
from tnpeft.nn.executor.program import Program, program
from tnpeft.nn.init.initializer import without_experts
from tnpeft.nn.init.patterns import base as as_factor

Source = Literal["site", "bank", "base"]
Side = Literal["", "out", "inp"]
_OTHER: dict[Side, Side] = {"": "", "out": "inp", "inp": "out"}


@dataclass(frozen=True)
class Operand:
    """The owner and key of a factor's array of one site, its normalised axes, and those of named stacks.

    The normalised ones (none: it is not) are counted without those of named stacks.
    """

    source: Source
    key: str
    norm: tuple[int, ...] = ()
    stack: Axes = ()


@dataclass(frozen=True)
class SiteUpdate:
    """The update of one site: its program, its operands in the program's order, and its part of the linear.

    ``side`` is the side of the linear that the site is a slice of, from ``start`` on, or ``""`` for the whole;
    ``keeps`` says that something is computed from the adapter's own factors alone, ``data`` that it has constants
    besides the base weight. The program normalises the operands that are to be; it is that of one value of each
    named stack index, ``stack``, and :meth:`by_rows` that of one value for each row. ``fixed`` are values that are
    nobody's to choose: the expert of a linear that is one of a list.
    Copies and pickles hold the site_layout and build the program anew.
    """

    site_layout: SiteLayout
    unit_norm: tuple[str, ...]
    constants: tuple[str, ...]
    scale: float
    tokens: int
    expert: int
    turned: bool
    program: Any = field(compare=False, repr=False)
    operands: tuple[Operand, ...]
    side: Side
    start: int
    length: int
    keeps: bool
    data: bool
    stack: tuple[str, ...] = ()
    fixed: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    _cached: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        place = _turned(self.site_layout) if self.turned else self.site_layout
        return update, (place, self.unit_norm, self.constants, self.scale, self.tokens, self.expert, self.turned)

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what ``make`` made for the key at the first call; a copy of the update makes it anew."""
        if key not in self._cached:
            self._cached[key] = make()
        return self._cached[key]

    def delta(self, operands: list[Tensor]) -> Tensor:
        """The scaled update of this site, ``[out, inp]``."""
        return self.program.delta(operands, self.scale)

    def chosen(self, selected: Selected) -> Selected:
        """The values of all its stack indices: the chosen ones, and those that are fixed."""
        return {**selected, **self.fixed} if self.fixed else selected

    def by_rows(self, rows: tuple[str, ...], count: int) -> Program:
        """Return the program of ``count`` values of the stack indices ``rows``, one for each row of a batch."""
        if not rows:
            return self.program

        def make() -> Program:
            net = rowwise(self.site_layout.network, self.stack, rows)
            sizes = {index: size for index, size in self.site_layout.sizes.items() if index in net.indices}
            tokens = max(1, self.tokens // count)
            return program(net, {**sizes, REPLICA: count}, tokens=tokens, unit_norm=self.unit_norm)

        return self.cached((rows, count), make)  # type: ignore[no-any-return]

    def normalized(self, operands: list[Tensor]) -> list[Tensor]:
        """Return the operands as the line has them: columns of length one where they are to be."""
        return [
            normalize_columns(array, operand.norm) if operand.norm else array
            for array, operand in zip(operands, self.operands, strict=True)
        ]


def update(
    site_layout: SiteLayout,
    unit_norm: tuple[str, ...],
    constants: tuple[str, ...],
    scale: float,
    tokens: int,
    expert: int = 0,
    turned: bool = False,
) -> SiteUpdate:
    """The update of the site_layout's site; ``constants`` are the factors that are the base weight itself.

    Where each expert is a linear of its own, it is that of ``expert``. If it is ``turned``, its rows are the site's
    columns, as in a head that is tied to an embedding.

    >>> from tnpeft.layout import layout
    >>> from tnpeft.networks import Factorization, Site
    >>> f = Factorization.of("B[layer proj out r] A[r inp] -> layer proj out inp", ranks={"r": 2})
    >>> place = layout(f, [Site(0, "q_proj", 8, 4, module="q")]).site_layouts[0]
    >>> [(operand.source, operand.key) for operand in update(place, (), (), 1.0, 64).operands]
    [('site', 'B'), ('bank', 'A')]
    """
    site, site_layout = site_layout.site, _turned(site_layout) if turned else site_layout
    one = site.listed or not site.experts  # of a linear, which is one expert, too
    fixed = {"expert": torch.tensor(expert)} if one and "expert" in site_layout.network.stack else {}
    net, sizes, stack = one_value(site_layout.network, site_layout.sizes, fixed)
    make = grouped_program if site.experts and not site.listed else program
    run = make(net, sizes, tokens=tokens, unit_norm=unit_norm)
    last = site.proj.rpartition("/")[2]
    side: Side = "out" if last.startswith("out:") else "inp" if last.startswith("inp:") else ""
    operands = tuple(_operand(site_layout, label, unit_norm, constants, stack) for label in run.labels)
    return SiteUpdate(
        site_layout,
        unit_norm,
        constants,
        scale,
        tokens,
        expert,
        turned,
        run,
        operands,
        side if not turned else _OTHER[side],
        site.start,
        site.inp if side == "inp" else site.out,
        run.has_weight_steps and not constants,
        any(param.kind == "constant" and label not in constants for label, param in site_layout.parameters.items()),
        stack,
        fixed,
    )


def _turned(place: SiteLayout) -> SiteLayout:
    """The same site as the transposed matrix."""
    *stack, rows, cols = place.network.output
    return replace(place, network=Network(place.network.terms, (*stack, cols, rows)))


def as_base_factor(item: SiteUpdate, label: str, weight: Tensor) -> Tensor:
    """A site's base weight, ``[out, inp]`` or ``[expert, out, inp]``, as the constant factor that stands for it.

    >>> from tnpeft.layout import layout
    >>> from tnpeft.networks import Factorization, Site
    >>> f = Factorization.of("d[out] ^W[out inp] -> out inp", init={"W": "base"})
    >>> item = update(layout(f, [Site(0, "q_proj", 2, 3)]).site_layouts[0], (), ("W",), 1.0, 64)
    >>> import torch
    >>> as_base_factor(item, "W", torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    place = item.site_layout
    if item.fixed:
        place = without_experts(replace(place, site=replace(place.site, experts=0)))
    return as_factor(place.parameters[label], place, weight)


def part(weight: Tensor, item: SiteUpdate) -> Tensor:
    """The slice of a linear's ``[out, inp]`` matrix, or of one for every expert, that belongs to the site.

    >>> from tnpeft.layout import layout
    >>> from tnpeft.networks import Factorization, Site
    >>> f = Factorization.of("A[out inp] -> out inp")
    >>> place = layout(f, [Site(0, "c_attn/out:1", 2, 3, start=2)]).site_layouts[0]
    >>> import torch
    >>> part(torch.arange(12.0).reshape(4, 3), update(place, (), (), 1.0, 64))[:, 0]
    tensor([6., 9.])
    """
    if not item.side:
        return weight
    return weight.narrow(-2 if item.side == "out" else -1, item.start, item.length)


def _operand(
    site_layout: SiteLayout,
    label: str,
    unit_norm: tuple[str, ...],
    constants: tuple[str, ...],
    named: tuple[str, ...],
) -> Operand:
    param = site_layout.parameters[label]
    if label in constants:
        return Operand("base", label)
    stack = tuple((axis, index) for axis, index in enumerate(param.indices) if index in named)
    norm = _columns(param, site_layout, named) if label in unit_norm else ()
    return Operand("site" if param.home else "bank", param.key, norm, stack)


def _columns(param: ParameterSpec, site_layout: SiteLayout, named: tuple[str, ...]) -> tuple[int, ...]:
    features = {*site_layout.network.rows, *site_layout.network.cols}
    kept = [index for index in param.indices if index not in named]
    return tuple(axis for axis, index in enumerate(kept) if index in features)
