"""Plans against every tree of a small network, other optimisers, RunLoRA's rule, and brute force over tokens."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from itertools import product as grid
from math import prod

import cotengra
import numpy as np
import opt_einsum
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_costs import Cost, least_macs, plus, term_leaves, tree_cost, trees
from sympy import Integer, Symbol, symbols

import tnpeft
from tnpeft import NetworkError, families, network
from tnpeft.planning import OBJECTIVES, plan, plan_table
from tnpeft.planning.planner import score, weights
from tnpeft.planning.search import EXACT, Operand, Weights, search
from tnpeft.testing import networks, sizes_for

LORA = network("B[layer out r] A[layer r inp] -> layer out inp")


def operands(*terms: str) -> list[Operand]:
    return [Operand(frozenset(term)) for term in terms]


def path_macs(terms: list[str], output: str, sizes: dict[str, int], path: tuple[tuple[int, int], ...]) -> int:
    """Multiply-adds of a path, indices counted over what is still there at every step."""
    there: dict[int, set[str]] = {k: set(term) for k, term in enumerate(terms)}
    total = 0
    for fresh, (a, b) in enumerate(path, start=len(terms)):
        union = there.pop(a) | there.pop(b)
        total += prod(sizes[index] for index in union)
        there[fresh] = union & set(output).union(*there.values())
    assert len(there) == 1
    return total


@st.composite
def sized(draw: st.DrawFn, **options: object) -> tuple[object, dict[str, int]]:
    net = draw(networks(**options))  # type: ignore[arg-type]
    site = net.select(*net.stack)
    return site, draw(sizes_for(site, max_size=9, max_work=1 << 40))


def operand_count(name: str) -> int:
    """The most operands that a term of a family has with the activations."""
    return 1 + max(len(term.factors) for term in families.get(name)().network.terms)


# ---- the search


@pytest.mark.parametrize(
    ("equation", "sizes"),
    [
        ("bgk,bkd,bk->bgd", {"b": 64, "g": 8, "k": 4096, "d": 128}),
        (
            "iP,sP,PQ,jQ,tQ,ti,sj->",
            {"i": 300, "j": 300, "s": 50, "t": 50, "P": 2000, "Q": 2000},
        ),
        ("bi,ip,hq,ds,pqs->bhd", {"b": 2048, "i": 768, "h": 12, "d": 64, "p": 8, "q": 4, "s": 8}),
        ("bi,ir,or,is,os->bo", {"b": 2048, "i": 1024, "o": 1024, "r": 8, "s": 8}),
    ],
)
def test_hyper_indices_are_searched_exactly(equation: str, sizes: dict[str, int]) -> None:
    left, output = equation.split("->")
    terms = left.split(",")
    path, exact = search(operands(*terms), frozenset(output), sizes, Weights(macs=1))
    best = cotengra.OptimalOptimizer(minimize="flops", search_outer=True)
    other = best.search([tuple(term) for term in terms], tuple(output), sizes)
    assert exact
    assert path_macs(terms, output, sizes, path) == other.contraction_cost()


def test_the_cases_that_break_opt_einsum_still_break_it() -> None:
    """Issue 254's graph: a search that is blind to shared output indices costs more, so the comparison has teeth."""
    terms, sizes = ["bgk", "bkd", "bk"], {"b": 64, "g": 8, "k": 4096, "d": 128}
    path, _ = search(operands(*terms), frozenset("bgd"), sizes, Weights(macs=1))
    blind = opt_einsum.paths.optimal([set(t) for t in terms], set("bgd"), sizes)
    ssa = tuple(tuple(sorted(pair)) for pair in opt_einsum.paths.linear_to_ssa(blind))
    assert path_macs(terms, "bgd", sizes, path) < path_macs(terms, "bgd", sizes, ssa)


def test_a_scalar_is_multiplied_into_the_smallest_tensor() -> None:
    """Operands without a common index are one problem: s * A costs less than s * (B A)."""
    sizes = {"o": 64, "r": 2, "i": 32}
    path, _ = search(operands("", "or", "ri"), frozenset("oi"), sizes, Weights(macs=1))
    assert path_macs(["", "or", "ri"], "oi", sizes, path) == 2 * 32 + 64 * 2 * 32


@pytest.mark.parametrize("count", [EXACT + 1, 30, 100])
def test_large_networks_are_planned_at_once_and_say_so(count: int) -> None:
    chain = " ".join(f"G{k}[a{k} a{k + 1}]" for k in range(count))
    net = network(f"{chain} -> a0 a{count}")
    start = time.perf_counter()
    p = plan(net, dict.fromkeys(net.indices, 3), tokens=7)
    assert time.perf_counter() - start < 5
    assert not p.exact
    assert "too many operands" in str(p)
    assert p.macs <= 7 * 9 * count + 9  # from the activations' end, one core after the other


