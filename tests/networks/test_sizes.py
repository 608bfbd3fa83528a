"""Sizes: what may be one, what is asked for, how a dimension is split, and rules for ranks."""

from __future__ import annotations

import itertools
import keyword
import re
import time
import unicodedata
from math import prod
from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

import tnpeft
from tnpeft import NetworkError, network
from tnpeft.networks import STACK, Network
from tnpeft.networks.factor import RESERVED
from tnpeft.networks.sizes import bind, complete, evaluate, even_split, integers, split
from tnpeft.testing import networks, sizes_for

LORA = network("B[layer out r] A[layer r inp] -> layer out inp")
TIED = network("U[out a] U[inp a] -> out inp")


@pytest.mark.parametrize("size", [1, np.int64(3), sympy.Integer(4), sympy.Symbol("d"), 2 * sympy.Symbol("d") + 1])
def test_what_is_a_size(size: Any) -> None:
    bound = bind(LORA, {"out": size}, {})
    assert bound == {"out": size}
    assert isinstance(bound["out"], int) or bound["out"].free_symbols


@pytest.mark.parametrize(
    "size", [0, -1, 2.0, 2.5, "3", None, True, False, float("nan"), [2], sympy.Integer(0), sympy.Rational(1, 2)]
)
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(NetworkError) as caught:
        bind(LORA, {}, {"out": size})
    assert caught.value.problem == f"the size of 'out' is {size!r}"
    assert caught.value.line == str(LORA)
    assert "positive whole number or a symbol" in caught.value.remedy


def test_a_keyword_must_be_an_index_a_mapping_may_hold_more() -> None:
    assert bind(LORA, {"out": 3, "heads": 2}, {"r": 1}) == {"out": 3, "r": 1}
    assert bind(LORA, {"out": 3}, {"out": 5}) == {"out": 5}
    with pytest.raises(NetworkError) as caught:
        bind(LORA, {}, {"heads": 2})
    assert caught.value.problem == "unknown index 'heads'"
    assert caught.value.remedy == "the indices are layer, out, r, inp"


def test_two_uses_of_a_factor_have_one_shape() -> None:
    assert bind(TIED, {}, {"out": 4, "a": 2, "inp": 4})["inp"] == 4
    with pytest.raises(NetworkError) as caught:
        bind(TIED, {}, {"out": 4, "a": 2, "inp": 5})
    assert caught.value.problem == "factor 'U' is used with shapes (4, 2) and (5, 2)"
    with pytest.raises(NetworkError, match="factor 'G' is used with shapes"):
        bind(network("G[out a] H[a inp] - ~G[out b] ~H[b inp] -> out inp"), {}, {"out": 2, "inp": 2, "a": 1, "b": 2})


def test_missing_sizes_are_named() -> None:
    with pytest.raises(NetworkError) as caught:
        complete(LORA, {"out": 3, "r": 1})
    assert caught.value.problem == "no size for 'layer', 'inp'"
    assert caught.value.remedy == "pass layer=..., inp=..."
    complete(LORA, {"out": 3, "r": 1}, needed=("r",))


@given(networks(tied=True, twins=True), st.data())
def test_drawn_sizes_fit(net: Network, data: st.DataObject) -> None:
    sizes = data.draw(sizes_for(net))
    assert integers(net, bind(net, sizes, {})) == sizes


# ---- splits


