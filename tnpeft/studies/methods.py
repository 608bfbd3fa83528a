"""Methods of training: a family, a line of your own, one of PEFT's own methods, everything, or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tnpeft import families
from tnpeft.counting import nearest_ranks
from tnpeft.counting.dof import dof_on
from tnpeft.counting.parameters import layout_on
from tnpeft.families.catalogue import rank_option
from tnpeft.networks import Factor, Factorization, Network, NetworkError, network
from tnpeft.scaling.starts import batch_bonds
from tnpeft.studies.files import StudyError

_HEADS = ("score", "classifier")
KINDS = ("family", "line", "peft", "full", "none")
Method = Mapping[str, Any]


def check(method: Method) -> None:
    """Refuse a method that names none or several of the kinds, or has wrong arguments."""
    kinds = [kind for kind in KINDS if kind in method]
    unknown = sorted(set(method) - {*KINDS, "args", "change"})
    if len(kinds) != 1 or unknown:
        problem = f"unknown key {unknown[0]!r}" if unknown else f"names {' and '.join(kinds) or 'nothing'} to train"
        raise StudyError(problem, where=f"method {dict(method)}", remedy=f"give one of {', '.join(KINDS)}, and args")
    if is_network(method):
        factorization(method)


def is_network(method: Method) -> bool:
    """Return True for a family or a line."""
    return "family" in method or "line" in method


def factorization(method: Method) -> Factorization:
    """The factorization of a family or of a line with its ranks, splits and so on in ``args``.

    A line's rank may stand there by itself, ``{"r": 2}``, as it does in a grid.

    ``change`` replaces attributes of the factorization, such as ``lr_multiplier`` or ``scale``.

    >>> print(factorization({"line": "B[layer out r] A[r inp] -> layer out inp", "args": {"ranks": {"r": 2}}}).ranks)
    {'r': 2}
    """
    args = {name: tuple(its) if isinstance(its, list) else its for name, its in method.get("args", {}).items()}
    remedy, change = "", method.get("change", {})
    if "line" in method:
        net = network(method["line"])
        ranks = {**args.get("ranks", {}), **{bond: args.pop(bond) for bond in net.bonds if bond in args}}
        if isinstance(args.get("splits"), Mapping):
            args["splits"] = {side: tuple(parts) for side, parts in args["splits"].items()}
        args |= {"ranks": ranks} if ranks else {}
        where, remedy = f"line '{net}'", "give ranks by bond, scale, init, splits"
        declare = partial(Factorization.of, net)
    else:
        where, declare = f"family {method['family']!r}", families.get(method["family"])
    try:
        f = declare(**args)
        return replace(f, **{**change, "ranks": {**f.ranks, **change.get("ranks", {})}})
    except (TypeError, NetworkError) as error:
        problem, remedy = getattr(error, "problem", str(error)), getattr(error, "remedy", remedy)
        raise StudyError(f"wrong arguments: {problem}", where=where, remedy=remedy) from None


def by_rule(method: Method) -> Method:
    """Return a method whose trained factors all start by the variance rule, and learn alike.

    A factor that mixes two bonds starts orthogonal: a small Gaussian matrix may all but close a direction.

    >>> by_rule({"family": "tt_lora"})["change"]["init"]
    {}
    >>> by_rule({"family": "tucker"})["change"]["init"]
    {'G': 'orthogonal'}
    """
    f = factorization(method)
    trained = {
        line.network.label(its): _mixes(line.network, its)
        for line in f.lines
        for its in line.network.factors
        if its.kind == "trainable"
    }
    init = {name: start for name, start in f.init.items() if name not in trained}
    init |= {name: "orthogonal" for name, mixes in trained.items() if mixes and name not in f.unit_norm}
    key = "change" if "family" in method else "args"
    return {**method, key: {**method.get(key, {}), "init": init, "lr_multiplier": {}}}


def _mixes(net: Network, factor: Factor) -> bool:
    """True if the factor is a matrix from a bond to a bond, the same everywhere or one for each site."""
    bonds = {*factor.indices} & {*net.bonds} - {*batch_bonds(factor.indices, net)}
    return not {*factor.indices} & {*net.rows, *net.cols} and len(bonds) == 2


def count(method: Method, model: Any, targets: tuple[str, ...], by: str = "parameters") -> int | None:
    """Parameters of the adapter, or degrees of freedom (``by="dof"``), worked out without a model in memory.

    None where only the model itself can tell, or no formula gives them: of sites of several shapes that share a
    trainable factor the degrees of freedom have an upper bound only.

    >>> lora = {"family": "lora", "args": {"rank": 1}}
    >>> [count(lora, "facebook/opt-1.3b", ("q_proj", "v_proj"), by) for by in ("parameters", "dof")]
    [196608, 196560]
    """
    if not is_network(method):
        return 0 if "none" in method else None
    found = layout_on(factorization(method), model=model, targets=list(targets) or None)
    if by == "parameters":
        return found.count()
    trained = [factor for shape in found.shapes() for factor in shape.network.factors if factor.kind == "trainable"]
    if len(found.shapes()) > 1 and not all({"layer", "proj"} <= {*factor.indices} for factor in trained):
        return None
    try:
        return dof_on(found)
    except NetworkError:  # a tied factor
        return None


def matched(
    method: Method, budgets: Sequence[int], model: Any, targets: tuple[str, ...], by: str = "parameters"
) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Yield for each budget (of parameters or dof) the nearest argument of a family, and the bonds of another rank.

    >>> next(matched({"family": "tenslora"}, [15_000], "facebook/opt-125m", ("q_proj", "v_proj")))
    ({'ranks': 8}, {'a': 9, 'b': 9, 'c': 2})
    """
    if "family" not in method:
        raise StudyError("budgets are for families", remedy="give a line a grid of its ranks")
    family, fixed = method["family"], method.get("args", {})
    vary = rank_option(family)
    if vary is None:
        raise StudyError(f"{family!r} has one size only", remedy="name it without budgets")

    def at(rank: int) -> Method:
        return {"family": family, "args": {**fixed, vary: rank}}

    if count(at(2), model, targets, by) is None:
        raise StudyError(
            f"the {by} of {family!r} cannot be counted on {model}", remedy="give a grid, or match by parameters"
        )
    ranks = nearest_ranks(lambda rank: factorization(at(rank)), budgets, model=model, targets=targets or None, by=by)
    for rank, f in ranks:
        common = factorization(at(rank)).ranks
        yield {vary: rank}, {bond: int(r) for bond, r in f.ranks.items() if r != common[bond]}


