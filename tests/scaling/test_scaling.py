"""Gain and rates: against a dense doubled network, against every pair of monomials, and on all families."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import product
from math import isclose, prod, sqrt

import numpy as np
import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tnpeft
from tnpeft import families
from tnpeft.layout import layout
from tnpeft.networks import Factorization, Network, NetworkError, Site
from tnpeft.scaling.gain import entries_of, squares_on
from tnpeft.scaling.moments import Entry, first_step
from tnpeft.testing.strategies import networks, sizes_for

DRAWN = settings(max_examples=1000, deadline=None)


def letters(net: Network) -> dict[str, str]:
    names = [*net.indices, *(bond + "'" for bond in net.bonds)]
    return {name: chr(ord("a") + k) if k < 26 else chr(ord("A") + k - 26) for k, name in enumerate(names)}


def measured(net: Network, sizes: dict[str, int], entries: dict[str, Entry]) -> float:
    """The mean square of a signed step, averaged over signs and starts by a dense network of covariances.

    Every factor is the tensor of the expectations of products of two of its entries; no index is ever identified.
    """
    moves = [
        (term.sign, [(("step", f.name) if k == place else ("start", f.name), f) for k, f in enumerate(term.factors)])
        for term in net.terms
        for place, mover in enumerate(term.factors)
        if mover.kind == "trainable"
    ]
    letter, outer = letters(net), "".join(letters(net)[i] for i in net.outer)
    shape = tuple(sizes[i] for i in net.outer)

    def mean(tag, factor):  # of one entry
        entry = entries[net.label(factor)]
        own = tuple(sizes[i] for i in factor.indices)
        return np.full(own, 0.0 if tag[0] == "step" or entry.value is None else entry.value)

    def second(tag, factor):  # of the product of two entries
        entry, own = entries[net.label(factor)], tuple(sizes[i] for i in factor.indices)
        if tag[0] == "start" and entry.value is not None:
            return np.full((*own, *own), entry.value**2)
        return np.eye(prod(own)).reshape((*own, *own)) * (entry.step if tag[0] == "step" else entry.square)

    total = 0.0
    for one, other in product(moves, repeat=2):
        left, right = dict(one[1]), dict(other[1])
        operands, subscripts = [], []
        for tag in dict.fromkeys([*left, *right]):
            both = tag in left and tag in right
            near = "".join(letter[i] for i in left[tag].indices) if tag in left else ""
            far = (
                "".join(letter[i + "'" if i in net.bonds else i] for i in right[tag].indices) if tag in right else ""
            )
            factor = left.get(tag) or right[tag]
            operands.append(second(tag, factor) if both else mean(tag, factor))
            subscripts.append(near + far)
        kept = "".join(dict.fromkeys(c for c in outer if any(c in s for s in subscripts)))
        # An outer index that stands twice in one covariance is a diagonal of it.
        value = np.einsum(",".join(subscripts) + "->" + kept, *operands, optimize="greedy")
        wide = value.reshape([s if letter[i] in kept else 1 for i, s in zip(net.outer, shape, strict=True)])
        total += one[0] * other[0] * np.broadcast_to(wide, shape).mean()
    return total


@st.composite
def started(draw) -> tuple[Factorization, dict[str, int]]:
    """A factorization with starts of all kinds, and its sizes."""
    net = draw(networks(twins=True, max_factors=5))
    sizes = draw(sizes_for(net, max_size=3, max_work=1 << 9))
    kinds = ["normal(0.3)", "uniform(2)", "kaiming", "xavier", "ones", "constant(-0.7)", "orthogonal"]
    init, labels = {}, {net.label(f): f for f in net.factors}
    for label, factor in labels.items():
        chosen = draw(st.sampled_from([*kinds, "zeros", None, None]))
        if not label.startswith("~") and chosen and (chosen != "zeros" or factor.kind == "trainable"):
            init[label] = chosen
    unit = [
        label
        for label, f in labels.items()
        if {*f.indices} & {*net.rows, *net.cols} and init.get(label) != "zeros" and draw(st.integers(0, 5)) == 0
    ]
    try:
        f = Factorization.of(
            net,
            ranks={b: sizes[b] for b in net.bonds},
            init=init,
            unit_norm=tuple(unit),
            scale=draw(st.sampled_from((1.0, 0.25))),
        )
        tnpeft.gain(f, sizes)
    except NetworkError:
        assume(False)
    return f, sizes


@DRAWN
@given(started())
def test_gain_is_the_mean_of_signed_steps(case):
    f, sizes = case
    expected = f.scale * sqrt(max(measured(f.network, sizes, entries_of(f, f.network, sizes)), 0))
    assert isclose(tnpeft.gain(f, sizes), expected, rel_tol=1e-6, abs_tol=1e-9)


def brute(net: Network, sizes: dict[str, int], squares: dict[str, float]) -> float:
    """The same for factors that stand twice: every pair of monomials, by the moments of normal numbers."""
    moments = (1, 0, 1, 0, 3, 0, 15, 0, 105)
    outer = [range(sizes[i]) for i in net.outer]
    total = 0.0
    for where in product(*outer):
        monomials = []
        for term in net.terms:
            bonds = [i for i in net.bonds if i in term.places()]
            for values in product(*(range(sizes[i]) for i in bonds)):
                at = {**dict(zip(net.outer, where, strict=True)), **dict(zip(bonds, values, strict=True))}
                for place, mover in enumerate(term.factors):
                    if mover.kind == "trainable":
                        entries = [
                            (f.name, k == place, tuple(at[i] for i in f.indices)) for k, f in enumerate(term.factors)
                        ]
                        monomials.append((term.sign, entries))
        for (s, one), (t, other) in product(monomials, repeat=2):
            value = float(s * t)
            for (name, step, _), count in Counter([*one, *other]).items():
                value *= moments[count] * (1.0 if step else squares[name]) ** (count / 2)
            total += value
    return total / prod(map(len, outer))


@settings(max_examples=100, deadline=None)
@given(networks(tied=True, max_factors=3, max_terms=2, kinds=("trainable", "frozen"), stack=()), st.data())
def test_factors_that_stand_twice_count_as_normal(net, data):
    sizes = data.draw(sizes_for(net, max_size=2, max_work=1 << 5))
    squares = {factor.name: 0.25 + 0.5 * k for k, factor in enumerate(net.factors)}
    found = first_step(net, sizes, {net.label(f): Entry(squares[f.name], squares[f.name]) for f in net.factors})
    assert isclose(sum(found.values()), brute(net, sizes, squares), rel_tol=1e-6)


SIZES = {"out": 16, "inp": 16, "layer": 2, "proj": 2, "heads": 4, "basis": 2, "expert": 2, "scene": 2, "env": 2}


@pytest.mark.parametrize("name", [n for n in families.names() if n != "tensor_guide"])
def test_gain_of_every_family(name):
    f = families.get(name)()
    ranks = {b: 2 for b, r in f.ranks.items() if isinstance(r, int)}
    f = f.with_ranks(**ranks)
    net = f.network
    given = {k: v for k, v in SIZES.items() if k in (*net.stack, "out", "inp", "heads")}
    sizes = f.sizes(given)
    expected = f.scale * sqrt(measured(net, sizes, entries_of(f, net, sizes)))
    assert expected > 0
    assert isclose(tnpeft.gain(f, given), expected, rel_tol=1e-6)


@pytest.mark.parametrize("start", ["svd", "svd_minor"])
def test_the_gain_of_every_site_knows_its_base_weight(start: str) -> None:
    line, init = "B[layer out r] A[layer r inp] -> layer out inp", {"B": start, "A": "zeros"}
    sites = [Site(layer, "q", 8, 4) for layer in range(2)]
    its = layout(Factorization.of(line, ranks={"r": 2}, init=init), sites)
    one, other = squares_on(its, {site: 1.0 + site.layer for site in sites}).values()
    assert other["A"] == 4 * one["A"] > 0


def test_gain_of_a_family_whose_factors_stand_twice():
    f = families.tensor_guide().with_ranks(r=2, n=2, m=1, a=1, b=2)
    given = {"out": 2, "inp": 2, "layer": 1, "proj": 1}
    sizes = f.sizes(given)
    entries = entries_of(f, f.network, sizes)
    squares = {factor.name: entries[f.network.label(factor)].square for factor in f.network.factors}
    expected = f.scale * sqrt(brute(f.network, sizes, squares))
    assert expected > 0
    assert isclose(tnpeft.gain(f, given), expected, rel_tol=1e-6)


def test_known_gains():
    r, inp = sympy.symbols("r inp")
    assert tnpeft.gain("lora") == sympy.sqrt(r / (3 * inp))
    assert tnpeft.gain(families.lora(rank=8, alpha=16), inp=96) == pytest.approx(2 * sqrt(8 / 288))
    assert tnpeft.gain("B[out r] A[r inp] -> out inp") == sympy.sqrt(1 / inp)
    assert tnpeft.gain(families.ia3(), out=4, inp=4, rms_base=0.02) == pytest.approx(0.02)
    gains = tnpeft.gain(families.lora(rank=8), model="facebook/opt-1.3b", targets=["q_proj", "fc2"])
    assert gains == pytest.approx({"q_proj": sqrt(8 / (3 * 2048)), "fc2": sqrt(8 / (3 * 8192))})


def test_all_formulas_in_two_seconds_without_torch():
    code = (
        "import sys, time, tnpeft\nstart = time.process_time()\n"
        "for name in tnpeft.families.names(): tnpeft.gain(name)\n"
        "assert 'torch' not in sys.modules\nprint(time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2


def test_rates_move_every_line_alike():
    sizes = {"out": 64, "inp": 32, "layer": 2, "proj": 2}
    for name in ("lora", "moslora", "tucker", "cp", "tt_lora"):
        f = families.get(name)()
        rates = tnpeft.learning_rates(f, sizes, relative_step=1e-3, rms_base=0.05)
        squares = tnpeft.scaling.gain_squares(f, sizes)
        assert sqrt(sum(square * rates[label] ** 2 for label, square in squares.items())) == pytest.approx(5e-5)
        assert rates.keys() == tnpeft.parameters_by_factor(f, sizes).keys()


@given(st.floats(0.1, 10))
def test_rates_scale_with_a_rescaled_bond(factor):
    line, sizes = "B[out r] M[r s] A[s inp] -> out inp", {"out": 8, "r": 4, "s": 2, "inp": 8}
    ranks = {"r": 4, "s": 2}

    def rates(c):
        f = Factorization.of(line, ranks=ranks, init={"M": f"normal({c})", "A": f"normal({1 / c})"})
        return tnpeft.learning_rates(f, sizes, relative_step=1e-3)

    one, other = rates(1.0), rates(factor)
    assert other == pytest.approx({"B": one["B"], "M": one["M"] * factor, "A": one["A"] / factor})


def test_structure_rule_has_the_ratio_of_lora_plus():
    f, sizes = families.lora(rank=4), {"out": 64, "inp": 32, "layer": 1, "proj": 1}
    plan = tnpeft.plan(f, sizes, tokens=4, minimize="macs")
    rates = tnpeft.learning_rates(f, sizes, relative_step=1e-3, rule="structure", plan=plan)
    assert rates["B"] / rates["A"] == pytest.approx(32 / 4)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"relative_step": 0.0}, "relative_step is 0.0"),
        ({"relative_step": 1.0, "rms_base": -1}, "rms_base is -1"),
        ({"relative_step": 1.0, "rule": "structure"}, "reads the steps of a plan"),
        ({"relative_step": 1.0, "rule": "measured"}, "cannot be worked out from sizes"),
        ({"relative_step": 1.0, "rule": "best"}, "rule='best' is unknown"),
    ],
)
def test_rates_refuse(keywords, message):
    with pytest.raises(NetworkError, match=message):
        tnpeft.learning_rates(families.lora(), out=8, inp=8, layer=1, proj=1, **keywords)
