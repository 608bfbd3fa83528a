"""Model cards: the sizes of well-known models as data, and the sites that targets select in them."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tnpeft.models import hub
from tnpeft.networks import NetworkError, Site
from tnpeft.networks.sizes import evaluate

Model = Any  # a name, a path, a configuration (mapping or object) or a Card
Targets = str | Sequence[str] | None

_FEED_FORWARD = ("gate", "up", "down")
_MOST, _MOST_LAYERS = 2**31, 10**5  # of a size in a configuration: more is a slip or a hostile file


@dataclass(frozen=True)
class Projection:
    """A linear of the layers, or a named slice of one: its role, path in the layer, features, heads and biases.

    Projections of a layer with the same ``reads`` read one and the same input. ``experts`` is the number of matrices
    of a weight that holds one for every expert, 0 for a linear; ``layers`` the kind of layers that have it: all,
    sparse (a mixture of experts) or dense.
    """

    name: str
    role: str
    path: str
    out: int
    inp: int
    heads: int = 0
    biases: int = 0
    start: int = 0
    reads: str = ""
    experts: int = 0
    layers: str = "all"

    def called(self, target: str) -> bool:
        """True if the target is the role (q, k, v, o, gate, up, down), its group (attention, mlp), or a part of the
        path: its end, as in PEFT, or the name of a module in it, such as experts.

        >>> p = card("Qwen/Qwen3-30B-A3B").select("experts")[2]
        >>> p.name, [p.called(each) for each in ("down", "mlp", "experts", "attention")]
        ('experts_down_proj', [True, True, True, False])
        """
        group = "mlp" if self.role in _FEED_FORWARD else "attention"
        return target in (self.role, group) or f".{target}." in f".{self.path}."


@dataclass(frozen=True)
class Card:
    """The sizes of a model: all that counting needs to know about it.

    ``stem`` is the path of its layers in the base model; ``default`` the targets taken when none are given;
    ``architecture`` its name in transformers, such as ``opt``; ``dense`` the numbers of the layers of a mixture of
    experts that have no experts.

    >>> its = card("facebook/opt-1.3b")
    >>> its.layers, its.default, [p.name for p in its.projections]
    (24, ('q_proj', 'v_proj'), ['q_proj', 'k_proj', 'v_proj', 'out_proj', 'fc1', 'fc2'])
    """

    name: str
    layers: int
    sizes: Mapping[str, int]
    stem: str
    projections: tuple[Projection, ...]
    default: tuple[str, ...]
    head_rule: str
    architecture: str = ""
    dense: tuple[int, ...] = ()

    def has(self, layer: int, projection: Projection) -> bool:
        """True if the layer has the projection.

        >>> its = card("deepseek-ai/DeepSeek-V3")
        >>> [its.has(layer, its.select("experts")[0]) for layer in (2, 3)]
        [False, True]
        """
        return projection.layers in ("all", "dense" if layer in self.dense else "sparse")

    def head(self, labels: int = 2) -> int:
        """Parameters of the sequence (or image) classification head that transformers puts on the model.

        >>> card("roberta-base").head(labels=2)
        592130
        """
        return evaluate(self.head_rule, {**self.sizes, "labels": labels})

    def select(self, targets: Targets = None) -> tuple[Projection, ...]:
        """The projections that the targets name, in the order of the targets.

        A target is a projection's name, a part of its path (``"experts"``, ``"mlp"``), or its role; the name
        ``"experts_gate_up_proj"`` is gate and up of experts as one matrix;
        ``"all-linear"`` is every linear of the layers (fused experts are none), None the architecture's default (q
        and v).

        Raises:
            NetworkError: a target names nothing in this model.

        >>> [p.name for p in card("openai-community/gpt2").select("q,c_proj")]
        ['c_attn/out:0', 'attn_c_proj', 'mlp_c_proj']
        """
        if targets is None:
            targets = self.default
        wanted = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else [*targets]
        found = [p for target in wanted for p in self._named(target)]
        if not found:
            raise NetworkError("no target is given", remedy='pass such as ["q_proj", "v_proj"], or "all-linear"')
        return tuple(dict.fromkeys(found))

    def _named(self, target: str) -> list[Projection]:
        if target == "all-linear":
            return [p for p in self.projections if not p.experts]
        exact = [p for p in self.projections if p.name == target] or self._whole(target)
        found = exact or [p for p in self.projections if p.called(target)]
        if not found:
            raise NetworkError(
                f"{self.name} has no projection {target!r}",
                remedy=f"its targets are {', '.join(p.name for p in self.projections)}, attention, mlp, all-linear",
            )
        return found

    def _whole(self, target: str) -> list[Projection]:
        """The fused weight of experts whose slices are projections, as one."""
        parts = [p for p in self.projections if p.experts and p.name.partition("/")[0] == target]
        out, biases = sum(p.out for p in parts), sum(p.biases for p in parts)
        return [replace(parts[0], name=target, out=out, biases=biases)] if parts else []


@dataclass(frozen=True)
class SiteGroup:
    """Sites of one shape: the projections they belong to, their features and heads, and how many they are.

    >>> [str(group) for group in groups(sites("meta-llama/Llama-3.1-8B", ["q_proj", "v_proj"]))]
    ['32 sites of 4096 x 4096, 32 heads: q_proj', '32 sites of 1024 x 4096, 8 heads: v_proj']
    """

    projs: tuple[str, ...]
    out: int
    inp: int
    heads: int
    count: int

    def __str__(self) -> str:
        heads = f", {self.heads} heads" if self.heads else ""
        return f"{self.count} sites of {self.out} x {self.inp}{heads}: {', '.join(self.projs)}"


def sites(model: Model, targets: Targets = None, layers: Iterable[int] | None = None) -> tuple[Site, ...]:
    """The sites that the targets select, layer by layer; ``layers`` keeps some of the model's layers.

    A module's path is the one in the base model (``decoder.layers.0.self_attn.q_proj`` in OPT).

    Raises:
        NetworkError: the model, a target or a layer is unknown.

    >>> found = sites("facebook/opt-1.3b", ["q_proj", "v_proj"])
    >>> len(found), found[0].module, found[0].out
    (48, 'decoder.layers.0.self_attn.q_proj', 2048)
    """
    its = card(model)
    chosen = its.select(targets)
    kept = range(its.layers) if layers is None else sorted(set(layers))
    if not kept or kept[0] < 0 or kept[-1] >= its.layers:
        raise NetworkError(
            f"{its.name} has no layers {list(kept)}", remedy=f"choose layers from 0 to {its.layers - 1}"
        )
    having = [layer for layer in kept if any(its.has(layer, p) for p in chosen)]
    if not having:
        raise NetworkError(
            f"none of the layers {list(kept)} of {its.name} has {', '.join(p.name for p in chosen)}",
            remedy=f"its dense layers are {list(its.dense)}, all others have experts",
        )
    return tuple(
        Site(place, p.name, p.out, p.inp, p.heads, f"{its.stem}.{layer}.{p.path}", p.start, p.experts)
        for place, layer in enumerate(having)
        for p in chosen
        if its.has(layer, p)
    )


def groups(selected: Iterable[Site]) -> tuple[SiteGroup, ...]:
    """The sites by shape and heads, in order of first appearance: one group unless the selection is ragged.

    >>> for group in groups(sites("meta-llama/Llama-3.2-1B", "q_proj,v_proj")):
    ...     print(group)
    16 sites of 2048 x 2048, 32 heads: q_proj
    16 sites of 512 x 2048, 8 heads: v_proj
    """
    found: dict[tuple[int, int, int], list[str]] = {}
    for site in selected:
        found.setdefault((site.out, site.inp, site.heads), []).append(site.proj)
    return tuple(SiteGroup(tuple(dict.fromkeys(projs)), *shape, len(projs)) for shape, projs in found.items())


def biases(model: Model, targets: Targets = None) -> int:
    """Bias parameters of the targeted linears: never part of a count unless asked for here.

    >>> biases("facebook/opt-1.3b", "q_proj,v_proj")
    98304
    """
    its = card(model)
    chosen = its.select(targets)
    return sum(p.biases * max(p.experts, 1) for layer in range(its.layers) for p in chosen if its.has(layer, p))


def names() -> tuple[str, ...]:
    """The names of the models whose sizes are known, as on the hub.

    >>> "facebook/opt-1.3b" in names()
    True
    """
    return tuple(name for models in _data()["models"].values() for name in models)


def card(model: Model) -> Card:
    """The card of a model: a known name (any case, with or without its owner), a folder or file with a config.json,
    a configuration, or any other name that transformers' AutoConfig can resolve.

    Raises:
        NetworkError: the model or its architecture is unknown.

    >>> card("OPT-1.3B").layers, card("llama-2-70b").sizes["kv_heads"]
    (24, 8)
    """
    if isinstance(model, Card):
        return model
    if isinstance(model, Mapping):
        return _from_config(model, str(model.get("_name_or_path") or model.get("model_type")))
    if hasattr(model, "to_dict"):
        return card(model.to_dict())
    known = _known().get(str(model).lower())
    if known:
        architecture, name = known
        return _build(name, architecture, _data()["models"][architecture][name], {})
    if not isinstance(model, str | os.PathLike) or not str(model).strip():
        raise NetworkError(
            f"expected a model, got {model!r}", remedy="pass a name, a folder with a config.json, or a configuration"
        )
    path = Path(model)
    if os.path.exists(path):  # Path.exists fails at a name that is too long
        return _from_config(_read(path / "config.json" if path.is_dir() else path), str(model))
    return _from_config(_download(str(model)), str(model))


def at_hand(name: str) -> bool:
    """True for a known name, and for a configuration's file or folder on this machine; the hub is not asked."""
    return name.lower() in _known() or any(map(os.path.isfile, (name, os.path.join(name, "config.json"))))


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    data = tomllib.loads(files("tnpeft.models").joinpath("models.toml").read_text(encoding="utf-8"))
    for its in data["architectures"].values():
        if "like" in its:
            base = data["architectures"][its["like"]]
            own = its.get("projections", {})
            named = dict.fromkeys((*base["projections"], *own))
            its["projections"] = {name: base["projections"].get(name, {}) | own.get(name, {}) for name in named}
            its |= {key: value for key, value in base.items() if key not in its}
    return data


