"""A factorization: lines of einsum with ranks, splits, start values and scale. All of it is plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from sys import float_info
from typing import Any

from tnpeft.networks.display import factorization_html, svg
from tnpeft.networks.errors import NetworkError
from tnpeft.networks.network import Network
from tnpeft.networks.notation import network
from tnpeft.networks.sizes import IndexSizes, Size, Sizes, bind, check_size, evaluate, folded, joined, split

STACK = ("layer", "proj", "expert", "task", "replica")  # the stack indices that have a meaning in a model


@dataclass(frozen=True)
class Site:
    """One matrix that is updated: a linear of a model, or a named slice of one; or one matrix of every expert.

    ``layer`` counts the targeted layers from 0; ``proj`` is the projection's name (``q_proj``; a slice adds
    its place, ``fc1/out:0``); ``out`` and ``inp`` are its numbers of features; ``heads`` its number of attention
    heads (of k and v: the grouped ones), 0 if unknown; ``module`` the linear's dotted path; ``experts`` the number
    of experts of a weight that holds one matrix for each, 0 for a linear; ``kernel`` the sizes of a convolution's
    kernel, whose taps are columns beside its input channels. Where each expert is a module of its own, ``module``
    has ``*`` in the place of its number; where several modules hold one Parameter, it is their paths with
    ``=`` between.

    >>> Site(0, "fc1", 3072, 768).squares()[1]
    Site(layer=0, proj='fc1/out:1', out=768, inp=768, heads=0, module='', start=768, experts=0, kernel=())
    """

    layer: int
    proj: str
    out: int
    inp: int
    heads: int = 0
    module: str = ""
    start: int = 0
    experts: int = 0
    kernel: tuple[int, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the layers that hold the site's weight: one, that of every expert in a list, or tied ones.

        >>> Site(0, "w1", 8, 4, module="experts.*.w1", experts=2).paths
        ('experts.0.w1', 'experts.1.w1')
        """
        if not self.listed:
            return tuple(self.module.split("="))
        return tuple(self.module.replace("*", str(k)) for k in range(self.experts))

    @property
    def listed(self) -> bool:
        """True if every expert is a module of its own."""
        return "*" in self.module

    @property
    def taps(self) -> dict[str, int]:
        """The sizes of the kernel by the names of their indices; of a linear, whose kernel is one tap, all are 1.

        >>> Site(0, "conv", 8, 36, kernel=(3, 3)).taps
        {'kd': 1, 'kh': 3, 'kw': 3}
        """
        names = ("kd", "kh", "kw")
        return dict(zip(names, (1,) * (len(names) - len(self.kernel)) + self.kernel, strict=True))

    def squares(self) -> tuple[Site, ...]:
        """This site cut along its longer side into square slices, in order; itself if it is square.

        Raises:
            NetworkError: the longer side is not a multiple of the shorter one.
        """
        side, long, short = ("out", self.out, self.inp) if self.out > self.inp else ("inp", self.inp, self.out)
        if long == short:
            return (self,)
        if long % short:
            raise NetworkError(
                f"{self.proj} ({self.out} x {self.inp}) cannot be cut into squares",
                remedy="leave this projection out, or choose a factorization without square slices",
            )
        first = self.start if side == "out" else 0  # of a slice, which is one of rows
        return tuple(
            replace(self, proj=f"{self.proj}/{side}:{k}", out=short, inp=short, start=first + k * short, kernel=())
            for k in range(long // short)
        )


@dataclass(frozen=True)
class SiteRule:
    """A network and the sites it serves.

    ``sites`` is ``"*"``, a list of globs on the projection's name (``"fc2|down_proj"``), or a comparison of its
    shape (``"out<inp"``, ``"out>=inp"``).

    >>> from tnpeft.networks import network
    >>> wide = SiteRule(network("B[out r] A[r inp] -> out inp"), "out<inp")
    >>> wide.serves(Site(0, "fc2", 8, 32)), wide.serves(Site(0, "fc1", 32, 8))
    (True, False)
    """

    network: Network
    sites: str = "*"

    def serves(self, site: Site) -> bool:
        """True if this line is meant for the site.

        >>> SiteRule(network("A[out inp] -> out inp"), "fc2|down_*").serves(Site(0, "down_proj", 8, 4))
        True
        """
        if "<" in self.sites or ">" in self.sites:
            pattern = self.sites.replace(" ", "")
            shape = {"out<inp": site.out < site.inp, "out>=inp": site.out >= site.inp}
            shape |= {"out>inp": site.out > site.inp, "out<=inp": site.out <= site.inp}
            if pattern not in shape:
                raise NetworkError(
                    f"invalid pattern of sites {self.sites!r}", remedy=f"use one of {', '.join(shape)}"
                )
            return shape[pattern]
        return any(fnmatchcase(site.proj, pattern.strip()) for pattern in self.sites.split("|"))


@dataclass(frozen=True)
class Factorization:
    """A named way to write updates: what :class:`Network` leaves open, filled in.

    Attributes:
        name: how it is called.
        lines: networks with the sites they serve; the first that serves a site is used. One is the usual case.
        ranks: the size of every bond: a whole number, or a rule over sizes as text (``"ceildiv(min(out, inp), r)"``).
        splits: sizes of the indices in the row group (``"out"``) and the column group (``"inp"``), in order; a whole
            number, a rule, or None to deduce it.
        init: how each factor starts, by label: zeros, ones, constant(c), normal(std), uniform(bound), kaiming,
            xavier, orthogonal, eye, svd, tt_svd, dct, circulant, base (the frozen weight). See ``tnpeft.nn.init``.
        scale: the effective number that multiplies the update.
        unit_norm: factors whose columns are normalised in the forward pass (over their row and column indices).
        lr_multiplier: learning rate of a factor relative to the others.
        square: cut every site into square slices along its longer side.
        source: where the factorization comes from and how sure that is.

    Raises:
        NetworkError: a bond has no rank, a name is unknown, or two factors of one term both start at zero.

    >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 8})
    >>> f.sizes(out=64, inp=32)
    {'out': 64, 'r': 8, 'inp': 32}
    """

    name: str
    lines: tuple[SiteRule, ...]
    ranks: Mapping[str, int | str] = field(default_factory=dict)
    splits: Mapping[str, tuple[int | str | None, ...]] = field(default_factory=dict)
    init: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    unit_norm: tuple[str, ...] = ()
    lr_multiplier: Mapping[str, float] = field(default_factory=dict)
    square: bool = False
    source: str = ""

    @staticmethod
    def of(line: str | Network, **fields: Any) -> Factorization:
        """A factorization of one line; the keywords are the attributes of the class."""
        net = network(line) if isinstance(line, str) else line
        return Factorization(**{"name": "custom", "lines": (SiteRule(net),), **fields})

    def __post_init__(self) -> None:
        for what in ("ranks", "splits", "init", "lr_multiplier"):
            if not isinstance(getattr(self, what), Mapping):
                raise NetworkError(f"{what} is {getattr(self, what)!r}", remedy=f"pass a map, {what}={{name: value}}")
        plain = isinstance(self.scale, int | float)
        if not hasattr(self.scale, "__float__") or (plain and not abs(self.scale) <= float_info.max):
            raise NetworkError(f"scale is {self.scale!r}", remedy="pass a finite number")
        if isinstance(self.unit_norm, str) or not isinstance(self.unit_norm, Sequence):
            raise NetworkError(f"unit_norm is {self.unit_norm!r}", remedy="pass a list of factors' names")
        for what in ("ranks", "init", "lr_multiplier"):
            object.__setattr__(self, what, folded(getattr(self, what)))
        object.__setattr__(self, "unit_norm", tuple(folded(dict.fromkeys(self.unit_norm))))
        bonds = {bond for line in self.lines for bond in line.network.bonds}
        labels = {line.network.label(f) for line in self.lines for f in line.network.factors}
        self._known("ranks", self.ranks, bonds, "bonds")
        self._known("splits", self.splits, {"out", "inp"}, "groups")
        for what in ("init", "unit_norm", "lr_multiplier"):
            self._known(what, getattr(self, what), labels, "factors")
        for bond, rank in self.ranks.items():
            if not isinstance(rank, str):
                check_size(bond, rank, str(self.network))
        missing = sorted(bonds - set(self.ranks))
        if missing:
            raise NetworkError(
                f"no rank for the bond {', '.join(map(repr, missing))}",
                line=str(self.network),
                remedy=f"pass ranks={{{missing[0]!r}: 8}}",
            )
        self._check_splits()
        for line in self.lines:
            _refuse_dead_start(line.network, self.init)
            for factor in line.network.factors:
                if line.network.label(factor) in self.unit_norm and not {*factor.indices} & {*line.network.outer}:
                    raise NetworkError(
                        f"unit_norm names {factor.name!r}, which has no row or column index to be normalised over",
                        line=str(line.network),
                        remedy="leave it out of unit_norm",
                    )

    def _check_splits(self) -> None:
        for side, parts in self.splits.items():
            if isinstance(parts, str) or not isinstance(parts, Sequence):
                raise NetworkError(
                    f"the split of {side!r} is {parts!r}", remedy=f"pass a list, splits={{{side!r}: (32, None)}}"
                )
            groups = [line.network.rows if side == "out" else line.network.cols for line in self.lines]
            if all(len(group) != len(parts) for group in groups):
                raise NetworkError(
                    f"the split of {side!r} has {len(parts)} parts, and the line's side has {len(groups[0])}: "
                    f"{' '.join(groups[0])}",
                    line=str(self.network),
                    remedy=f"write a group of {len(parts)} indices in the output, such as "
                    f"({' '.join(f'{side[0]}{k}' for k in range(1, len(parts) + 1))})",
                )

    def _known(self, what: str, given: Any, known: set[str], kind: str) -> None:
        for name in given:
            if name not in known:
                raise NetworkError(
                    f"{what} names {name!r}, which is none of the {kind}",
                    line=str(self.network),
                    remedy=f"the {kind} are {', '.join(sorted(known)) or 'none'}",
                )

    @property
    def network(self) -> Network:
        """The network of the first line."""
        return self.lines[0].network

    def rule_for(self, site: Site) -> SiteRule:
        """The first line that serves the site.

        Raises:
            NetworkError: none does.
        """
        for line in self.lines:
            if line.serves(site):
                return line
        patterns = ", ".join(repr(line.sites) for line in self.lines)
        raise NetworkError(
            f"no line of {self.name!r} serves {site.proj} ({site.out} x {site.inp})",
            remedy=f"its lines serve {patterns}; leave this projection out of the targets",
        )

    def with_ranks(self, **ranks: int | str) -> Factorization:
        """The same factorization with some ranks changed."""
        return replace(self, ranks={**self.ranks, **ranks})

    def sizes(self, given: Sizes | None = None, /, *, line: SiteRule | None = None, **more: Size) -> dict[str, Size]:
        """Sizes of the line's indices: ``given``, with ranks, splits and heads filled in.

        ``out`` and ``inp`` are the matrix's features whatever the groups' indices are called, ``heads`` the
        number of attention heads for an index called ``head``. What cannot be worked out yet is left open. What this
        returns may be given again: there ``inp`` of a group ``(inp kh kw)`` is the index's size.

        Raises:
            NetworkError: a split does not fit, a rule names an unknown size, or an index has a name that means
                something else in a model (a bond called ``out``, a stack index in the rows).
        """
        net = (line or self.lines[0]).network
        _refuse_misplaced_names(net)
        given = joined(given, more)
        done = isinstance(given, IndexSizes)
        ints: dict[str, Any] = {name: size for name, size in given.items() if isinstance(size, int)}
        ints |= {r: rank for r, rank in self.ranks.items() if isinstance(rank, int) and r not in given}
        found: dict[str, Size] = {r: ints[r] for r in net.bonds if r in ints}
        for side, group in (("out", net.rows), ("inp", net.cols)):
            if (
                isinstance(given.get(side), int)
                and not done
                and not all(i in given and (i != side or len(group) == 1) for i in group)
            ):
                found |= self._split(net, side, group, ints)
        ints |= {name: size for name, size in found.items() if name not in given}
        for bond, rule in self.ranks.items():
            if isinstance(rule, str) and bond in net.bonds and bond not in given and _ready(rule, ints):
                found[bond] = ints[bond] = check_size(bond, evaluate(rule, ints), str(net))
        parts = {index for group in (net.rows, net.cols) if len(group) > 1 for index in group} & {"out", "inp"}
        known = {**found, **{name: size for name, size in given.items() if done or name not in parts}}
        return IndexSizes({index: known[index] for index in net.indices if index in known})

    def _split(self, net: Network, side: str, group: tuple[str, ...], ints: dict[str, int]) -> dict[str, int]:
        parts = self.splits.get(side, ())
        parts = parts if len(parts) == len(group) or len(self.lines) == 1 else ()  # another line's
        wanted: list[int | None] = [evaluate(part, ints) if isinstance(part, str) else part for part in parts]
        wanted = wanted or [None] * len(group)
        for k, index in enumerate(group):
            if k < len(wanted) and wanted[k] is None:
                heads = ints.get("heads", 0) if index == "head" and len(group) > 1 else 0
                named = len(group) > 1 and index in ints and index not in ("out", "inp")  # these are the features
                wanted[k] = ints[index] if named else (heads or None)
        return split(ints[side], group, wanted, str(net))

    def _repr_html_(self) -> str:
        return factorization_html(self)

    def _repr_svg_(self) -> str | None:
        return svg(self)

    def bind(self, sizes: Sizes | None, keywords: Sizes) -> dict[str, Size]:
        """:func:`bind` with this factorization's ranks and splits filling what is not given."""
        net = self.network
        bind(net, sizes, keywords, extra=("out", "inp", "heads"))
        return bind(net, self.sizes(joined(sizes, keywords)), {})


_FEATURES = {"out": ("rows", "output features"), "inp": ("columns", "input features")}


def _refuse_misplaced_names(net: Network) -> None:
    """Refuse a name that has a meaning in a model where it means something else: no size is taken for another.

    Stack indices stand before the matrix, ``out`` in the rows, ``inp`` in the columns; no bond is called ``heads``.
    """
    stack, bonds = set(net.stack), set(net.bonds)
    for name in net.indices:
        place = "a bond" if name in bonds else "in the rows" if name in net.rows else "in the columns"
        place = "a stack index" if name in stack else place
        if name in STACK and name not in stack:
            problem = f"{name!r} is {place} here, and in a model the stack index of that name"
            remedy = "end the output with two groups, rows (output features) and columns (input features)"
            remedy = "choose another name for the bond" if name in bonds else remedy
        elif name in _FEATURES and place != f"in the {_FEATURES[name][0]}":
            problem = f"{name!r} is {place} here, and in a model the number of {_FEATURES[name][1]}"
            remedy = f"choose another name; {name!r} belongs into the {_FEATURES[name][0]} of the output"
        elif name == "heads" and name in bonds:
            problem, remedy = "'heads' is a bond here, and in a model the number of heads", "choose another name"
        else:
            continue
        line = str(net)
        word = re.compile(rf"(?<!\w){name}(?!\w)")
        found = word.search(line, line.index("[") if name in bonds else line.index("->"))
        raise NetworkError(problem, line=line, position=found.start() if found else None, remedy=remedy)


def _ready(rule: str, sizes: Mapping[str, int]) -> bool:
    try:
        evaluate(rule, sizes)
    except NetworkError:
        return False
    return True


def _refuse_dead_start(net: Network, init: Mapping[str, Any]) -> None:
    zeros = [
        [f.name for f in term.factors if isinstance(s := init.get(net.label(f)), str) and s == "zeros"]
        for term in net.terms
    ]
    alive = {zero[0] for zero in zeros if len(zero) == 1}  # a term in which a factor alone is zero wakes it
    for zero in zeros:
        if len(zero) > 1 and not alive.issuperset(zero):
            names = " and ".join(zero) if len(set(zero)) > 1 else f"{zero[0]} (used twice)"
            raise NetworkError(
                f"{names} both start at zero: no gradient would ever reach them",
                line=str(net),
                remedy="let exactly one factor of a term start at zero",
            )
