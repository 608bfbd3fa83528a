"""Sites of one shape without a model: a card made from bare sizes, for whatever asks for a model."""

from __future__ import annotations

from collections.abc import Mapping

from tnpeft.models.cards import Card, Projection
from tnpeft.networks import NetworkError
from tnpeft.networks.sizes import Size, check_size

SIZES = ("out", "inp", "layer", "proj", "heads")


def bare(sizes: Mapping[str, Size]) -> Card:
    """A card of ``layer`` x ``proj`` linears (by default one) of ``out`` x ``inp`` features, with ``heads`` if given.

    Raises:
        NetworkError: ``out`` or ``inp`` is missing, or a size is not a positive integer.

    >>> from tnpeft.models.cards import groups, sites
    >>> its = bare({"out": 64, "inp": 32, "layer": 3, "proj": 2})
    >>> [str(group) for group in groups(sites(its))]
    ['6 sites of 64 x 32: proj0, proj1']
    """
    missing = [name for name in ("out", "inp") if name not in sizes]
    if missing:
        raise NetworkError(
            f"neither a model nor the size of {missing[0]!r}",
            remedy="pass model=..., or out=..., inp=..., layer=..., proj=...",
        )
    known: dict[str, int] = {}
    for name in SIZES:
        size = check_size(name, sizes[name]) if name in sizes else 0
        if not isinstance(size, int):
            raise NetworkError(f"the size of {name!r} is the symbol {size}", remedy="pass a whole number")
        known[name] = size
    out, inp = known["out"], known["inp"]
    projections = tuple(
        Projection(f"proj{k}", "q", f"proj{k}", out, inp, known["heads"]) for k in range(known["proj"] or 1)
    )
    named = tuple(projection.name for projection in projections)
    return Card(f"{out} x {inp}", known["layer"] or 1, known, "layers", projections, named, "0")