# ---- plans against every tree


@settings(max_examples=500, deadline=None, derandomize=True)
@given(sized(), st.integers(1, 3000), st.booleans())
def test_least_macs_is_the_least_over_all_programs(case, tokens: int, base: bool) -> None:
    net, sizes = case
    p = plan(net, sizes, tokens=tokens, minimize="macs", base="fp32" if base else None)
    assert p.exact
    assert p.macs == least_macs(net, sizes, tokens, base)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sized(max_factors=4, max_terms=1), st.integers(1, 3000), st.booleans(), st.sampled_from(OBJECTIVES))
def test_every_objective_is_exact_for_one_term(case, tokens: int, training: bool, minimize: str) -> None:
    net, sizes = case
    sizes = {**sizes, "token": tokens}
    leaves, output = term_leaves(net, net.terms[0], applied=True)
    live = {net.label(f) for f in net.factors if f.kind == "trainable"} | {"x"} if training else set()

    def key(cost: Cost) -> int:
        if not training:
            cost = cost._replace(backward=0, saved=0)
        return cost.time() if minimize == "time" else getattr(cost, minimize)

    every = (tree_cost(tree, leaves, output, sizes, live) for tree in trees(tuple(range(len(leaves)))))
    p = plan(net, sizes, tokens=tokens, minimize=minimize, training=training, base=None)
    assert key(Cost(p.macs, p.backward_macs, p.written, p.saved)) == min(map(key, every))


@pytest.mark.parametrize("name", [name for name in families.names() if operand_count(name) <= 10])
@pytest.mark.parametrize("tokens", [1, 50, 2048])
def test_families_have_the_least_macs(name: str, tokens: int) -> None:
    f = families.get(name)()
    sizes = f.sizes({"out": 64, "inp": 64, "heads": 4, "layer": 2, "proj": 2, "basis": 2, "o": 64, "i": 64})
    net = f.network.select(*f.network.stack)
    p = plan(net, sizes, tokens=tokens, minimize="macs")
    assert p.macs == least_macs(net, {i: sizes[i] for i in net.indices}, tokens, True)


def test_eight_operands_are_planned_quickly() -> None:
    f = families.get("tt_lora")() if "tt_lora" in families.names() else families.get("tensor_train")()
    sizes = f.sizes({"out": 2048, "inp": 2048, "layer": 24, "proj": 2})
    best = min(_planning_time(f, sizes, tokens) for tokens in range(1000, 1005))
    assert best < 0.5


def _planning_time(f, sizes, tokens: int) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    plan(f, sizes, tokens=tokens)
    return time.perf_counter() - start


def test_lora_follows_runlora() -> None:
    """2312.03415: X (W + B A) wins by flops over X W + (X A) B exactly if tokens (out + inp) > out inp."""
    for tokens, out, inp, r in grid((1, 31, 512, 4096), (32, 768, 2048), (64, 768, 8192), (1, 8, 64)):
        p = plan(LORA, out=out, inp=inp, r=r, tokens=tokens, minimize="macs", training=False)
        assert (p.form == "merged") == (tokens * (out + inp) > out * inp)
        assert p.macs == r * min(out * inp, tokens * (out + inp))
        assert plan(LORA, out=out, inp=inp, r=r, tokens=tokens, minimize="macs", base=None).form == "factored"


# ---- what a plan says


def test_costs_of_lora() -> None:
    b, o, i, r = 7, 5, 4, 2
    p = plan(LORA, out=o, inp=i, r=r, tokens=b, base=None)
    assert (p.macs, p.flops) == (b * r * (i + o), 2 * b * r * (i + o))
    assert p.backward_macs == 2 * p.macs
    assert (p.written, p.largest, p.saved) == (b * (r + o), b * o, b * (i + r))
    assert plan(LORA, out=o, inp=i, r=r, tokens=b, training=False, base=None).saved == 0
    frozen = network("B[out r] ~A[r inp] -> out inp")
    p = plan(frozen, out=o, inp=i, r=r, tokens=b, base=None)
    assert (p.backward_macs, p.saved) == (b * r * i + 2 * b * r * o, b * r)


def test_printed_as_the_program_it_is() -> None:
    text = str(plan(LORA, out=64, inp=32, r=2, tokens=8))
    assert "t1[token r] = x[token inp] * A[r inp]" in text
    assert "y[token out] = t1[token r] * B[out r]" in text
    assert "exact search" in text


