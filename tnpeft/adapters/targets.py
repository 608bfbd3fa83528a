"""From the modules of a model to the sites of a network: which layer, which projection, which slice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tnpeft.adapters.experts.listed import lists
from tnpeft.adapters.sites.weight import Weight, held_weights
from tnpeft.layout import sorted_projs
from tnpeft.models import cards
from tnpeft.networks import NetworkError, Site

# Attention projections by name, for models without a card: of all heads, and of grouped ones.
_ALL_HEADS = ("q_proj", "query", "q", "q_lin", "o_proj", "out_proj", "o", "out_lin")
_GROUPED = ("k_proj", "key", "k", "k_lin", "v_proj", "value", "v", "v_lin")
_NUMBERED = re.compile(r"(?P<layer>(?:.*?\.)?\d+)\.(?P<inside>.+)")


@dataclass(frozen=True)
class Selection:
    """The sites of an adapter on a model, and the order of its layers and projections as explicit maps."""

    sites: tuple[Site, ...]
    layers: Mapping[str, int]
    projections: Mapping[str, int]


_Place = tuple[str, Site]  # the path of a layer, and a site in it whose layer has no number yet


def card_of(model: nn.Module) -> cards.Card | None:
    """The card of the model's architecture, None if it is not among those known."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    try:
        return cards.card(config)
    except NetworkError:
        return None


