"""Answers of the library gathered as plain data, for printing and for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

from tnpeft.networks import Factorization, Network, NetworkError
from tnpeft.networks.sizes import bind


def counted(
    net: Network | Factorization, sizes: Mapping[str, int], model: str | None, targets: str | None
) -> dict[str, Any]:
    """Return the answer of ``tnpeft count``: lines, formula, count, factors, rank steps, and what one site reaches.

    >>> from tnpeft import network
    >>> counted(network("B[out r] A[r inp] -> out inp"), {"out": 8, "inp": 4, "r": 2}, None, None)["parameters"]
    24
    """
    from tnpeft import counting

    lines = [net] if isinstance(net, Network) else [line.network for line in net.lines]
    where: dict[str, Any] = {"model": model, "targets": targets}
    given = _given(net, sizes)
    count = counting.parameters(net, given, **where)
    data: dict[str, Any] = {
        "line": str(lines[0]) if len(lines) == 1 else " ; ".join(map(str, lines)),
        "formula": _formulas(net, given, model, targets),
        "parameters": _formula(count),
        "by_factor": _plain(counting.parameters_by_factor(net, given, **where)),
        "one_more_rank": {bond: _step(net, bond, given, where) for bond in _free(net, lines)},
    }
    if isinstance(count, int):
        data["mebibytes"] = {
            "fp32": round(counting.stored_megabytes(count), 3),
            "bf16": round(counting.stored_megabytes(count, 2), 3),
            "adam": round(counting.optimizer_megabytes(count), 3),
        }
    if model is not None:
        groups = counting.groups(counting.sites(model, targets))
        data["sites"] = [str(group) for group in groups] if len(groups) > 1 else str(groups[0])
        data["splits"] = _splits(net, sizes, where)
        data["biases_not_counted"] = counting.biases(model, targets)
    return data | {"gain": _gain(net, given, where)} | _reach(net, given, model, targets)


def _splits(net: Network | Factorization, sizes: Mapping[str, int], where: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the indices inside rows and columns, those that were not given too, by kind of site."""
    from tnpeft.counting import site_shapes

    found: dict[str, Any] = {}
    for shape in site_shapes(net, **where, **sizes):
        groups = [group for group in (shape.network.rows, shape.network.cols) if len(group) > 1]
        if groups:
            found[str(shape)] = " ".join(f"{index}={shape.sizes[index]}" for group in groups for index in group)
    return found


def _gain(net: Network | Factorization, given: Mapping[str, Any], where: Mapping[str, Any]) -> Any:
    """The gain as a number, a formula, or numbers by projection; the reason where the start has none."""
    from tnpeft.scaling import gain

    try:
        found = gain(net, given, **where)
    except NetworkError as error:
        return error.problem
    if isinstance(found, dict):
        return {proj: float(f"{value:.4g}") for proj, value in found.items()}
    return float(f"{found:.4g}") if isinstance(found, float) else str(found)


def planned(plan: Any) -> dict[str, Any]:
    """A plan as plain data."""
    costs = ("form", "macs", "flops", "backward_macs", "written", "saved", "largest")
    return {"steps": [str(step) for step in plan.steps], **{cost: getattr(plan, cost) for cost in costs}}


def described(name: str) -> dict[str, Any]:
    """A family as plain data: its lines, formulas, options and source.

    >>> described("lora")["formulas"]
    ['layer*proj*r*(inp + out)']
    """
    from tnpeft.counting import parameters
    from tnpeft.families import get
    from tnpeft.scaling import gain

    declare = get(name)
    f = declare()
    rows = [row.strip() for row in (declare.__doc__ or "").splitlines()]
    options = [
        f"{p.name}={p.default!r}" for p in signature(declare).parameters.values() if p.kind != Parameter.VAR_KEYWORD
    ]
    return {
        "name": name,
        "what": rows[0],
        "lines": [str(line.network) for line in f.lines],
        "formulas": [*dict.fromkeys(str(_formula(parameters(line.network))) for line in f.lines)],
        "options": ", ".join(options),
        "gain": str(gain(name)),
        "source": f.source,
    }


def _given(net: Network | Factorization, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The sizes, after a check that every one of them means something."""
    if isinstance(net, Factorization):
        net.bind(None, sizes)
    else:
        bind(net, None, sizes)
    return dict(sizes)


def _free(net: Network | Factorization, lines: list[Network]) -> list[str]:
    rules = net.ranks if isinstance(net, Factorization) else {}
    return [
        bond
        for bond in dict.fromkeys(b for line in lines for b in line.bonds)
        if not isinstance(rules.get(bond), str)
    ]


def _step(net: Network | Factorization, bond: str, sizes: dict[str, Any], where: dict[str, Any]) -> Any:
    from tnpeft.counting import parameter_step

    if isinstance(net, Factorization) and bond not in net.network.bonds:
        return None
    step = parameter_step(net, bond, sizes, **where)
    return _formula(step)


def _plain(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _formula(value) for name, value in counts.items()}


def _formula(count: Any) -> int | str:
    """A number as it is, an expression as text with what its terms have in common taken out."""
    if isinstance(count, int):
        return count
    from sympy import factor_terms

    return str(factor_terms(count))


def _formulas(
    net: Network | Factorization, sizes: dict[str, Any], model: str | None, targets: str | None
) -> int | str | dict[str, Any]:
    """The formula of the line that is counted; of several that serve a model one each, by what they serve."""
    from tnpeft import counting

    if isinstance(net, Network) or model is None:
        return _formula(counting.parameters(net if isinstance(net, Network) else net.network))
    from tnpeft.counting.parameters import layout_on

    used = dict.fromkeys(place.line for place in layout_on(net, sizes, model=model, targets=targets).site_layouts)
    found = {rule.sites: _formula(counting.parameters(rule.network)) for rule in used}
    return found if len(found) > 1 else next(iter(found.values()))


def _reach(
    net: Network | Factorization, sizes: dict[str, Any], model: str | None, targets: str | None
) -> dict[str, Any]:
    """The rank bound and the degrees of freedom, where all sizes are known and the question has an answer."""
    from tnpeft import counting

    data: dict[str, Any] = {"rank_bound": {}, "degrees_of_freedom": {}}
    for shape in counting.site_shapes(net, sizes, model=model, targets=targets):
        where, line, known = str(shape), shape.network, shape.sizes
        if all(index in known for index in line.indices):
            data["rank_bound"][where] = counting.rank_bound(line, known)
            try:
                data["degrees_of_freedom"][where] = counting.dof(line, known)
            except NetworkError as error:
                data["degrees_of_freedom"][where] = error.problem
    free = data["degrees_of_freedom"]
    if len(free) > 1 and all(isinstance(count, int) for count in free.values()):
        total = counting.parameters(net, sizes, model=model, targets=targets)
        if sum(free.values()) > total:  # factors that sites of several shapes share stand in several of the counts
            data["degrees_of_freedom"] = {"all sites, at most": total}
    return {key: found[""] if list(found) == [""] else found for key, found in data.items() if found}
