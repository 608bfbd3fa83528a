"""Laying an adapter's factors out over a model: sites, arrays, start values, and the checks before any is made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tnpeft.adapters.sites import select
from tnpeft.counting.layout import Layout, Piece, layout
from tnpeft.networks import Factorization, Line, NetworkError, Site
from tnpeft.nn.init import Starter, factor_hash
from tnpeft.registration import PREFIX

if TYPE_CHECKING:
    from tnpeft.adapters.config import TensorNetworkConfig

_MOST = 16  # times the model's own parameters: more is a slip or a hostile file
_LEAST = 2**22  # elements that are always allowed


def base_constants(f: Factorization) -> tuple[str, ...]:
    """Labels of the constant factors that are the base weight itself: read where it lies, never copied.

    >>> base_constants(Factorization.of("d[out] ^W[out inp] -> out inp", init={"W": "base"}))
    ('W',)
    """
    kinds = {line.network.label(factor): factor.kind for line in f.lines for factor in line.network.factors}
    return tuple(
        label for label, kind in kinds.items() if kind == "constant" and f.init.get(label) in ("base", ["base"])
    )


def place(model: nn.Module, modules: Mapping[str, nn.Module], config: TensorNetworkConfig) -> Layout:
    """The layout of the configuration's network on the model's chosen linears.

    The order of layers and projections is written into the configuration; if a file fixed it, it has to agree.

    Raises:
        NetworkError: the network does not fit a linear, needs absurdly many elements, or differs from the file's, or
            the rank pattern has an entry for none of the linears.
    """
    saved = config.loaded
    places = config.projections or {}
    order = sorted(places, key=places.__getitem__) if saved else config.named
    chosen = select(model, modules, order, order or None, config.layers if saved else None)
    if saved and config.projections != chosen.projections:
        raise NetworkError(
            f"the adapter was made for {', '.join(config.projections or {})}, "
            f"and this model offers {', '.join(chosen.projections)}",
            remedy="load it onto the model class that it was trained on",
        )
    found = layout(config.factorization, chosen.sites, [*chosen.projections])
    check_patterns(config.factorization, config.patterns, [placement.site for placement in found.placements])
    count = found.count(frozen=True)
    most = max(_LEAST, _MOST * sum(p.numel() for p in model.parameters()))
    if count > most:
        raise NetworkError(
            f"the network would hold {count:,} elements on this model, of which {most:,} are allowed",
            line=str(config.factorization.network),
            remedy="choose smaller ranks",
        )
    if config.stored is not None:
        check_stored(config, found)
    config.layers, config.projections = dict(chosen.layers), dict(chosen.projections)
    return found


def check_patterns(f: Factorization, patterns: Sequence[str], sites: Sequence[Site]) -> None:
    """Raise if an entry of a rank pattern, or one of the names in it, decides the ranks of no site.

    Raises:
        NetworkError: there is one.

    >>> f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2})
    >>> check_patterns(f, ["v"], [Site(0, "q", 2, 3)])
    Traceback (most recent call last):
    tnpeft.networks.errors.NetworkError: the rank pattern names 'v', and no adapted projection is called so
    the adapted projections are q
    """
    projs = ", ".join(dict.fromkeys(site.proj for site in sites))
    used = {f.line_for(site).sites for site in sites}
    for pattern in patterns:
        for name in map(str.strip, pattern.split("|")):
            if not any(Line(f.network, name).serves(site) for site in sites):
                raise NetworkError(
                    f"the rank pattern names {name!r}, and no adapted projection is called so",
                    remedy=f"the adapted projections are {projs}",
                )
        if pattern not in used:
            raise NetworkError(
                f"the rank pattern's entry {pattern!r} is never used: earlier entries take all its projections",
                remedy="put it before them, or leave it out",
            )


def check_stored(config: TensorNetworkConfig, found: Layout) -> None:
    """Raise unless the file beside the configuration holds exactly the arrays of the layout."""
    from tnpeft.adapters.files import check_shapes

    check_shapes(config.stored or {}, expected_shapes(config, found))


def expected_shapes(config: TensorNetworkConfig, found: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of every array that a file of this adapter holds, by its name in the model."""
    kinds = ("trainable", "frozen") if config.save_frozen else ("trainable",)
    shapes = {
        f"{piece.home or 'factor_bank'}.{PREFIX}factors.{piece.key}": piece.shape
        for piece in found.pieces
        if piece.kind in kinds
    }
    if config.dora:
        rows: dict[str, int] = {}
        for placement in found.placements:
            site = placement.site
            rows[site.module] = max(rows.get(site.module, 0), site.start + site.out)
        shapes |= {f"{module}.{PREFIX}magnitude": (out,) for module, out in rows.items()}
    return shapes


def start_values(config: TensorNetworkConfig, found: Layout, weight: Callable[[Site], Tensor]) -> dict[Piece, Tensor]:
    """The start value of every array of the layout, fp32 on the CPU; the base weight itself is left out.

    Raises:
        NetworkError: a frozen factor is not the one that the adapter was trained with.
    """
    starter = Starter(found, config.seed, weight)
    constants = base_constants(config.factorization)
    values = {piece: starter(piece) for piece in found.pieces if piece.label not in constants}
    hashes = frozen_hashes(values)
    if config.loaded and not config.save_frozen and (config.frozen or {}) != hashes:
        changed = sorted(label for label in hashes if (config.frozen or {}).get(label) != hashes[label])
        raise NetworkError(
            f"the frozen factor {', '.join(changed) or 'of the file'} regenerated from seed {config.seed} "
            "is not the one that the adapter was trained with",
            remedy="save the adapter with save_frozen=True where it was trained, then load that",
        )
    config.frozen = hashes
    return values


def frozen_hashes(values: Mapping[Piece, Tensor]) -> dict[str, str]:
    """A short hash of every frozen factor, by label, over its arrays in the layout's order.

    >>> frozen_hashes({})
    {}
    """
    found: dict[str, str] = {}
    for piece, value in values.items():
        if piece.kind == "frozen":
            chain = found.get(piece.label, "") + factor_hash(value)
            found[piece.label] = hashlib.sha256(chain.encode()).hexdigest()[:16]
    return found
