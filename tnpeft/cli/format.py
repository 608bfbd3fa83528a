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

    where: dict[str, Any] = {"model": model, "targets": targets}
    family = net if isinstance(net, Factorization) else None
    lines = [line.network for line in family.lines] if family else [net]
    family.bind(None, sizes) if family else bind(net, None, sizes)  # every size must mean something
    count = counting.parameters(net, sizes, **where)
    free = dict.fromkeys(
        bond for line in lines for bond in line.bonds if not (family and isinstance(family.ranks.get(bond), str))
    )
    data: dict[str, Any] = {
        "line": " ; ".join(map(str, lines)),
        "formula": _formulas(net, sizes, where),
        "parameters": _formula(count),
        "by_factor": {
            name: _formula(each) for name, each in counting.parameters_by_factor(net, sizes, **where).items()
        },
        "one_more_rank": {
            bond: None
            if family and bond not in family.network.bonds
            else _formula(counting.parameter_step(net, bond, sizes, **where))
            for bond in free
        },
    }
    if isinstance(count, int):
        data["mebibytes"] = {
            "fp32": round(counting.stored_megabytes(count), 3),
            "bf16": round(counting.stored_megabytes(count, 2), 3),
            "adam": round(counting.optimizer_megabytes(count), 3),
        }
    shapes = list(counting.site_shapes(net, sizes, **where))
    if model is not None:
        groups = [str(group) for group in counting.groups(counting.sites(model, targets))]
        data["sites"] = groups if len(groups) > 1 else groups[0]
        data["splits"] = {str(shape): split for shape in shapes if (split := _split(shape))}
        data["biases_not_counted"] = counting.biases(model, targets)
    return data | {"gain": _gain(net, sizes, where)} | _reach(shapes, count)


def _split(shape: Any) -> str:
    """The sizes of the indices inside rows and columns, those that were not given too."""
    groups = [group for group in (shape.network.rows, shape.network.cols) if len(group) > 1]
    return " ".join(f"{index}={shape.sizes[index]}" for group in groups for index in group)


def _gain(net: Network | Factorization, sizes: Mapping[str, int], where: Mapping[str, Any]) -> Any:
    """The gain as a number, a formula, or numbers by projection; the reason where the start has none."""
    from tnpeft.scaling import gain

    try:
        found = gain(net, sizes, **where)
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


def _formula(count: Any) -> int | str:
    """A number as it is, an expression as text with what its terms have in common taken out."""
    if isinstance(count, int):
        return count
    from sympy import factor_terms

    return str(factor_terms(count))


def _formulas(net: Network | Factorization, sizes: Mapping[str, int], where: Mapping[str, Any]) -> Any:
    """The formula of the line that is counted; of several that serve a model one each, by what they serve."""
    from tnpeft.counting import parameters
    from tnpeft.counting.parameters import layout_on

    if isinstance(net, Network) or where["model"] is None:
        return _formula(parameters(net if isinstance(net, Network) else net.network))
    used = dict.fromkeys(place.line for place in layout_on(net, sizes, **where).site_layouts)
    found = {rule.sites: _formula(parameters(rule.network)) for rule in used}
    return found if len(found) > 1 else next(iter(found.values()))


def _reach(shapes: list[Any], total: Any) -> dict[str, Any]:
    """The rank bound and the degrees of freedom, where all sizes are known and the question has an answer."""
    from tnpeft import counting

    bounds: dict[str, Any] = {}
    free: dict[str, Any] = {}
    for shape in shapes:
        if all(index in shape.sizes for index in shape.network.indices):
            bounds[str(shape)] = counting.rank_bound(shape.network, shape.sizes)
            try:
                free[str(shape)] = counting.dof(shape.network, shape.sizes)
            except NetworkError as error:
                free[str(shape)] = error.problem
    # Factors that sites of several shapes share stand in several of the counts.
    if len(free) > 1 and all(isinstance(count, int) for count in free.values()) and sum(free.values()) > total:
        free = {"all sites, at most": total}
    data = {"rank_bound": bounds, "degrees_of_freedom": free}
    return {key: found[""] if list(found) == [""] else found for key, found in data.items() if found}
