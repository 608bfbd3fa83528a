"""Networks as data: roles of indices, new networks from old ones, factorizations and sites."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnpeft import Factor, Factorization, Network, NetworkError, Site, SiteRule, Term, network
from tnpeft.testing import brute, factors_for, networks, random_factors, sizes_for

TERA = network(
    "~G[a b c] ~X1[o1 a] x1[layer proj a] ~X2[o2 b] x2[layer proj b] ~Y[inp c] y[layer proj c]"
    " -> layer proj (o1 o2) inp"
)
QUANTA = network("G[o1 i1 u] H[u o2 i2] - ~G[o1 i1 u] ~H[u o2 i2] -> (o1 o2) (i1 i2)")


def test_roles_of_indices() -> None:
    assert TERA.indices == ("a", "b", "c", "o1", "layer", "proj", "o2", "inp")
    assert TERA.bonds == TERA.hyper[:3] == ("a", "b", "c")
    assert TERA.hyper == ("a", "b", "c", "layer", "proj")
    assert TERA.batch == TERA.stack == ("layer", "proj")
    assert (TERA.rows, TERA.cols) == (("o1", "o2"), ("inp",))


@given(networks(tied=True, twins=True))
def test_roles_follow_from_counting_places(net: Network) -> None:
    outer = Counter(index for group in net.output for index in group)
    places = [Counter(i for factor in term.factors for i in factor.indices) + outer for term in net.terms]
    assert set(net.bonds) == set(net.indices) - set(outer)
    assert set(net.hyper) == {i for count in places for i, n in count.items() if n >= 3}
    assert set(net.batch) == {i for count in places for i, n in count.items() if n >= 3 and i in outer}
    assert (*net.stack, *net.rows, *net.cols) == net.outer


def test_a_factor_used_twice_is_one_factor_and_a_frozen_twin_another() -> None:
    tied = network("U[out a] U[inp a] -> out inp")
    assert (len(tied.factors), len(list(tied.uses()))) == (1, 2)
    assert [QUANTA.label(factor) for factor in QUANTA.factors] == ["G", "H", "~G", "~H"]
    assert QUANTA.factor("~G") == Factor("G", ("o1", "i1", "u"), "frozen")
    assert TERA.factor("G").kind == "frozen"  # without a trainable G beside it the label is the name
    with pytest.raises(NetworkError, match=r"no factor is called 'K'(.|\n)*the factors are G, H, ~G, ~H"):
        QUANTA.factor("K")


@given(networks(tied=True, twins=True), st.data())
def test_rename_renames_and_nothing_else(net: Network, data: st.DataObject) -> None:
    names = dict(zip(net.indices, (f"n{k}" for k in range(len(net.indices))), strict=True))
    there = net.rename(names)
    assert set(there.indices) == set(names.values())
    assert there.rename({new: old for old, new in names.items()}) == net
    sizes = data.draw(sizes_for(net))
    factors = data.draw(factors_for(net, sizes))
    np.testing.assert_array_equal(brute(there, factors), brute(net, factors))


def test_rename_may_swap_but_not_merge() -> None:
    net = network("B[out r] A[r inp] -> out inp")
    assert str(net.rename(out="inp", inp="out")) == "B[inp r] A[r out] -> inp out"
    with pytest.raises(NetworkError, match="two indices would both be called 'out'"):
        net.rename(r="out")
    with pytest.raises(NetworkError, match=r"'q' is none of the indices(.|\n)*the indices are out, r, inp"):
        net.rename(q="p")
    with pytest.raises(NetworkError, match="reserved word"):
        net.rename(r="tokens")
    with pytest.raises(NetworkError, match="is not a name"):
        net.rename(r="two words")


@given(networks(tied=True, twins=True), st.data())
def test_select_gives_the_network_of_one_site(net: Network, data: st.DataObject) -> None:
    sizes = data.draw(sizes_for(net))
    factors = data.draw(factors_for(net, sizes))
    if any(len({f.indices for f in net.uses() if f.name == name}) > 1 for name in {f.name for f in net.factors}):
        return  # a factor used with different indices has no single value to select
    at = {index: data.draw(st.integers(0, sizes[index] - 1)) for index in net.stack}
    one = net.select(**at)
    assert one.stack == ()
    taken = {
        net.label(f): factors[net.label(f)][tuple(at.get(index, slice(None)) for index in f.indices)]
        for f in net.factors
    }
    expected = brute(net, factors)[tuple(at[index] for index in net.stack)]
    np.testing.assert_allclose(brute(one, taken), expected, rtol=1e-13, atol=1e-13)


def test_select_asks_for_stack_indices_and_whole_numbers() -> None:
    assert TERA.select("layer", proj=1).stack == ()
    assert TERA.select(layer=3) == TERA.select(layer=5)
    with pytest.raises(NetworkError, match="'o1' is none of the stack indices"):
        TERA.select(o1=1)
    for value in (-1, 1.5, True, "0"):
        with pytest.raises(NetworkError, match="cannot select layer"):
            TERA.select(layer=value)  # type: ignore[arg-type]


def test_a_group_of_stack_indices_vanishes_with_its_last_index() -> None:
    net = network("A[layer proj out inp] -> (layer proj) out inp")
    assert str(net.select("proj")) == "A[layer out inp] -> layer out inp"
    assert str(net.select("proj", "layer")) == "A[out inp] -> out inp"


@given(networks(twins=True), st.data())
def test_apply_is_the_product_with_the_activations(net: Network, data: st.DataObject) -> None:
    sizes = data.draw(sizes_for(net))
    factors = data.draw(factors_for(net, sizes))
    applied = net.apply()
    x = random_factors(applied, {**sizes, "token": 3}, seed=1)["x"]
    expected = np.einsum("...oi,ti->...to", brute(net, factors), x.reshape(3, -1))
    scale = np.einsum("...oi,ti->...to", brute(net, factors, absolute=True), np.abs(x.reshape(3, -1)))
    assert (np.abs(brute(applied, {**factors, "x": x}) - expected) <= 1e-12 * scale).all()


def test_apply_refuses_taken_names_and_lines_without_a_matrix() -> None:
    net = network("x[out r] A[r inp] -> out inp")
    with pytest.raises(NetworkError, match=r"the name 'x' is taken"):
        net.apply()
    assert net.apply(name="h", batch="row").output == (("row",), ("out",))
    with pytest.raises(NetworkError, match=r"the name 'r' is taken"):
        net.apply(name="h", batch="r")
    with pytest.raises(NetworkError, match="no rows and columns") as caught:
        network("v[out] -> out").apply()
    assert caught.value.position == 7


def test_networks_are_values() -> None:
    again = network(str(TERA))
    assert again == TERA
    assert hash(again) == hash(TERA)
    assert pickle.loads(pickle.dumps(TERA)) == TERA
    with pytest.raises(AttributeError):
        TERA.terms = ()  # type: ignore[misc]


def test_a_network_built_by_hand_is_checked_as_a_line_is() -> None:
    with pytest.raises(NetworkError, match="a term without factors"):
        Network((), (("out",), ("inp",)))
    with pytest.raises(NetworkError, match="'a b' is not a name"):
        Network((Term((Factor("A", ("a b", "inp")),)),), (("a b",), ("inp",)))
    with pytest.raises(NetworkError, match="'A B' is not a name"):
        Network((Term((Factor("A B", ("out", "inp")),)),), (("out",), ("inp",)))


@pytest.mark.parametrize("name", ["tokens", "model", "a b", "2r", "", "\u00b5"])
def test_a_name_that_no_line_could_hold_is_refused_in_every_place(name: str) -> None:
    for factors, output in (
        ((Factor("A", ("out", name)), Factor("B", (name, "inp"))), (("out",), ("inp",))),
        ((Factor("A", ("out", name)),), (("out",), (name,))),
        ((Factor("A", ("out",)),), (("out",), (name,))),
    ):
        with pytest.raises(NetworkError, match=r"is not a name|reserved word|cannot be an index") as caught:
            Network((Term(factors),), output)
        assert caught.value.position is not None


@pytest.mark.parametrize("name", ["out", "inp", "heads", "layer", "proj", "expert", "task", "replica"])
@pytest.mark.parametrize("place", ["bond", "rows", "columns", "stack"])
def test_a_name_with_a_meaning_in_a_model_means_nothing_else(name: str, place: str) -> None:
    """A rank would be overwritten by the site's size, a stack index would become the rows: refused with a caret."""
    line = {
        "bond": "A[o {0}] B[{0} i] -> o i",
        "rows": "A[{0} i] -> {0} i",
        "columns": "A[o {0}] -> o {0}",
        "stack": "A[{0} o i] -> {0} o i",
    }[place].format(name)
    home = {"out": ["rows"], "inp": ["columns"], "heads": ["rows", "columns", "stack"]}.get(name, ["stack"])
    net = network(line)
    if place in home:
        assert Factorization.of(net).sizes(out=8, inp=8, layer=2)
        return
    with pytest.raises(NetworkError, match=f"^'{name}' is") as caught:
        Factorization.of(net, ranks={name: 3} if place == "bond" else {}).sizes(out=8, inp=8)
    assert line[caught.value.position :].startswith(name)