def test_names_of_results_avoid_those_of_factors() -> None:
    net = network("x[out t1] y[t1 W] t1[W token] t2[token inp] -> out inp")
    p = plan(net, {"out": 3, "t1": 2, "W": 2, "token": 2, "inp": 4}, tokens=5)
    names = [step.result for step in p.steps]
    assert not set(names) & {"x", "y", "t1", "t2"}
    assert p.steps[-1].indices == ("token_", "out")


def test_tied_factors_count_every_use() -> None:
    net = network("U[out a] U[inp a] -> out inp")
    p = plan(net, out=6, inp=6, a=2, tokens=3, minimize="macs", base=None)
    assert (p.macs, p.backward_macs) == (3 * 2 * 12, 2 * 3 * 2 * 12)


def test_a_plan_of_the_dense_tensor_takes_any_output() -> None:
    p = plan(network("A[a r] B[b r] C[c r] -> a b c"), {"a": 2, "b": 3, "c": 4, "r": 5})
    assert p.form == "dense"
    assert set(p.steps[-1].indices) == {"a", "b", "c"}
    assert p.macs == min(2 * 3 * 5 + 60 * 2, 3 * 4 * 5 + 120, 2 * 4 * 5 + 120)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out": 4, "inp": 4, "tokens": 2}, "no size for 'r'"),
        ({"out": 4, "inp": 4, "r": 0, "tokens": 2}, "the size of 'r' is 0"),
        ({"out": 4, "inp": 4, "r": Symbol("r"), "tokens": 2}, "symbol"),
        ({"out": 4, "inp": 4, "r": 2, "q": 3, "tokens": 2}, "unknown index 'q'"),
        ({"out": 4, "inp": 4, "r": 2, "tokens": 0}, "'tokens' is 0"),
        ({"out": 4, "inp": 4, "r": 2, "tokens": 2, "minimize": "beauty"}, "objective"),
        ({"out": 4, "inp": 4, "r": 2, "tokens": 2, "base": "bf16"}, "bf16"),
    ],
)
def test_errors_name_the_input(options: dict[str, object], words: str) -> None:
    with pytest.raises(NetworkError, match=words):
        plan(LORA, **options)  # type: ignore[arg-type]


# ---- other sizes, symbols, tokens


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sized(), st.integers(1, 50))
def test_symbolic_costs_are_the_costs(case, tokens: int) -> None:
    net, sizes = case
    p = plan(net, sizes, tokens=tokens)
    names = dict(zip(p.sizes, symbols(f"s0:{len(p.sizes)}", positive=True), strict=True))
    general = p.resized(**names)
    values = {names[index]: Integer(size) for index, size in p.sizes.items()}
    for what in ("macs", "flops", "backward_macs", "written", "saved", "largest"):
        cost = getattr(general, what)
        assert (cost if isinstance(cost, int) else cost.xreplace(values)) == getattr(p, what)


def test_a_symbol_is_no_number_of_tokens() -> None:
    with pytest.raises(NetworkError, match=r"(?s)tokens is the symbol b.*Plan\.resized"):
        plan(LORA, out=8, inp=8, r=2, tokens=Symbol("b"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sized(), st.integers(1, 50))
def test_costs_are_affine_in_tokens(case, tokens: int) -> None:
    net, sizes = case
    one, two, many = (plan(net, sizes, tokens=tokens).resized(tokens=t) for t in (1, 2, 1001))
    for what in ("macs", "backward_macs", "written", "saved"):
        assert getattr(many, what) == getattr(one, what) + 1000 * (getattr(two, what) - getattr(one, what))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sized(), st.sampled_from(("macs", "time")), st.booleans())
def test_the_table_is_brute_force_over_tokens(case, minimize: str, training: bool) -> None:
    net, sizes = case
    plans = plan_table(net, sizes, minimize=minimize, training=training)
    price = weights(minimize, training)
    for tokens in range(1, 201):
        best = plan(net, sizes, tokens=tokens, minimize=minimize, training=training)
        assert score(plans.at(tokens), price) == score(best, price)


@pytest.mark.parametrize("minimize", OBJECTIVES)
def test_the_table_of_a_tensor_train(minimize: str) -> None:
    net = network("G1[o1 a] G2[a o2 b] G3[b i1 c] G4[c i2] -> (o1 o2) (i1 i2)")
    sizes = {"o1": 32, "o2": 64, "i1": 32, "i2": 64, "a": 8, "b": 8, "c": 8}
    plans = plan_table(net, sizes, minimize=minimize)
    price = weights(minimize, True)
    assert plans.starts[0] == 1
    assert list(plans.starts) == sorted(set(plans.starts))
    for tokens in [*range(1, 201), 1023, 1024, 1025, 1026, 10**6]:
        best = plan(net, sizes, tokens=tokens, minimize=minimize)
        assert score(plans.at(tokens), price) == score(best, price)
    for (before, after), start in zip(pairwise(plans.plans), plans.starts[1:], strict=True):
        assert score(after.resized(tokens=start), price) < score(before.resized(tokens=start), price)


