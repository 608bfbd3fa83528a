"""Start values: what a factor holds before training, by its name, the seed and its sites alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from tnpeft.layout import Layout, ParameterSpec, SiteLayout
from tnpeft.networks import Factorization, NetworkError, Site
from tnpeft.nn.init import patterns
from tnpeft.nn.init.philox import Array, normal, orthonormal, uniform
from tnpeft.nn.init.specs import start
from tnpeft.scaling import starts
from tnpeft.scaling.gain import least_variances
from tnpeft.scaling.starts import Spec

_Key = tuple[int, str]  # seed and label, to which layer and proj are added


def factor_hash(tensor: Tensor) -> str:
    """A short hash of a factor's shape and its fp32 values, the same on every machine.

    >>> factor_hash(torch.zeros(2, 3))
    '910238ea1f5f785d'
    """
    array = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4")
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:16]


class Initializer:
    """Start values of every param of a layout: ``starter(param)`` is an fp32 tensor of ``param.shape`` on the CPU.

    Named starts are those of ``Factorization.init``; a list or an array is a start too, of a param's shape or with
    the factor's layer and proj axes as declared. What is not named follows two rules:

    - *One zero factor.* In every term in which no factor is named zero, the first trainable factor that is not
      named starts at zero, so that the update is zero and a gradient reaches that factor. A network with frozen
      twins (``~G`` beside ``G``) starts at zero by the difference and gets none. A term whose trainable factors are
      all named starts as declared.
    - *Variance.* The others are normal with one standard deviation per term, such that the term's gain
      (:func:`tnpeft.gain`) is ``1 / sqrt(columns)``: one signed unit step of the zero factor moves the outputs of a
      unit-variance input by one. Where no factor of the term is zero, the entries of the update have that RMS at the
      start. Independent zero-mean factors give entries of ``prod(std) * sqrt(prod(summed sizes))``, the bonds of the
      zero factor among them; named factors count with their own root mean square, data as 1, ``unit_norm`` factors
      as normalised (they start with columns of length one). A factor in several sites or terms takes the smallest
      standard deviation that they ask for.

    Fan-in is the number of entries that one output of the factor sums: all but its row indices if it has any, else
    its column indices, else its last axis; fan-out is the mirror image. ``kaiming`` is uniform within
    ``1 / sqrt(fan-in)`` (LoRA's A), ``xavier`` within ``sqrt(6 / (fan-in + fan-out))``. ``orthogonal`` and ``eye``
    see a matrix: the axes split in the middle; the core of a block term, ``G[t a b]``, is one for each ``t``; for
    them and ``dct`` a vector that is stored per layer or projection is a row of the matrix that these make.

    Random numbers are raw Philox words keyed by (seed, label, layer, proj): they depend on nothing else, and the
    seed, not the process, decides them. A frozen twin repeats its factor's start. A slice of a ``replica`` axis
    starts as a run with the seed plus its number would; slices of other stack axes are drawn apart.

    Args:
        layout: the factorization on its sites.
        seed: of all random factors.
        weight: the base weight of a site, fp32 ``[out, inp]``; called by svd, tt_svd and base only.

    Raises:
        NetworkError: a start does not fit its factor or is not finite, or two factors of a term would start at zero.

    >>> from tnpeft.networks import Factorization
    >>> from tnpeft.layout import layout
    >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2}, init={"A": "kaiming"})
    >>> starter = Initializer(layout(f, [Site(0, "q_proj", 4, 8)]), seed=0)
    >>> {param.label: tuple(starter(param).shape) for param in starter.layout.parameters}
    {'B': (4, 2), 'A': (2, 8)}
    """

    def __init__(self, layout: Layout, seed: int = 0, weight: Callable[[Site], Tensor] | None = None) -> None:
        self.layout, self.seed, self._weight = layout, seed, weight
        self._places: dict[ParameterSpec, list[SiteLayout]] = {}
        for site_layout in layout.site_layouts:
            for param in site_layout.parameters.values():
                self._places.setdefault(param, []).append(site_layout)
        self._named = {label: start(value, label) for label, value in layout.factorization.init.items()}
        _require_constants(layout.factorization)
        its = starts.Starts(layout.factorization, self._named)
        self.zeros, self.away = its.zeros, its.nonzero()
        self._variances = least_variances(layout, starts.Starts.of(layout.factorization))  # in double precision
        self._parts = lru_cache(maxsize=1)(self._svd_of)
        self._trains: dict[tuple[Site, int], dict[str, Tensor]] = {}

    def __call__(self, param: ParameterSpec) -> Tensor:
        """The start value of one param.

        Raises:
            NetworkError: the start does not fit the factor, or is not finite in fp32.
        """
        with np.errstate(over="ignore"):
            value = self._made(param)
        if not torch.isfinite(value).all():
            raise NetworkError(
                f"the start of factor {param.label!r} is not finite: {self._start_of(param)} overflows fp32",
                line=str(self._places[param][0].line.network),
                remedy="choose a start of smaller numbers",
            )
        return value

    def _made(self, param: ParameterSpec) -> Tensor:
        site_layout = self._places[param][0]
        if param.label.startswith("~"):
            twin = site_layout.parameters[param.label[1:]]
            if (twin.shape, twin.layer, twin.proj) != (param.shape, param.layer, param.proj):
                raise NetworkError(
                    f"~{twin.label} cannot repeat the start of {twin.label}",
                    line=str(site_layout.line.network),
                    remedy="let the two carry the same stack indices",
                )
            return self._made(twin)
        start = self._start_of(param)
        if isinstance(start, Tensor):
            return self._from_array(start, param)
        value = self._value(start, param, site_layout, (self.seed, param.label))
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value, dtype=np.float32))
        return tensor.to("cpu", torch.float32, copy=True).reshape(param.shape).contiguous()

    def _start_of(self, param: ParameterSpec) -> Spec | Tensor:
        if (named := self._named.get(param.label)) is not None:
            return named
        return Spec("zeros") if param.label in self.zeros else Spec("normal", (self._spread(param),))

    def _value(self, spec: Spec, param: ParameterSpec, site_layout: SiteLayout, key: _Key) -> Array | Tensor:
        if spec.name in starts.FROM_BASE:
            return self._from_weight(spec, param)
        apart = {*site_layout.network.stack}
        if spec.name in ("orthogonal", "eye"):
            apart |= {*starts.batch_bonds(param.indices, site_layout.line.network)}
        stacked = next((axis for axis, index in enumerate(param.indices) if index in apart), None)
        if stacked is not None:
            return self._slices(spec, param, site_layout, key, stacked)
        if spec.name in ("zeros", "ones", "constant"):
            fill = {"zeros": 0.0, "ones": 1.0}.get(spec.name)
            return np.full(param.shape, spec.numbers[0] if fill is None else fill)
        if spec.name in ("normal", "uniform", "kaiming", "xavier"):
            draw = normal if spec.name == "normal" else uniform
            return draw(param.size, *key, param.layer, param.proj) * starts.spread(
                spec, param.indices, site_layout.network, site_layout.sizes
            )
        if spec.name in ("orthogonal", "eye") or (spec.name == "dct" and len(param.shape) == 1):
            return self._matrix(spec, param, key)
        return (patterns.dct if spec.name == "dct" else patterns.circulant)(param, site_layout)

    def _slices(self, spec: Spec, param: ParameterSpec, site_layout: SiteLayout, key: _Key, axis: int) -> Array:
        """A factor over a stack index or blocks; a replica starts as its own run with the next seed would."""
        part = replace(
            param,
            indices=param.indices[:axis] + param.indices[axis + 1 :],
            shape=param.shape[:axis] + param.shape[axis + 1 :],
        )
        seed, label = key
        alone = param.indices[axis] == "replica"
        keys = [(seed + k, label) if alone else (seed, f"{label}/{k}") for k in range(param.shape[axis])]
        return np.stack([np.reshape(self._value(spec, part, site_layout, each), part.shape) for each in keys], axis)

    def _matrix(self, spec: Spec, param: ParameterSpec, key: _Key) -> Array:
        shape, row, where = param.shape, -1, (param.layer, param.proj)
        axes = [axis for index in ("layer", "proj") if (axis := self._position(index, param))]
        if len(shape) == 1 and axes:
            row = 0
            for position, length in axes:
                row = row * length + position
            shape, where = (prod(length for _, length in axes), *shape), (None, None)
        rows = prod(shape[: len(shape) // 2])
        columns = prod(shape) // rows
        if spec.name == "orthogonal":
            matrix = orthonormal(normal(rows * columns, *key, *where).reshape(rows, columns))
        else:
            matrix = np.eye(rows, columns) if spec.name == "eye" else patterns.cosines(rows, columns)
        return matrix if row < 0 else matrix[row]

    # ---- arrays and the base weight

    def _from_array(self, array: Tensor, param: ParameterSpec) -> Tensor:
        net = self._places[param][0].line.network
        inner = iter(param.shape)
        axes = [self._position(index, param) for index in net.factor(param.label).indices]
        stacked = tuple(next(inner) if axis is None else axis[1] for axis in axes)
        if tuple(array.shape) == stacked:
            array = array[tuple(slice(None) if axis is None else axis[0] for axis in axes)]
        if tuple(array.shape) != param.shape:
            shapes = " or ".join(map(str, dict.fromkeys((param.shape, stacked))))
            raise NetworkError(
                f"the start of factor {param.label!r} has the shape {tuple(array.shape)}",
                line=str(net),
                remedy=f"pass an array of shape {shapes}",
            )
        return array.clone(memory_format=torch.contiguous_format)

    def _position(self, index: str, param: ParameterSpec) -> tuple[int, int] | None:
        """Return the param's place on a layer or proj axis, and the axis's length; None for any other index."""
        if index == "layer" and param.layer is not None:
            return self.layout.layers.index(param.layer), len(self.layout.layers)
        if index == "proj" and param.proj is not None:
            return self.layout.projs.index(param.proj), len(self.layout.projs)
        return None

    def _from_weight(self, spec: Spec, param: ParameterSpec) -> Tensor:
        if len(self._places[param]) > 1:
            raise NetworkError(
                f"factor {param.label!r} serves {len(self._places[param])} sites and cannot start as {spec.name!r}",
                remedy="the base weight differs from site to site: let the factor carry layer and proj",
            )
        site_layout = self._places[param][0]
        if spec.name == "base":
            return patterns.base(param, site_layout, self._base(site_layout.site))
        if not site_layout.site.experts:
            return self._of_matrix(spec, param, site_layout, -1)
        if "expert" not in param.indices:
            raise NetworkError(
                f"factor {param.label!r} serves {site_layout.site.experts} experts and cannot start as {spec.name!r}",
                line=str(site_layout.line.network),
                remedy="the base weight differs from expert to expert: let the factor carry expert",
            )
        one = without_experts(site_layout)
        own = one.parameters[param.label]
        every = range(site_layout.site.experts)
        return torch.stack([self._of_matrix(spec, own, one, k) for k in every], param.indices.index("expert"))

    def _of_matrix(self, spec: Spec, param: ParameterSpec, site_layout: SiteLayout, expert: int) -> Tensor:
        """Return a factor's part of a decomposition of a site's base matrix, or of that of one of its experts."""
        if spec.name == "tt_svd":
            return self._cores(site_layout, expert)[param.label]
        power = spec.numbers[0] if spec.numbers else None
        u, s, vt = self._parts(site_layout.site, expert)
        parts = (u, s, vt) if spec.name == "svd" else (u.flip(1), s.flip(0), vt.flip(0))
        return patterns.svd(param, site_layout, parts, power)

    def _base(self, site: Site) -> Tensor:
        if self._weight is None:
            raise NetworkError(
                "this start needs the base weight", remedy="pass weight=, a function from a site to its [out, inp]"
            )
        weight = self._weight(site).detach().to("cpu", torch.float32)
        if not torch.isfinite(weight).all():
            raise NetworkError(
                f"the base weight of {site.module or site.proj} is not finite, and factors start from it",
                remedy="check the model, or name another start",
            )
        return weight

    def _matrix_of(self, site: Site, expert: int) -> Tensor:
        return self._base(site) if expert < 0 else self._base(site)[expert]

    def _cores(self, site_layout: SiteLayout, expert: int) -> dict[str, Tensor]:
        key = site_layout.site, expert
        if key not in self._trains:
            self._trains = {key: self._tt_svd_of(site_layout, expert)}  # of one matrix at a time
        return self._trains[key]

    def _svd_of(self, site: Site, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        return patterns.signed_svd(self._matrix_of(site, expert))

    def _tt_svd_of(self, site_layout: SiteLayout, expert: int) -> dict[str, Tensor]:
        labels = [label for label in site_layout.parameters if self._named.get(label) == Spec("tt_svd")]
        return patterns.tt_svd(labels, site_layout, self._matrix_of(site_layout.site, expert))

    def _spread(self, param: ParameterSpec) -> float:
        """The standard deviation of a factor that is not named, by the variance rule."""
        if param.label in self.layout.factorization.unit_norm:
            site_layout = self._places[param][0]
            return float(starts.unit_size(param.indices, site_layout.network, site_layout.sizes) ** -0.5)
        return float(self._variances[param] ** 0.5)


def without_experts(site_layout: SiteLayout) -> SiteLayout:
    """One expert of a site: the same without the index ``expert``.

    >>> from tnpeft.networks import Factorization
    >>> from tnpeft.layout import layout
    >>> f = Factorization.of("B[expert out r] A[r inp] -> expert out inp", ranks={"r": 2})
    >>> one = without_experts(layout(f, [Site(0, "down", 4, 8, experts=3)]).site_layouts[0])
    >>> print(one.network, one.parameters["B"].shape)
    B[out r] A[r inp] -> out inp (4, 2)
    """
    net = site_layout.network
    parameters = {}
    for label, param in site_layout.parameters.items():
        kept = [k for k, index in enumerate(param.indices) if index != "expert"]
        indices, shape = tuple(param.indices[k] for k in kept), tuple(param.shape[k] for k in kept)
        parameters[label] = replace(param, indices=indices, shape=shape)
    sizes = {index: size for index, size in site_layout.sizes.items() if index != "expert"}
    network = net.select("expert") if "expert" in net.stack else net
    return replace(site_layout, network=network, sizes=sizes, parameters=parameters)


def _require_constants(f: Factorization) -> None:
    """Refuse a constant without a value: it is data, such as a mask, and nothing can be drawn for it."""
    for rule in f.lines:
        for factor in rule.network.factors:
            if factor.kind == "constant" and factor.name not in f.init:
                line = str(rule.network)
                raise NetworkError(
                    f"the constant {factor.name!r} has no value",
                    line=line,
                    position=line.index(str(factor)),
                    remedy=f'pass init={{{factor.name!r}: an array}}, or "base" (the base weight), "eye", "ones" ...',
                )
