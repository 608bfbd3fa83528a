"""Methods of training: a family, a line of your own, one of PEFT's own methods, everything, or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tnpeft import families
from tnpeft.counting import nearest_ranks
from tnpeft.counting.dof import dof_on
from tnpeft.counting.parameters import layout_on
from tnpeft.networks import Factor, Factorization, Network, NetworkError, network
from tnpeft.scaling.starts import batch_bonds
from tnpeft.studies.files import StudyError

_HEADS = ("score", "classifier")
KINDS = ("family", "line", "peft", "full", "none")
Method = Mapping[str, Any]


def check(method: Method) -> None:
    """Refuse a method that names none or several of the kinds.

    Raises:
        StudyError: it does.

    >>> check({"family": "lora", "args": {"rank": 4}})
    """
    kinds = [kind for kind in KINDS if kind in method]
    unknown = sorted(set(method) - {*KINDS, "args", "change"})
    if len(kinds) != 1 or unknown:
        problem = f"unknown key {unknown[0]!r}" if unknown else f"names {' and '.join(kinds) or 'nothing'} to train"
        raise StudyError(problem, where=f"method {dict(method)}", remedy=f"give one of {', '.join(KINDS)}, and args")
    if "family" in method or "line" in method:
        factorization(method)


def factorization(method: Method) -> Factorization:
    """The factorization of a family or of a line with its ranks, splits and so on in ``args``.

    A line's rank may stand there by itself, ``{"r": 2}``, as it does in a grid.

    ``change`` replaces attributes of a family's factorization, such as ``lr_multiplier`` or ``scale``.

    >>> print(factorization({"line": "B[layer out r] A[r inp] -> layer out inp", "args": {"ranks": {"r": 2}}}).ranks)
    {'r': 2}
    """
    args = dict(method.get("args", {}))
    if "line" in method:
        return _of_line(network(method["line"]), args)
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    declare = families.get(method["family"])
    try:
        f = declare(**tuples)
        change = dict(method.get("change", {}))
        return replace(f, **{**change, "ranks": {**f.ranks, **change.get("ranks", {})}})
    except (TypeError, NetworkError) as error:
        problem, remedy = getattr(error, "problem", str(error)), getattr(error, "remedy", "")
        raise StudyError(f"wrong arguments: {problem}", where=f"family {method['family']!r}", remedy=remedy) from None


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


def _of_line(net: Network, args: Mapping[str, Any]) -> Factorization:
    """A line with its arguments; those called as a bond are its rank."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    ranks = {name: fields.pop(name) for name in net.bonds if name in fields}
    if isinstance(fields.get("splits"), Mapping):
        fields["splits"] = {side: tuple(parts) for side, parts in fields["splits"].items()}
    if ranks:
        fields["ranks"] = {**fields.get("ranks", {}), **ranks}
    try:
        return Factorization.of(net, **fields)
    except TypeError as error:
        raise StudyError(
            f"wrong arguments: {error}",
            where=f"line '{net}'",
            remedy="give ranks by bond, scale, init, splits",
        ) from None


def count(method: Method, model: Any, targets: tuple[str, ...]) -> int | None:
    """Adapter parameters worked out without a model in memory; None where only the model itself can tell.

    >>> count({"family": "lora", "args": {"rank": 1}}, "facebook/opt-1.3b", ("q_proj", "v_proj"))
    196608
    """
    if "none" in method:
        return 0
    if not ("family" in method or "line" in method):
        return None
    import tnpeft

    return int(tnpeft.parameters(factorization(method), model=model, targets=list(targets) or None))


def dof(method: Method, model: Any, targets: tuple[str, ...]) -> int | None:
    """Degrees of freedom of the adapter over a model's sites; None where no formula gives them.

    Of sites of several shapes that share a trainable factor the count is an upper bound only, hence none.

    >>> dof({"family": "lora", "args": {"rank": 2}}, {"model_type": "opt", "hidden_size": 64,
    ...     "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 256}, ("q_proj", "v_proj"))
    2016
    """
    if "none" in method:
        return 0
    if not ("family" in method or "line" in method):
        return None
    return _dof(factorization(method), model, targets)