def test_features_of_a_site_are_not_the_size_of_an_index_inside_a_group() -> None:
    f = Factorization.of("A[head out r] B[r inp k] -> (head out) (k inp)", ranks={"r": "min(out, inp)"})
    assert f.sizes(out=12, inp=8, heads=3) == {"head": 3, "out": 4, "r": 8, "inp": 4, "k": 2}


def test_errors_survive_pickling_with_their_parts() -> None:
    with pytest.raises(NetworkError) as caught:
        network("A[out inp r] -> out inp")
    back = pickle.loads(pickle.dumps(caught.value))
    assert (str(back), back.position, back.remedy) == (str(caught.value), 10, caught.value.remedy)


# ---- factorizations


LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"


def test_a_factorization_fills_ranks_and_splits() -> None:
    f = Factorization.of("A[o1 o2 r] B[r i1 i2] -> (o1 o2) (i1 i2)", ranks={"r": 4}, splits={"out": (None, 8)})
    assert f.sizes(out=64, inp=12) == {"o1": 8, "o2": 8, "r": 4, "i1": 3, "i2": 4}
    assert f.sizes(out=64, inp=12, r=2)["r"] == 2
    assert f.with_ranks(r=7).sizes(out=64, inp=12)["r"] == 7
    assert f.sizes() == {"r": 4}