@given(st.integers(1, 400), st.integers(1, 4))
def test_an_even_split_is_the_best_of_all(size: int, parts: int) -> None:
    found = even_split(size, parts)
    assert prod(found) == size
    assert list(found) == sorted(found)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    best = min(
        sum((*rest, size // prod(rest)))
        for rest in itertools.combinations_with_replacement(divisors, parts - 1)
        if size % prod(rest) == 0
    )
    assert sum(found) == best


def test_a_split_of_nothing() -> None:
    assert even_split(1, 0) == ()
    assert split(12, ("a",), (12,)) == {"a": 12}
    assert split(2048, ("a", "b", "c"), (None, 32, None)) == {"a": 8, "b": 32, "c": 8}


@pytest.mark.parametrize(
    ("size", "group", "given_sizes", "problem"),
    [
        (12, "ab", (5, None), "(a b) cannot have the sizes (5, None): their product does not make 12"),
        (12, "ab", (3, 3), "their product does not make 12"),
        (12, "ab", (0, None), "their product does not make 12"),
        (12, "ab", (12,), "1 sizes are given for the 2 indices of (a b)"),
        (12, "a", (3, 4), "2 sizes are given for the 1 indices of (a)"),
        (3, "", (), "() cannot have the sizes (): their product does not make 3"),
    ],
)
def test_what_cannot_be_split(size: int, group: str, given_sizes: tuple[int | None, ...], problem: str) -> None:
    with pytest.raises(NetworkError) as caught:
        split(size, tuple(group), given_sizes)
    assert problem in caught.value.problem


# ---- rules


@given(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99))
def test_rules_are_arithmetic(a: int, b: int, c: int) -> None:
    sizes = {"a": a, "b": b, "c": c}
    assert evaluate("ceildiv(min(a, b), c) + max(a, b, c) * 2 - a // b", sizes) == (
        -(-min(a, b) // c) + max(a, b, c) * 2 - a // b
    )
    assert evaluate("isqrt(a)", sizes) == int(a**0.5)


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "a +",
        "q",
        "a.b",
        "a ** 9 ** 9",
        "__import__('os').getcwd()",
        "min(a",
        "min()",
        "min(a, key=a)",
        "[a][0]",
        "(lambda: a)()",
        "a if a else b",
        "a / b",
        "1.5",
        "'a'",
        "True",
        "a // 0",
        "isqrt(0 - a)",
        "a; b",
        "-a",
        "min(*a)",
        "min(a, b, key=a)",
        "a" * 201,
        "\x00",
    ],
)
def test_a_rule_that_is_no_rule_is_refused(rule: str) -> None:
    with pytest.raises(NetworkError):
        evaluate(rule, {"a": 6, "b": 3})


@pytest.mark.parametrize("bad", [3, "r=2", [2], True])
def test_sizes_that_are_no_mapping_are_said_so(bad: Any) -> None:
    lora = tnpeft.families.lora(rank=2)
    asked = (
        lambda: tnpeft.parameters(LORA, bad),
        lambda: tnpeft.parameters(lora, bad, model="roberta-base"),
        lambda: tnpeft.parameter_step(LORA, "r", bad),
        lambda: tnpeft.gain(lora, bad),
        lambda: tnpeft.budget("lora", bad, parameters=9),
        lambda: tnpeft.plan(LORA, bad),
        lambda: tnpeft.mermaid(LORA, bad),
        lambda: tnpeft.fit(LORA, np.ones((2, 3, 4)), bad),
    )
    for ask in asked:
        with pytest.raises(NetworkError, match=r"the sizes are .*\npass a mapping"):
            ask()


@pytest.mark.parametrize("bad", [None, 3])
def test_a_picture_of_no_network_is_refused(bad: Any) -> None:
    with pytest.raises(NetworkError, match="expected a Network"):
        tnpeft.mermaid(bad)


@pytest.mark.parametrize("bad", ["B[out r] A[r inp] -> out inp", "lora", None, 3])
def test_what_is_no_network_is_said_so(bad: object) -> None:
    asked = (
        lambda: tnpeft.parameters(bad),
        lambda: tnpeft.parameters(bad, r=2, model="roberta-base"),
        lambda: tnpeft.parameter_step(bad, "r"),
        lambda: tnpeft.rank_bound(bad, out=4, inp=4, r=2),
        lambda: tnpeft.dof(bad, out=4, inp=4, r=2),
        lambda: tnpeft.plan(bad, {"out": 4, "inp": 4, "r": 2}, tokens=8),
        lambda: tnpeft.plan_table(bad, {"out": 4, "inp": 4, "r": 2}),
        lambda: tnpeft.dense(bad, {}),
    )
    for ask in asked:
        with pytest.raises(NetworkError, match=r"expected a Network, got \w+: .*\nread a line with tnpeft\.network"):
            ask()