def test_the_oracle_can_fail() -> None:
    """A planner that only goes left to right is caught by the exhaustive count."""
    net = network("G1[out a] G2[a b] G3[b inp] -> out inp")
    sizes = {"out": 8, "a": 2, "b": 8, "inp": 8}
    leaves, output = term_leaves(net, net.terms[0], applied=True)
    worst = max(tree_cost(t, leaves, output, {**sizes, "token": 3}, set()).macs for t in trees((0, 1, 2, 3)))
    assert worst > least_macs(net, sizes, 3, base=False)
    assert plus(Cost(1, 2, 3, 4), Cost(1, 1, 1, 1)) == Cost(2, 3, 4, 5)


def test_random_paths_never_beat_the_search() -> None:
    generator = random.Random(0)
    for _ in range(50):
        terms = ["".join(generator.sample("abcdef", generator.randint(1, 4))) for _ in range(6)]
        output = "".join(sorted(set("".join(terms)) & set("ab")))
        sizes = {index: generator.randint(1, 9) for index in "abcdef"}
        best, _ = search(operands(*terms), frozenset(output), sizes, Weights(macs=1))
        ids, path = list(range(6)), []
        while len(ids) > 1:
            a, b = sorted(generator.sample(ids, 2))
            path.append((a, b))
            ids = [k for k in ids if k not in (a, b)] + [6 + len(path) - 1]
        assert path_macs(terms, output, sizes, best) <= path_macs(terms, output, sizes, tuple(path))


@pytest.mark.parametrize(
    "optimize", ["greedy", "optimal", "dp", "auto", "branch-2", opt_einsum.RandomGreedy(max_repeats=4)]
)
def test_an_optimiser_of_opt_einsum_may_choose_the_order(optimize) -> None:
    net = tnpeft.network("G1[o1 a] G2[a o2 b] G3[b i1 c] G4[c i2] -> (o1 o2) (i1 i2)")
    sizes = {"o1": 3, "o2": 4, "i1": 4, "i2": 3, "a": 2, "b": 3, "c": 2}
    best = tnpeft.plan(net, sizes, minimize="macs")
    found = tnpeft.plan(net, sizes, minimize="macs", optimize=optimize)
    assert found.macs >= best.macs
    if optimize in ("optimal", "dp"):
        assert found.macs == best.macs
    assert tnpeft.plan(net, sizes, tokens=5, optimize=optimize).macs > 0
    assert "order by" in str(found)
    assert not found.exact


def test_a_plan_gives_its_path_to_opt_einsum() -> None:
    net = tnpeft.network("A[o a] A[a b] B[b i c] C[c] -> o i")
    sizes = {"o": 3, "a": 3, "b": 3, "i": 5, "c": 2}
    rng = np.random.default_rng(0)
    factors = {f.name: rng.standard_normal([sizes[i] for i in f.indices]) for f in net.factors}
    path = tnpeft.plan(net, sizes).path
    got = opt_einsum.contract("oa,ab,bic,c->oi", *(factors[f.name] for f in net.uses()), optimize=path)
    np.testing.assert_allclose(got, tnpeft.dense(net, factors), rtol=1e-12)
    assert len(tnpeft.plan(net, sizes, tokens=4, base=None).path) == 4
    with pytest.raises(tnpeft.NetworkError, match="a sum has no single path"):
        _ = tnpeft.plan(tnpeft.network("A[o i] + B[o i] -> o i"), o=2, i=2).path
    with pytest.raises(tnpeft.NetworkError, match="no optimiser 'nothing'"):
        tnpeft.plan(net, sizes, optimize="nothing")


def test_a_plan_for_a_model_needs_sites_of_one_shape() -> None:
    f, model = tnpeft.families.lora(4), "meta-llama/Llama-3.2-1B"
    alike = {"model": model, "targets": ["k_proj", "v_proj"]}
    by_hand = {"layer": 16, "proj": 2, "out": 512, "inp": 2048}
    assert tnpeft.plan(f, tokens=64, **alike) == tnpeft.plan(f, by_hand, tokens=64)
    assert tnpeft.plan(f.network, r=4, **alike) == tnpeft.plan(f, by_hand)
    assert tnpeft.plan_table(f, **alike) == tnpeft.plan_table(f, by_hand)
    with pytest.raises(NetworkError, match="several shapes: q_proj 2048 x 2048, k_proj 512 x 2048"):
        tnpeft.plan(f, tokens=64, model=model, targets=["q_proj", "k_proj"])