def attach(
    model: Any,
    method: Method,
    targets: tuple[str, ...],
    *,
    classifier: bool,
    seed: int,
    replicas: Sequence[tuple[Method, int]] = (),
) -> Any:
    """The model with the method's adapter on it, everything else frozen; ``full`` frees every weight.

    A new classification head trains in float32, whatever the backbone's dtype: 16 bits would round small steps away.

    ``replicas`` are methods and seeds of several adapters that train in one pass: families or lines that differ in
    ranks and scale alone.

    Raises:
        StudyError: a library that the method needs cannot do it.
    """
    heads = [getattr(model, name) for name in _HEADS if hasattr(model, name)] if classifier else []
    for head in heads:
        head.float().register_forward_pre_hook(lambda _, inputs: tuple(each.float() for each in inputs))
    model.requires_grad_("full" in method)
    if "full" in method or "none" in method:
        for head in heads:
            head.requires_grad_(True)
        return model
    import peft

    task_type = "SEQ_CLS" if classifier else "CAUSAL_LM"
    common: dict[str, Any] = {"task_type": task_type, "target_modules": list(targets) or None}
    if "peft" in method:
        return peft.get_peft_model(model, peft_config(method, **common))
    import tnpeft

    f = factorization(method)
    if replicas:
        each = [factorization(its) for its, _ in replicas]
        common |= {"replicas": len(each), "replica_seeds": [its for _, its in replicas]}
        ranks = [{bond: rank for bond, rank in its.ranks.items() if rank != f.ranks[bond]} for its in each]
        common |= {"replica_ranks": ranks, "replica_scales": [float(its.scale) for its in each]}
    return peft.get_peft_model(model, tnpeft.TensorNetworkConfig(network=f, seed=seed, **common))


def peft_config(method: Method, **common: Any) -> Any:
    """Return the configuration of one of PEFT's methods."""
    import peft

    kinds = {kind.value.lower(): config for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method["peft"] not in kinds:
        raise StudyError(f"PEFT has no method {method['peft']!r}", remedy=f"it has {', '.join(sorted(kinds))}")
    try:
        return kinds[method["peft"]](**common, **method.get("args", {}))
    except TypeError as error:
        raise StudyError(f"wrong arguments: {error}", where=f"PEFT's {method['peft']!r}") from None


def trainable(model: Any) -> tuple[int, int]:
    """Parameters that train: of the adapter, and of a classification head beside it."""
    adapter = head = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head += parameter.numel() * of_head(name)
            adapter += parameter.numel() * (not of_head(name))
    return adapter, head


def of_head(name: str) -> bool:
    """Return True if a parameter's name is that of a new classification head.

    >>> of_head("score.weight"), of_head("base_model.model.score.modules_to_save.default.weight"), of_head("x.bias")
    (True, True, False)
    """
    return "modules_to_save" in name or name.partition(".")[0] in _HEADS