@pytest.mark.parametrize("size", [720_720, 963_761_198_400, 2**47, 6**18, 16_777_213 * 16_777_199])
@pytest.mark.parametrize("parts", [2, 5, 8, 12, 300])
def test_a_size_with_many_divisors_is_split_at_once(size: int, parts: int) -> None:
    started = time.process_time()
    found = even_split.__wrapped__(size, parts)
    assert prod(found) == size
    assert list(found) == sorted(found)
    assert len(found) == parts
    assert time.process_time() - started < 5


def test_a_size_that_cannot_be_factored_is_refused() -> None:
    with pytest.raises(NetworkError, match="not split by itself"):
        even_split(2**61 - 1, 2)
    assert split(2**61, ("a", "b"), (2**40, None)) == {"a": 2**40, "b": 2**21}


def test_a_split_that_does_not_fit_is_shown_in_the_line() -> None:
    line = "A[o1 r] B[o2 r inp] -> (o1 o2) inp"
    with pytest.raises(NetworkError, match="does not make 12") as caught:
        tnpeft.Factorization.of(line, ranks={"r": 1}, splits={"out": (5, None)}).sizes(out=12, inp=3)
    assert caught.value.position == line.index("(")


def test_sizes_that_python_cannot_print_are_refused() -> None:
    with pytest.raises(NetworkError, match="the size of 'out' has over 4,000 digits"):
        bind(LORA, {"out": 10**5000}, {})
    with pytest.raises(NetworkError, match=r"factor 'B' would have more than 10\*\*4,000 elements"):
        bind(LORA, {"layer": 10**1500, "out": 10**1500, "r": 10**1500}, {})
    assert tnpeft.parameters(LORA, layer=10**1000, out=10**1000, r=1, inp=1) == 10**2000 + 10**1000


@given(st.text(min_size=1, max_size=3).filter(lambda name: name.isidentifier() and re.fullmatch(r"\w+", name)))
def test_a_name_means_the_same_as_a_keyword_and_in_a_line(name: str) -> None:
    """Python folds names to NFKC; a micro sign in the line is then the Greek letter of the keyword."""
    if unicodedata.normalize("NFKC", name) in RESERVED | {"o", "i", "net", "out", "inp", "heads", *STACK}:
        return
    net = network(f"A[o {name}] B[{name} i] -> o i")
    scope: dict[str, Any] = {"tnpeft": tnpeft, "net": net}
    if not keyword.iskeyword(name):
        assert eval(f"tnpeft.parameters(net, o=2, i=3, {name}=5)", scope) == 25
    assert tnpeft.parameters(net, {"o": 2, "i": 3, name: 5}) == 25
    assert tnpeft.Factorization.of(net, ranks={name: 5}).sizes(o=2)[net.bonds[0]] == 5


CONV = "G1[out a] G2[a inp b] G3[b kh c] G4[c kw] -> out (inp kh kw)"


@pytest.mark.parametrize("features", [{"inp": 72, "kh": 3, "kw": 3}, {"inp": 9}, {"inp": 72, "kh": 9}])
@pytest.mark.parametrize("name", ["own", *tnpeft.families.names()])
def test_sizes_may_be_given_again(name: str, features: dict[str, int]) -> None:
    if name == "own":
        f = tnpeft.Factorization.of(CONV, ranks=dict.fromkeys("abc", 2))
    else:
        f, features = tnpeft.families.get(name)(), {"inp": 64}
    stack = dict.fromkeys(f.network.stack, 3)
    for line in f.lines:
        sizes = f.sizes(out=16, heads=4, **stack, **features, line=line)
        assert f.sizes(sizes, line=line) == sizes
    if name == "own":
        assert tnpeft.parameters(f, sizes) == tnpeft.parameters(f, out=16, **features)
        assert f.sizes(sizes, inp=144)["inp"] * f.sizes(sizes, inp=144)["kh"] * sizes["kw"] == 144