def test_a_rank_may_be_a_rule_that_waits_for_its_sizes() -> None:
    f = Factorization.of("B[out n] A[n inp] -> out inp", ranks={"n": "ceildiv(min(out, inp), 4)"})
    assert f.sizes() == {}
    assert f.sizes(out=10, inp=30) == {"out": 10, "n": 3, "inp": 30}


def test_an_index_called_head_has_the_size_of_the_heads() -> None:
    f = Factorization.of("A[head dim r] B[r inp] -> (head dim) inp", ranks={"r": 2})
    assert f.sizes(out=12, inp=6, heads=3) == {"head": 3, "dim": 4, "r": 2, "inp": 6}
    assert f.sizes(out=12, inp=6) == {"head": 3, "dim": 4, "r": 2, "inp": 6}
    assert f.sizes(out=64, inp=6, heads=2)["dim"] == 32
    with pytest.raises(NetworkError, match="their product does not make 12"):
        f.sizes(out=12, inp=6, heads=5)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "no rank for the bond 'r'"),
        ({"ranks": {"r": 0}}, "the size of 'r' is 0"),
        ({"ranks": {"r": 2.5}}, "the size of 'r' is 2.5"),
        ({"ranks": {"r": 2, "q": 3}}, "ranks names 'q', which is none of the bonds"),
        ({"ranks": {"r": 2}, "splits": {"rows": (2, 3)}}, "splits names 'rows'"),
        ({"ranks": {"r": 2}, "init": {"C": "zeros"}}, "init names 'C'"),
        ({"ranks": {"r": 2}, "unit_norm": ("C",)}, "unit_norm names 'C'"),
        ({"ranks": {"r": 2}, "lr_multiplier": {"C": 16.0}}, "lr_multiplier names 'C'"),
        ({"ranks": {"r": 2}, "init": {"A": "zeros", "B": "zeros"}}, "B and A both start at zero"),
        ({"ranks": {"r": 2}, "splits": {"out": (2, 3)}}, "has 2 parts, and the line's side has 1: out"),
    ],
)
def test_what_a_factorization_refuses(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(NetworkError) as caught:
        Factorization.of(LORA, **fields)
    assert problem in caught.value.problem
    assert caught.value.line == LORA
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"ranks": 4}, "ranks is 4"),
        ({"lr_multiplier": 16}, "lr_multiplier is 16"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"unit_norm": "A1"}, "unit_norm is 'A1'"),
        ({"scale": "2"}, "scale is '2'"),
        ({"ranks": {"r": 2}, "splits": {"out": 4}}, "the split of 'out' is 4"),
    ],
)
def test_a_field_of_another_kind_is_named(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(NetworkError, match=problem):
        Factorization.of(LORA, **fields)


def test_a_factor_without_rows_and_columns_has_no_columns_to_normalise() -> None:
    with pytest.raises(NetworkError, match="'w', which has no row or column index"):
        Factorization.of("w[r] B[out r] A[r inp] -> out inp", ranks={"r": 2}, unit_norm=("w",))


def test_a_zero_factor_used_twice_is_a_dead_start_but_two_zero_terms_are_not() -> None:
    with pytest.raises(NetworkError, match=r"U \(used twice\) both start at zero"):
        Factorization.of("U[out a] U[inp a] -> out inp", ranks={"a": 2}, init={"U": "zeros"})
    sums = "B[out r] A[r inp] + D[out s] C[s inp] -> out inp"
    Factorization.of(sums, ranks={"r": 1, "s": 1}, init={"B": "zeros", "D": "zeros"})


def test_a_factorization_is_plain_data() -> None:
    f = Factorization.of(LORA, ranks={"r": 2}, splits={"out": (None,)}, init={"B": "zeros"})
    assert json.loads(json.dumps([dict(f.ranks), dict(f.splits), dict(f.init), f.scale, f.unit_norm]))
    assert pickle.loads(pickle.dumps(f)) == f


def test_a_keyword_that_is_not_in_the_line_is_refused_a_mapping_may_hold_more() -> None:
    f = Factorization.of("B[out r] A[r inp] -> out inp", ranks={"r": 2})
    assert f.bind({"out": 4, "inp": 3, "layer": 7}, {}) == {"out": 4, "r": 2, "inp": 3}
    with pytest.raises(NetworkError, match="unknown index 'layer'"):
        f.bind({"out": 4, "inp": 3}, {"layer": 7})


# ---- sites and lines


@pytest.mark.parametrize(
    ("pattern", "served"),
    [
        ("*", "q_proj k_proj fc1 fc2 fc1/out:2"),
        ("fc2", "fc2"),
        ("q_proj | k_proj", "q_proj k_proj"),
        ("fc1*", "fc1 fc1/out:2"),
        ("out<inp", "fc2"),
        ("out >= inp", "q_proj k_proj fc1 fc1/out:2"),
        ("out>inp", "fc1"),
        ("out<=inp", "q_proj k_proj fc2 fc1/out:2"),
    ],
)
def test_a_line_serves_sites_by_name_or_shape(pattern: str, served: str) -> None:
    shapes = {"q_proj": (4, 4), "k_proj": (4, 4), "fc1": (16, 4), "fc2": (4, 16), "fc1/out:2": (4, 4)}
    line = SiteRule(network("A[out inp] -> out inp"), pattern)
    assert [proj for proj, (out, inp) in shapes.items() if line.serves(Site(0, proj, out, inp))] == served.split()


def test_a_pattern_or_site_that_means_nothing_is_refused() -> None:
    line = SiteRule(network("A[out inp] -> out inp"), "out<rows")
    with pytest.raises(NetworkError, match=r"invalid pattern of sites 'out<rows'(.|\n)*out>=inp"):
        line.serves(Site(0, "fc1", 4, 2))
    f = Factorization(
        "two",
        (SiteRule(network("A[out inp] -> out inp"), "fc1"), SiteRule(network("v[out] w[inp] -> out inp"), "q_*")),
    )
    assert f.rule_for(Site(0, "q_proj", 4, 4)) is f.lines[1]
    with pytest.raises(NetworkError, match=r"no line of 'two' serves v_proj \(4 x 4\)"):
        f.rule_for(Site(0, "v_proj", 4, 4))


def test_squares_cut_the_longer_side() -> None:
    assert [(s.proj, s.out, s.inp, s.start) for s in Site(1, "fc2", 2, 6).squares()] == [
        ("fc2/inp:0", 2, 2, 0),
        ("fc2/inp:1", 2, 2, 2),
        ("fc2/inp:2", 2, 2, 4),
    ]
    assert len(Site(0, "q_proj", 4, 4).squares()) == 1
    with pytest.raises(NetworkError, match=r"fc1 \(5 x 2\) cannot be cut into squares"):
        Site(0, "fc1", 5, 2).squares()
