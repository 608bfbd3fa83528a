"""Which arrays a factorization needs over a selection of sites: one rule for counting, storing and saving them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from tnpeft.networks import STACK, Factorization, Network, NetworkError, Site, SiteRule
from tnpeft.networks.factor import Factor, Group, Kind
from tnpeft.networks.sizes import Size, bind, check_size, integers

# The order of projections when the user gives none; names outside it follow in alphabetical order.
_ORDER = (
    ("q_proj", "query", "q", "c_attn/out:0", "qkv", "qkv_proj", "q_a_proj", "q_b_proj"),
    ("k_proj", "key", "k", "c_attn/out:1", "kv_a_proj_with_mqa", "kv_b_proj"),
    ("v_proj", "value", "v", "c_attn/out:2"),
    ("o_proj", "out_proj", "o", "attn_output", "attn_c_proj"),
    ("fc1", "gate_proj", "c_fc", "intermediate", "gate_up_proj", "experts_gate_up_proj"),
    ("up_proj",),
    ("fc2", "down_proj", "c_proj", "output", "mlp_c_proj", "experts_down_proj"),
)


_MOST_AXES = 64
_PLACE = ("layer", "proj")


@dataclass(frozen=True)
class ParameterSpec:
    """One stored array of a factor: what a model holds as one Parameter, without its layer and proj axes.

    ``layer`` and ``proj`` say which value of these indices the param belongs to, None where the factor is shared
    over them. ``home`` is the module that owns it, ``""`` for one shared by several sites; ``key`` is unique there.
    What two lines share is one param, however they call its indices.

    >>> f = Factorization.of("B[layer out r] A[r inp] -> layer out inp", ranks={"r": 2})
    >>> [(p.label, p.shape, p.layer) for p in layout(f, [Site(0, "q", 8, 4), Site(1, "q", 8, 4)]).parameters]
    [('B', (8, 2), 0), ('A', (2, 4), None), ('B', (8, 2), 1)]
    """

    label: str
    kind: Kind
    indices: Group = field(compare=False)
    shape: tuple[int, ...]
    layer: int | None
    proj: str | None
    home: str
    key: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class SiteLayout:
    """A site with its line, the network of this one site, its sizes, and its pieces by factor label.

    >>> f = Factorization.of("B[layer out r] A[r inp] -> layer out inp", ranks={"r": 2})
    >>> its = layout(f, [Site(0, "q", 8, 4)]).site_layouts[0]
    >>> str(its.network), its.sizes, [*its.parameters]
    ('B[out r] A[r inp] -> out inp', {'layer': 1, 'out': 8, 'r': 2, 'inp': 4}, ['B', 'A'])
    """

    site: Site
    line: SiteRule
    network: Network
    sizes: Mapping[str, int]
    parameters: Mapping[str, ParameterSpec]


@dataclass(frozen=True)
class Shape:
    """Sites of one line and one shape: the first of them, the line, its sizes over these sites, and their number.

    ``site`` is None where sizes are given by hand.
    """

    site: Site | None
    network: Network
    sizes: Mapping[str, Size]
    count: int

    def __str__(self) -> str:
        return f"{self.site.proj} {self.site.out} x {self.site.inp}" if self.site else ""


@dataclass(frozen=True)
class Layout:
    """A factorization over a selection of sites.

    ``layers`` and ``projs`` give the order of the layer and proj axes when factors are stacked.

    >>> f = Factorization.of("B[layer out r] A[r inp] -> layer out inp", ranks={"r": 2})
    >>> its = layout(f, [Site(0, "q", 8, 4), Site(1, "q", 8, 4)])
    >>> its.layers, its.projs, its.count(), its.by_factor()
    ((0, 1), ('q',), 40, {'B': 32, 'A': 8})
    """

    factorization: Factorization
    site_layouts: tuple[SiteLayout, ...]
    layers: tuple[int, ...]
    projs: tuple[str, ...]

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """Every stored array once, in order of first use."""
        return tuple(dict.fromkeys(param for p in self.site_layouts for param in p.parameters.values()))

    def count(self, *, frozen: bool = False) -> int:
        """Elements of all trainable pieces; with ``frozen`` those of the frozen ones as well."""
        return sum(self.by_factor(frozen=frozen).values())

    def shapes(self) -> tuple[Shape, ...]:
        """The distinct pairs of line and sizes, each with the number of its sites, in order of first use.

        The sizes of ``layer`` and ``proj`` are those of these sites. Where they are not a full grid, each projection
        is a shape of its own.

        >>> f = Factorization.of("B[layer out r] A[r inp] -> layer out inp", ranks={"r": 2})
        >>> [(s.sizes, s.count) for s in layout(f, [Site(0, "q", 8, 4), Site(1, "q", 8, 4)]).shapes()]
        [({'layer': 2, 'out': 8, 'r': 2, 'inp': 4}, 2)]
        """
        alike: dict[tuple[Network, tuple[tuple[str, int], ...]], list[SiteLayout]] = {}
        for place in self.site_layouts:
            alike.setdefault((place.line.network, tuple(place.sizes.items())), []).append(place)
        found = []
        for (net, sizes), places in alike.items():
            full = len(places) == len({p.site.layer for p in places}) * len({p.site.proj for p in places})
            for proj in dict.fromkeys("" if full else p.site.proj for p in places):
                sites = [p.site for p in places if proj in ("", p.site.proj)]
                held = {"layer": len({site.layer for site in sites}), "proj": len({site.proj for site in sites})}
                own = {index: held.get(index, size) for index, size in sizes}
                found.append(Shape(sites[0], net, own, len(sites)))
        return tuple(found)

    def by_factor(self, *, frozen: bool = False) -> dict[str, int]:
        """Elements of each trainable factor over the whole selection; with ``frozen`` of the frozen ones as well."""
        kinds = ("trainable", "frozen") if frozen else ("trainable",)
        counts: dict[str, int] = {}
        for param in self.parameters:
            if param.kind in kinds:
                counts[param.label] = counts.get(param.label, 0) + param.size
        return counts


def layout(
    f: Factorization, sites: Iterable[Site], projs: Sequence[str] = (), *, stack: Mapping[str, int] | None = None
) -> Layout:
    """Place a factorization on sites.

    A factor is stored once for every value of ``layer`` and ``proj`` that it carries and for every distinct
    shape; every other sharing is by not carrying the index. Any other stack index stays an axis of the array:
    ``expert`` has the site's number of experts (1 for a linear, which is one expert), ``stack`` gives the sizes of
    ``task``, ``replica`` and further ones. ``projs`` fixes the order of the projections.

    Raises:
        NetworkError: a line does not fit a site (the message names it), or a stack index has no meaning in a model.

    >>> f = Factorization.of("B[layer proj out r] A[r inp] -> layer proj out inp", ranks={"r": 2})
    >>> two = layout(f, [Site(0, "q_proj", 8, 8), Site(1, "q_proj", 8, 8)])
    >>> two.by_factor()
    {'B': 32, 'A': 16}
    """
    chosen = tuple(param for site in sites for param in (site.squares() if f.square else (site,)))
    if not chosen:
        raise NetworkError("no site is selected", remedy="check the targets against the model's projections")
    lines = [f.rule_for(site) for site in chosen]
    served: dict[SiteRule, list[Site]] = {}
    for site, line in zip(chosen, lines, strict=True):
        served.setdefault(line, []).append(site)
    networks = {line: line.network.select(*(i for i in line.network.stack if i in _PLACE)) for line in served}
    alike: dict[tuple[Any, ...], tuple[dict[str, int], list[_Piece]]] = {}  # what sites of one shape have in common
    shapes: dict[str, set[tuple[int, ...]]] = {}
    found = []
    for site, line in zip(chosen, lines, strict=True):
        key = line, site.out, site.inp, site.heads, site.experts, site.kernel
        if key not in alike:
            places = {index: len({getattr(its, index) for its in served[line]}) for index in _PLACE}
            sizes = _site_sizes(f, line, site, {**(stack or {}), **places})
            alike[key] = sizes, [_piece(line.network, factor, sizes) for factor in line.network.factors]
            for label, _, _, shape in alike[key][1]:
                shapes.setdefault(label, set()).add(shape)
        found.append((site, line, *alike[key]))
    site_layouts = tuple(
        SiteLayout(
            site,
            line,
            networks[line],
            sizes,
            {piece[0]: _parameter(site, piece, len(shapes[piece[0]]) > 1) for piece in pieces},
        )
        for site, line, sizes, pieces in found
    )
    layers = tuple(sorted({site.layer for site in chosen}))
    return Layout(f, site_layouts, layers, sorted_projs({site.proj for site in chosen}, projs))


def sorted_projs(names: Iterable[str], wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """Projection names in the user's order, else q, k, v, o, fc1 (gate, up), fc2 (down), else by name.

    >>> sorted_projs({"v_proj", "fc2", "q_proj"})
    ('q_proj', 'v_proj', 'fc2')
    """

    def place(name: str) -> tuple[int, int, int, str]:
        base, _, param = name.partition("/")
        user = next((k for k, w in enumerate(wanted) if w in (name, base)), len(wanted))
        known = next((k for k, names in enumerate(_ORDER) if name in names or base in names), len(_ORDER))
        number = param.rpartition(":")[2]
        return user, known, int(number) if number.isdigit() else 0, name

    return tuple(sorted(names, key=place))


def stack_sizes(f: Factorization, given: Mapping[str, Size]) -> dict[str, int]:
    """The sizes among ``given`` of the stack indices that no model decides: all but layer, proj and expert.

    >>> f = Factorization.of("A[scene out inp] -> scene out inp")
    >>> stack_sizes(f, {"scene": 24, "layer": 3})
    {'scene': 24}
    """
    named = dict.fromkeys(index for line in f.lines for index in line.network.stack)
    return {i: check_size(i, given[i]) for i in named if i in given and i not in ("layer", "proj", "expert")}


def _site_sizes(f: Factorization, line: SiteRule, site: Site, stack: dict[str, int]) -> dict[str, int]:
    given = {"out": site.out, "inp": site.inp, "heads": site.heads}
    stack = {**stack, "expert": max(site.experts, 1)}
    if not f.splits.get("inp") and len(line.network.cols) > 1:
        given |= {tap: size for tap, size in site.taps.items() if tap in line.network.cols}
    unknown = [i for i in line.network.stack if i not in STACK and i not in stack]
    if unknown:
        raise NetworkError(
            f"the stack index {unknown[0]!r} has no meaning in a model",
            line=str(line.network),
            remedy=f"name stack indices from {', '.join(STACK)}, or give the size of {unknown[0]!r}: "
            f'stack={{"{unknown[0]}": 2}} in a configuration',
        )
    _check_axes(line.network)
    try:
        sizes = f.sizes({**stack, **{k: v for k, v in given.items() if v}}, line=line)
        return integers(line.network, bind(line.network, sizes, {}))
    except NetworkError as error:
        where = f"layer {site.layer}, {site.proj} ({site.out} x {site.inp})"
        raise NetworkError(
            f"{where}: {error.problem}", line=error.line, position=error.position, remedy=error.remedy
        ) from None


def _check_axes(net: Network) -> None:
    """Refuse what no array can hold: numpy and torch know at most 64 axes."""
    axes = {f"factor {factor.name!r}": len(factor.indices) for factor in net.factors}
    axes["the matrix with its activations"] = len(net.rows) + len(net.cols) + 1
    what, most = max(axes.items(), key=lambda item: item[1])
    if most > _MOST_AXES:
        raise NetworkError(
            f"{what} has {most} indices, and an array at most {_MOST_AXES} axes",
            line=str(net),
            remedy="fuse indices that always stand together into one",
        )


_Piece = tuple[str, Factor, Group, tuple[int, ...]]  # label and factor, its axes without layer and proj, their sizes


def _piece(net: Network, factor: Factor, sizes: Mapping[str, int]) -> _Piece:
    indices = tuple(index for index in factor.indices if index not in _PLACE)
    return net.label(factor), factor, indices, tuple(sizes[index] for index in indices)


def _parameter(site: Site, piece: _Piece, several: bool) -> ParameterSpec:
    """The array of a factor at a site; ``several``: there are others of other shapes."""
    label, factor, indices, shape = piece
    layer = site.layer if "layer" in factor.indices else None
    proj = site.proj if "proj" in factor.indices else None
    if layer is not None and proj is not None and len(site.paths) == 1:  # what several layers share is the bank's
        home, key = site.module or f"{site.layer}/{site.proj}", label
        if "/" in site.proj:
            key += "@" + site.proj.partition("/")[2]
    else:
        home, key = "", label
        key += "" if layer is None else f"@{layer}"
        key += "" if proj is None else f"@{proj}"
        key += "#" + "x".join(map(str, shape)) if several else ""
    return ParameterSpec(label, factor.kind, indices, shape, layer, proj, home, key)