@lru_cache(maxsize=1)
def _known() -> dict[str, tuple[str, str]]:
    """Architecture and name by every name a model is known under, in lower case."""
    found = {}
    for architecture, models in _data()["models"].items():
        for name, sizes in models.items():
            for each in (name, *sizes.get("also", ())):
                found[each.lower()] = found[each.lower().rpartition("/")[2]] = (architecture, name)
    return found


def _build(name: str, architecture: str, given: Mapping[str, Any], switches: Mapping[str, Any]) -> Card:
    its = _data()["architectures"][architecture]
    sizes = {key: int(given[key]) for key in ("layers", "hidden", "heads", *its.get("needs", ()))}
    derived = {
        "kv_heads": sizes["heads"],
        "head_dim": sizes["hidden"] // sizes["heads"],
        "ffn": 4 * sizes["hidden"],
        "embed": sizes["hidden"],
    }
    sizes |= {key: int(given.get(key) or value) for key, value in derived.items()}
    sizes["expert_ffn"] = int(given.get("expert_ffn") or sizes["ffn"])
    sizes |= {key: int(given.get(key) or value) for key, value in its.get("otherwise", {}).items()}

    def projection(label: str, p: Mapping[str, Any]) -> Projection:
        out, inp = evaluate(p["out"], sizes), evaluate(p["inp"], sizes)
        biased = bool(switches.get(p["bias"], False)) if isinstance(p["bias"], str) else p["bias"]
        start = evaluate(p.get("start", "0"), sizes)
        heads = sizes[p["heads"]] if "heads" in p else 0
        reads = next((name for name, roles in _data()["inputs"].items() if p["role"] in roles), label)
        experts = sizes[p["experts"]] if "experts" in p else 0
        biases, layers = out if biased else 0, p.get("layers", "all")
        return Projection(label, p["role"], p["path"], out, inp, heads, biases, start, reads, experts, layers)

    dense = _dense(sizes["layers"], given.get("dense") or 0, switches) if "experts" in sizes else ()
    kinds = {"all", "dense" if dense else "", "sparse" if len(dense) < sizes["layers"] else ""}
    projections = (projection(label, p) for label, p in its["projections"].items())
    return Card(
        name,
        sizes["layers"],
        sizes,
        its["layer"],
        tuple(p for p in projections if p.layers in kinds),
        tuple(its["default"]),
        its["head"],
        architecture,
        dense,
    )