def resolve(model: nn.Module, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Targets as names that end modules' paths, and the projections meant where targets name or role them.

    A target that ends some linear's path stays. Any other is looked up in the model's card: ``"c_attn/out:0"`` and
    the role ``"q"`` are the first slice of GPT-2's ``attn.c_attn``, ``"intermediate"`` BERT's ``intermediate.dense``.
    """
    card = card_of(model)
    modules = [*model.named_modules()]
    held = [(name, weight) for name, module in modules for weight in held_weights(module)]
    fused = [f"{name}.{weight.name}" for name, weight in held if weight.grouped]
    paths = [name for name, module in modules if hasattr(module, "weight")] + fused + [*lists(model)]
    others = [name for name, _ in modules]
    others += [f"{name}.{its}" for name, weight in held for its in (weight.name, weight.child)]
    found: list[str] = []
    named: list[str] = []
    for target in targets:
        known = [p for p in card.projections if p.called(target) or p.name == target] if card else []
        if any(f".{path}".endswith(f".{target}") for path in (others if not known else paths)):
            found.append(target)
            named += [p.name for p in known if f".{p.path}".endswith(f".{target}")]
        elif card is not None:
            chosen = card.select([target])
            found += [p.path for p in chosen]
            named += [p.name for p in chosen]
        else:
            raise NetworkError(f"no module is called {target!r}", remedy="give the end of a module's path")
    return [*dict.fromkeys(found)], [*dict.fromkeys(named)]


def select(
    model: nn.Module,
    weights: Mapping[str, Weight],
    order: Sequence[str] = (),
    layers: Mapping[str, int] | None = None,
) -> Selection:
    """The sites of the chosen weights, layer by layer.

    A model whose architecture has a card gets the card's projections, heads and slices of fused linears. In any
    other, the first number in a path is the layer, and the path's last name, or as much of its end as tells the
    modules of a layer apart, the projection.

    Args:
        model: the model that the weights stand in.
        weights: the chosen ones by path.
        order: projections as the user ordered them, to which those of the card are limited; others follow as in
            :func:`sorted_projs`.
        layers: a saved order of layers, path to position, that has to be met.
    """
    card = card_of(model)
    keep = {*order}
    known = [place for name, weight in weights.items() for place in _known(card, name, weight, keep)]
    names = {site.module for _, site in known}
    found = [(layer, site) for layer, site in known if not keep or site.proj in keep]
    found += _by_pattern(model, {name: weight for name, weight in weights.items() if name not in names}, keep)
    _check_apart(found)
    _check_layers({layer for layer, _ in found}, layers)
    places = layers or {name: k for k, name in enumerate(sorted({layer for layer, _ in found}, key=natural))}
    projs = sorted_projs({site.proj for _, site in found}, order)
    sites = [replace(site, layer=places[layer]) for layer, site in found]
    sites.sort(key=lambda site: (site.layer, projs.index(site.proj)))
    return Selection(tuple(sites), places, {proj: k for k, proj in enumerate(projs)})


def on_card(card: cards.Card | None, path: str) -> Iterator[tuple[str, cards.Projection]]:
    """The path of the layer and the projections of a card that a module's path stands for."""
    for p in card.projections if card else ():
        match = re.fullmatch(rf"((?:.*\.)?{re.escape(card.stem)}\.\d+)\.{re.escape(p.path)}", path)  # type: ignore[union-attr]
        if match:
            yield match[1], p


def shared_input_groups(model: nn.Module, sites: Iterable[Site]) -> list[tuple[str, ...]]:
    """The paths of linears that read one and the same input, as far as the model's card says so."""
    card = card_of(model)
    known = {} if card is None else {p.name: p for p in card.projections}
    found: dict[tuple[int, str], list[str]] = {}
    for site in sites:
        p = known.get(site.proj)
        if p is not None and not site.experts and f".{site.module}".endswith(f".{p.path}"):
            found.setdefault((site.layer, p.reads), []).append(site.module)
    return [tuple(modules) for modules in found.values() if len({*modules}) == len(modules) > 1]


def _known(card: cards.Card | None, name: str, weight: Weight, keep: set[str]) -> list[_Place]:
    """The places of a weight by the model's card; none if the card does not know it as it is.

    Fused experts are one place if ``keep`` names the whole weight and none of its slices.
    """
    found = [
        (layer, Site(0, p.name, p.out, p.inp, p.heads, name, p.start, p.experts)) for layer, p in on_card(card, name)
    ]
    out, own = weight.out_features, (weight.in_features, weight.experts)
    if sum(site.out for _, site in found) != out or any((site.inp, site.experts) != own for _, site in found):
        return []
    whole = {site.proj.partition("/")[0] for _, site in found if weight.experts} & keep
    return [(found[0][0], replace(found[0][1], proj=whole.pop(), out=out))] if whole else found


def _by_pattern(model: nn.Module, weights: Mapping[str, Weight], keep: set[str]) -> list[_Place]:
    """The places of weights by their paths; the projections in one are one place each, unless ``keep`` names it."""
    names = names_by_path(map(_one, weights))
    found: list[_Place] = []
    for name, weight in weights.items():
        layer, proj = names[_one(name)]
        out = weight.out_features
        heads = weight.heads if weight.held else _heads(model, _one(name).rpartition(".")[2], out)
        site = Site(0, proj, out, weight.in_features, heads, name, 0, weight.experts, weight.kernel)
        if weight.slices == 1 or proj in keep:
            found.append((layer, site))
        else:
            out //= weight.slices
            slices = (replace(site, proj=f"{proj}/out:{k}", out=out, start=k * out) for k in range(weight.slices))
            found += [(layer, each) for each in slices]
    return found


def _one(path: str) -> str:
    """The path of one of the layers at the path of a site: of no expert in a list, of the first of tied layers."""
    return path.replace(".*", "").partition("=")[0]


def names_by_path(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The layer and the projection that each path stands for, for models without a card.

    The first number in a path ends its layer; the last name, or as much of the end as tells the modules of a layer
    apart, is the projection.
    """
    found = []
    for name in paths:
        match = _NUMBERED.fullmatch(name)
        layer, inside = (match["layer"], match["inside"]) if match else name.rpartition(".")[::2]
        found.append((layer, inside.split("."), name))
    names = {name: path[-1] for _, path, name in found}
    for depth in range(2, max((len(path) for _, path, _ in found), default=1) + 1):
        counts = Counter((layer, names[name]) for layer, _, name in found)
        clashing = {proj for (_, proj), count in counts.items() if count > 1}
        names |= {name: "_".join(path[-depth:]) for _, path, name in found if names[name] in clashing}
    return {name: (layer, names[name]) for layer, _, name in found}


def _heads(model: nn.Module, name: str, out: int) -> int:
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    heads = getattr(config, "num_attention_heads", None) or 0
    if name in _GROUPED:
        heads = getattr(config, "num_key_value_heads", None) or heads
    elif name not in _ALL_HEADS:
        return 0
    return heads if isinstance(heads, int) and heads > 0 and out % heads == 0 else 0


def natural(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in a path as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def _check_apart(found: Iterable[_Place]) -> None:
    seen: dict[tuple[str, str], Site] = {}
    for layer, site in found:
        other = seen.setdefault((layer, site.proj), site)
        if other is not site:
            raise NetworkError(
                f"nothing tells {other.module} and {site.module} apart: both are {site.proj!r} of one layer",
                remedy="adapt them with two adapters: leave one out with exclude_modules",
            )


def _check_layers(found: set[str], saved: Mapping[str, int] | None) -> None:
    if saved is None or found == set(saved):
        return
    lost, new = sorted(set(saved) - found, key=natural), sorted(found - set(saved), key=natural)
    raise NetworkError(
        "the adapter was made for other layers than this model has: "
        f"{len(lost)} are missing here ({', '.join(lost[:3])}), {len(new)} are new ({', '.join(new[:3])})",
        remedy="load it onto the model class and size that it was trained on",
    )