def _dof(f: Factorization, model: Any, targets: tuple[str, ...]) -> int | None:
    found = layout_on(f, model=model, targets=list(targets) or None)
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
    """Yield for each budget the argument of a family nearest to it and the bonds that have another rank.

    Args:
        method: the family, with the arguments that do not vary.
        budgets: numbers of parameters, or of degrees of freedom.
        model: as :func:`tnpeft.counting.card` takes it.
        targets: projections that get an adapter.
        by: what a budget counts: parameters or dof.

    Raises:
        StudyError: the family has no such rank, or cannot be counted so.

    >>> list(matched({"family": "lora"}, [4096 * 48, 400000], "facebook/opt-1.3b", ("q_proj", "v_proj")))
    [({'rank': 1}, {}), ({'rank': 2}, {})]
    >>> next(matched({"family": "tenslora"}, [15_000], "facebook/opt-125m", ("q_proj", "v_proj")))
    ({'ranks': 8}, {'a': 9, 'b': 9, 'c': 2})
    """
    family, fixed = method["family"], method.get("args", {})
    known = inspect.signature(families.get(family)).parameters
    vary = next((name for name in ("rank", "ranks") if name in known), None)
    if vary is None:
        raise StudyError(f"{family!r} has one size only", remedy="name it without budgets")

    def sized(rank: int) -> Factorization:
        return factorization({"family": family, "args": {**fixed, vary: rank}})

    if by == "dof" and _dof(sized(2), model, targets) is None:
        raise StudyError(
            f"the {by} of {family!r} cannot be counted on {model}", remedy="give a grid, or match by parameters"
        )
    for rank, f in nearest_ranks(sized, budgets, model=model, targets=targets or None, by=by):
        common = sized(rank).ranks
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

    A new classification head trains in float32, whatever the backbone's dtype.

    ``replicas`` are methods and seeds of several adapters that train in one pass: families or lines that differ in
    ranks and scale alone.

    Raises:
        StudyError: a library that the method needs cannot do it.
    """
    heads = [getattr(model, name) for name in _HEADS if hasattr(model, name)] if classifier else []
    for head in heads:
        head.float().register_forward_pre_hook(_in_float32)
    model.requires_grad_("full" in method)
    if "full" in method:
        return model
    if "none" in method:
        for head in heads:
            head.requires_grad_(True)
        return model
    import peft

    task_type = "SEQ_CLS" if classifier else "CAUSAL_LM"
    common: dict[str, Any] = {"task_type": task_type, "target_modules": list(targets) or None}
    if "peft" in method:
        config = peft_config(method, **common)
    else:
        import tnpeft

        f = factorization(method)
        if replicas:
            each = [factorization(its) for its, _ in replicas]
            common |= {"replicas": len(each), "replica_seeds": [its for _, its in replicas]}
            ranks = [{bond: rank for bond, rank in its.ranks.items() if rank != f.ranks[bond]} for its in each]
            common |= {"replica_ranks": ranks, "replica_scales": [float(its.scale) for its in each]}
        config = tnpeft.TensorNetworkConfig(network=f, seed=seed, **common)
    return peft.get_peft_model(model, config)


def peft_config(method: Method, **common: Any) -> Any:
    """Return the configuration of one of PEFT's methods.

    Raises:
        StudyError: PEFT has no such method, or the method no such argument.
    """
    import peft

    kinds = {kind.value.lower(): config for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method["peft"] not in kinds:
        raise StudyError(f"PEFT has no method {method['peft']!r}", remedy=f"it has {', '.join(sorted(kinds))}")
    try:
        return kinds[method["peft"]](**common, **method.get("args", {}))
    except TypeError as error:
        raise StudyError(f"wrong arguments: {error}", where=f"PEFT's {method['peft']!r}") from None


def _in_float32(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast what a head reads: 16 bits would round its small steps away."""
    return tuple(each.float() for each in inputs)


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