def _absurd(name: str, key: str, value: Any) -> NetworkError:
    return NetworkError(f"the configuration of {name} has {key}={str(value)[:60]}", remedy="check its config.json")


def _dense(layers: int, first: int, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers of a mixture of experts that have none: the first, those listed, and those between sparse steps."""
    listed, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step") or 1
    for key, value, kind in (("mlp_only_layers", listed, list | tuple), ("decoder_sparse_step", step, int)):
        if not isinstance(value, kind):
            raise _absurd("the model", key, value)
    return tuple(k for k in range(layers) if k < first or k in listed or (k + 1) % step)


def _from_config(config: Mapping[str, Any], name: str) -> Card:
    kind = config.get("model_type")
    for architecture, its in _data()["architectures"].items():
        if kind in its["model_types"]:
            keys = _data()["config"]
            given: dict[str, Any] = {
                size: next((config[k] for k in options if config.get(k)), None) for size, options in keys.items()
            }
            needed = ("layers", "hidden", "heads", *its.get("needs", ()))
            missing = [keys[size][0] for size in needed if not given[size]]
            if missing:
                raise NetworkError(f"the configuration of {name} has no {missing[0]}", remedy="check its config.json")
            for size, value in given.items():
                most = _MOST_LAYERS if size == "layers" else _MOST
                if value is not None and (type(value) is not int or not 0 < value <= most):
                    raise _absurd(name, next(k for k in keys[size] if config.get(k)), value)
            if given["heads"] > given["hidden"]:
                raise _absurd(name, keys["heads"][0], given["heads"])
            return _build(name, architecture, given, config)
    served = ", ".join(kind for its in _data()["architectures"].values() for kind in its["model_types"])
    raise NetworkError(
        f"{name} has the model type {kind!r}, which has no card",
        remedy=f"known types are {served}; for any other pass the sizes themselves",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise NetworkError(f"{path} cannot be read: {error}", remedy="pass a folder with a config.json") from None


def _download(name: str) -> dict[str, Any]:
    close = get_close_matches(name.lower(), _known(), n=3)
    hint = f"did you mean {', '.join(close)}? Else " if close else ""
    reason = "the hub cannot be reached"
    if hub.cached(name) or hub.answers():
        try:
            from transformers import AutoConfig

            return dict(AutoConfig.from_pretrained(name).to_dict())
        except (ImportError, OSError, ValueError) as error:
            reason = type(error).__name__
    raise NetworkError(
        f"no card for the model {name!r}, and its configuration cannot be fetched ({reason})",
        remedy=f"{hint}pass a folder with a config.json; `tnpeft models` lists the models that are known by name",
    )
