"""Rank bounds and degrees of freedom against numeric ranks at random points."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from decimal import Decimal, localcontext
from itertools import pairwise
from itertools import product as choices
from math import prod

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from oracles import open_axes

import tnpeft
from tnpeft.counting import RankWarning, clipped_ranks, cuts, dof, rank_bound, site_shapes, unfolding_bounds
from tnpeft.counting.cuts import absorbing, term_legs
from tnpeft.counting.dof import _clip
from tnpeft.counting.min_cut import Edge, _logarithm, min_cut
from tnpeft.models.cards import Card, Projection
from tnpeft.networks import Network, NetworkError

# name, line, sizes, rank of one site's matrix
TABLE = """
lora | B[o r] A[r i] -> o i | o=7 i=6 r=2 | 2
lora per layer | B[layer o r] A[layer r i] -> layer o i | layer=3 o=5 i=6 r=2 | 2
svd | B[o r] d[r] A[r i] -> o i | o=5 i=6 r=3 | 3
cp | A[o1 r] B[o2 r] C[i1 r] D[i2 r] -> (o1 o2) (i1 i2) | o1=3 o2=4 i1=2 i2=5 r=2 | 2
cp with weights | w[r] A[o1 r] B[o2 r] C[i1 r] D[i2 r] -> (o1 o2) (i1 i2) | o1=3 o2=4 i1=2 i2=5 r=3 | 3
cp of sites | w[layer r] A[layer o1 r] B[layer o2 r] C[layer i r] -> layer (o1 o2) i | layer=2 o1=3 o2=3 i=4 r=2 | 2
cp over layers | A[o r] B[i r] L[layer r] -> layer o i | o=5 i=4 layer=3 r=3 | 3
lorta | A[o r] B[d r] H[h r] L[layer r] -> layer o (h d) | o=6 d=3 h=2 layer=3 r=2 | 2
tucker | G[a b c] U[o a] V[i b] W[layer c] -> layer o i | o=5 i=4 layer=4 a=2 b=3 c=3 | 2
lotr | U[o a] G[layer a b] V[i b] -> layer o i | o=6 i=5 layer=3 a=3 b=2 | 2
train | G1[o1 a] G2[a o2 b] G3[b i1 c] G4[c i2] -> (o1 o2) (i1 i2) | o1=3 o2=4 i1=4 i2=3 a=2 b=3 c=2 | 3
train, interleaved | G1[o1 a] G2[a i1 b] G3[b o2 c] G4[c i2] -> (o1 o2) (i1 i2) | o1=3 o2=4 i1=4 i2=3 a=2 b=3 c=2 | 8
train per layer | G1[layer o1 a] G2[layer a o2 b] G3[layer b i] -> layer (o1 o2) i | layer=2 o1=3 o2=3 i=4 a=2 b=3 | 3
ring | X[o1 a b] Y[o2 b c] Z[i c a] -> (o1 o2) i | o1=5 o2=5 i=5 a=2 b=2 c=2 | 4
tree | R[a b] U[a o1 c] X[c o2] V[b i1 d] Y[d i2] -> (o1 o2) (i1 i2) | a=3 b=3 c=2 d=2 o1=3 o2=4 i1=3 i2=4 | 3
loha | B1[o r] A1[r i] B2[o s] A2[s i] -> o i | o=11 i=10 r=2 s=3 | 6
kronecker | A[o1 i1] B[o2 i2] -> (o1 o2) (i1 i2) | o1=2 i1=3 o2=3 i2=2 | 4
kronecker sum | A[r o1 i1] B[r o2 i2] -> (o1 o2) (i1 i2) | r=2 o1=3 i1=3 o2=3 i2=2 | 6
lokr | C[o1 i1] B[o2 r] A[r i2] -> (o1 o2) (i1 i2) | o1=2 i1=2 o2=4 i2=5 r=2 | 4
monarch | L[k o1 a] R[a k i1] -> (k o1) (a i1) | k=3 o1=4 a=2 i1=3 | 6
vera | b[layer o] ~B[o r] d[layer r] ~A[r i] -> layer o i | layer=3 o=6 i=5 r=4 | 4
lora-fa | B[layer o r] ~A[r i] -> layer o i | layer=2 o=4 i=5 r=2 | 2
lora-xs | ~U[o a] R[layer a b] ~V[b i] -> layer o i | layer=2 o=5 i=6 a=2 b=3 | 2
refta | A[proj o a] ^u[layer a] B[proj a i] -> layer proj o i | layer=4 proj=2 o=4 i=5 a=2 | 2
diagonal of a constant | d[layer o] ^W[o i] -> layer o i | layer=2 o=4 i=5 | 4
"""
ROWS = (row.split(" | ") for row in TABLE.strip().split("\n"))
CASES = {name: (line, sizes, int(rank)) for name, line, sizes, rank in ROWS}


def sized(text: str) -> dict[str, int]:
    return {index: int(size) for index, size in (word.split("=") for word in text.split())}


def case(name: str) -> tuple[Network, dict[str, int], int]:
    line, text, rank = CASES[name]
    return tnpeft.network(line), sized(text), rank


def matrix(net: Network, sizes: dict[str, int]) -> np.ndarray:
    """One site's matrix at random factors."""
    stack = open_axes(net, arrays(net, sizes))
    rows, cols = (prod(sizes[i] for i in side) for side in (net.rows, net.cols))
    return stack.reshape(-1, rows, cols)[0]


def arrays(net: Network, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {net.label(f): rng.standard_normal([sizes[i] for i in f.indices]) for f in net.factors}


def jacobian_rank(net: Network, sizes: dict[str, int]) -> int:
    """Rank of the derivative of the dense stack in the trainable factors, at a random point, in float64.

    Each untied factor enters linearly, so a column is the stack with that factor replaced by a unit array.
    """
    found = arrays(net, sizes)
    columns = []
    for factor in net.factors:
        if factor.kind != "trainable":
            continue
        label = net.label(factor)
        terms = tuple(t for t in net.terms if any(net.label(f) == label for f in t.factors))
        for entry in np.ndindex(found[label].shape):
            unit = np.zeros(found[label].shape)
            unit[entry] = 1
            columns.append(open_axes(net, {**found, label: unit}, terms).ravel())
    return int(np.linalg.matrix_rank(np.array(columns)))


@pytest.mark.parametrize("name", CASES)
def test_rank_bound_and_dof_are_met_by_random_factors(name: str) -> None:
    net, sizes, rank = case(name)
    assert rank_bound(net, sizes) == rank == np.linalg.matrix_rank(matrix(net, sizes))
    assert clipped_ranks(net, sizes) == {}
    assert dof(net, sizes) == jacobian_rank(net, sizes)


@pytest.mark.parametrize("name", CASES)
def test_symbolic_dof_agrees_with_the_integer_one(name: str) -> None:
    net, sizes, _ = case(name)
    formula = dof(net, {i: sympy.Symbol(i) for i in net.indices})
    value = int(formula.subs(sizes))
    assert min(value, prod(sizes[i] for i in net.outer)) == dof(net, sizes)


@pytest.mark.parametrize("name", CASES)
def test_unfoldings_stay_under_their_bounds(name: str) -> None:
    net, sizes, _ = case(name)
    stack = open_axes(net, arrays(net, sizes))
    for group, bound in unfolding_bounds(net, sizes).items():
        axes = [net.outer.index(i) for i in group.split()]
        unfolded = np.moveaxis(stack, axes, range(len(axes))).reshape(prod(stack.shape[a] for a in axes), -1)
        assert np.linalg.matrix_rank(unfolded) == bound


OVERSIZED = {
    "lora": ("B[o r] A[r i] -> o i", "o=7 i=4 r=6", {"r": 4}),
    "shared over layers": (
        "U[o a] G[layer a b] V[i b] -> layer o i",
        "o=9 i=3 layer=2 a=8 b=3",
        {"a": 6},
    ),
    "train": (
        "G1[o1 a] G2[a o2 b] G3[b i] -> (o1 o2) i",
        "o1=2 o2=3 i=4 a=3 b=5",
        {"a": 2, "b": 4},
    ),
    "parallel bonds": ("A[o a b] B[a b i] -> o i", "o=3 i=5 a=2 b=2", {"a b": 3}),
    "per layer": ("B[layer o r] A[layer r i] -> layer o i", "layer=3 o=3 i=4 r=5", {"r": 3}),
    "tucker": (
        "G[a b c] U[o1 a] V[o2 b] W[i c] -> (o1 o2) i",
        "o1=4 o2=4 i=5 a=2 b=2 c=5",
        {"c": 4},
    ),
    "svd": ("B[o r] d[r] A[r i] -> o i", "o=3 i=4 r=6", {"r": 3}),
    "absorbed": ("A[r s] B[r s o i] -> o i", "r=2 s=2 o=3 i=4", {"r s": 1}),
}


@pytest.mark.parametrize("name", OVERSIZED)
def test_a_rank_above_its_cut_is_a_warning_and_dof_clips_it(name: str) -> None:
    line, text, expected = OVERSIZED[name]
    sizes = sized(text)
    net = tnpeft.network(line)
    assert clipped_ranks(net, sizes) == expected
    with pytest.warns(RankWarning):
        bound = rank_bound(net, sizes)
    assert bound >= np.linalg.matrix_rank(matrix(net, sizes))
    with pytest.warns(RankWarning):
        assert dof(net, sizes) == jacobian_rank(net, sizes)


def test_a_wide_frozen_basis_is_no_warning() -> None:
    net = tnpeft.network("b[o] ~B[o r] d[r] ~A[r i] -> o i")
    sizes = {"o": 4, "i": 5, "r": 12}
    assert clipped_ranks(net, sizes) == {}
    assert rank_bound(net, sizes) == 4
    assert cuts(net, sizes)["r"] == 20


def test_a_sum_is_bounded_by_its_terms() -> None:
    net = tnpeft.network("B[o r] A[r i] + D[o s] C[s i] - ~D[o s] ~C[s i] -> o i")
    sizes = {"o": 9, "i": 8, "r": 2, "s": 3}
    assert rank_bound(net, sizes) == 8
    assert dof(net, sizes) == 2 * 17 - 4 + 3 * 17 - 9
    assert dof(net, sizes) >= jacobian_rank(net, sizes)
    small = {"o": 3, "i": 3, "r": 2, "s": 2}
    assert rank_bound(net, small) == 3
    assert dof(net, small) == 9


def test_terms_without_a_stack_index_are_broadcast() -> None:
    net = tnpeft.network("B[o r] A[r i] + D[layer o s] C[layer s i] -> layer o i")
    sizes = {"layer": 4, "o": 6, "i": 5, "r": 1, "s": 2}
    assert rank_bound(net, sizes) == 3 == np.linalg.matrix_rank(matrix(net, sizes))
    assert unfolding_bounds(net, sizes) == {"layer": 4, "o": 6, "i": 5}
    assert dof(net, sizes) == jacobian_rank(net, sizes) == 10 + 4 * (22 - 4)


CAPPED = {
    "blocks fill a matrix of low rank": ("G[k a b] U[k o a] V[k b i] -> o i", "k=2 a=2 b=2 o=9 i=8"),
    "per layer": ("G[layer k a b] U[layer k o a] V[k b i] -> layer o i", "layer=2 k=2 a=1 b=2 o=6 i=7"),
    "a part at its dense size": ("A[o1 a b] B[i1 b a] ^E[o2 i2] -> (o1 o2) (i1 i2)", "o1=2 o2=3 i1=2 i2=3 a=3 b=3"),
    "two parts, one of low rank": (
        "G[k a b] U[k o1 a] V[k b i1] C[o2 r] D[r i2] -> (o1 o2) (i1 i2)",
        "k=2 a=2 b=2 o1=6 i1=5 o2=2 i2=3 r=1",
    ),
    "two parts": ("A[o1 a b] B[i1 b a] C[o2 r] D[r i2] -> (o1 o2) (i1 i2)", "o1=2 o2=3 i1=2 i2=4 a=3 b=2 r=2"),
}


@pytest.mark.filterwarnings("ignore::tnpeft.counting.RankWarning")
@pytest.mark.parametrize("name", CAPPED)
def test_dof_is_capped_part_by_part(name: str) -> None:
    line, text = CAPPED[name]
    net, sizes = tnpeft.network(line), sized(text)
    assert dof(net, sizes) == jacobian_rank(net, sizes)


def test_bonds_are_clipped_until_none_exceeds_its_cut() -> None:
    """The hyper-index comes first, and what it can tell apart shrinks with the bonds that come after it."""
    net = tnpeft.network("U[k o] V[k b] W[k c] X[b i1] Y[c i2] -> o (i1 i2)")
    sizes = sized("k=9 b=5 c=5 o=6 i1=2 i2=2")
    legs = _clip(term_legs(net.terms[0], sizes, dict.fromkeys(net.outer, "outer")), absorbing(net, net.terms[0]))
    assert {leg.names: leg.size for leg in legs if not leg.side} == {("k",): 4, ("b",): 2, ("c",): 2}


@given(size=st.integers(2, 10**30), digits=st.integers(1, 60))
def test_logarithms_are_whole_to_the_last_digit(size: int, digits: int) -> None:
    with localcontext() as context:
        context.prec = 120
        assert abs(Decimal(size).ln().scaleb(digits) - _logarithm(size, digits)) <= 1


def test_dof_of_tied_factors_is_refused() -> None:
    net = tnpeft.network("A[o r] A[i r] -> o i")
    assert rank_bound(net, o=5, i=5, r=2) == 2
    with pytest.raises(NetworkError, match="jacobian_rank"):
        dof(net, o=5, i=5, r=2)


def test_sizes_that_are_missing_or_symbols() -> None:
    net = tnpeft.network("B[layer o r] A[layer r i] -> layer o i")
    assert rank_bound(net, o=5, i=5, r=2) == 2
    with pytest.raises(NetworkError, match="no size for 'i'"):
        rank_bound(net, o=5, r=2)
    with pytest.raises(NetworkError, match="is the symbol r"):
        rank_bound(net, o=5, i=5, r=sympy.Symbol("r"))
    with pytest.raises(NetworkError, match="no size for 'layer'"):
        dof(net, o=5, i=5, r=2)
    formula = dof(net, o=5, i=5, layer=2, r=sympy.Symbol("r"))
    assert formula.subs("r", 2) == dof(net, o=5, i=5, layer=2, r=2)


def brute_cut(net: Network, sizes: dict[str, int]) -> int:
    """The smallest product over all ways to put each factor on the side of the rows or of the columns."""
    best = None
    for term in net.terms:
        for sides in choices((0, 1), repeat=len(term.factors)):
            cut = [
                size
                for index, size in sizes.items()
                if len(
                    {side for side, f in zip(sides, term.factors, strict=True) if index in f.indices}
                    | ({0} if index in net.rows else set())
                    | ({1} if index in net.cols else set())
                )
                > 1
            ]
            best = prod(cut) if best is None else min(best, prod(cut))
    assert best is not None
    return best


def test_cuts_of_random_graphs_equal_an_exhaustive_search() -> None:
    rng = np.random.default_rng(5)
    for _ in range(150):
        factors = int(rng.integers(2, 6))
        indices = [f"x{k}" for k in range(int(rng.integers(3, 9)))]
        holders = {i: rng.choice(factors, size=min(factors, int(rng.integers(2, 4))), replace=False) for i in indices}
        rows, cols = ["y0", "y1"], ["z0", "z1"]
        holders |= {i: rng.choice(factors, size=int(rng.integers(1, 3)), replace=False) for i in rows + cols}
        names = [[i for i, held in holders.items() if f in held] for f in range(factors)]
        line = " ".join(f"F{f}[{' '.join(its)}]" for f, its in enumerate(names) if its)
        net = tnpeft.network(f"{line} -> ({' '.join(rows)}) ({' '.join(cols)})")
        sizes = {i: int(rng.integers(1, 8)) for i in net.indices}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RankWarning)
            assert rank_bound(net, sizes) == brute_cut(net, sizes)


def test_cuts_are_exact_where_floats_cannot_tell() -> None:
    close = (2**61 - 1, 2**61 + 1)  # their logarithms are equal as floats
    for first, second in (close, close[::-1]):
        net = tnpeft.network("A[o a] B[a b] C[b i] -> o i")
        sizes = {"o": 2**70, "i": 2**70, "a": first, "b": second}
        sides = {"o": "left", "i": "right"}
        legs = term_legs(net.terms[0], sizes, sides)
        assert min_cut([leg.edge for leg in legs], {"left"}, {"right"}).size == 2**61 - 1


# Families whose closed form is an upper bound only: small modes in a ring, loops of bonds.
UPPER = {"loretta", "tensor_ring"}


@pytest.mark.parametrize("name", tnpeft.families.names())
def test_bounds_are_tight_for_every_family_at_generic_factors(name: str) -> None:
    f = tnpeft.families.get(name)()
    f = f.with_ranks(**{rank: 2 for rank, size in f.ranks.items() if isinstance(size, int)})
    net = f.network
    stack = {"layer": 2, "proj": 1, "basis": 2, "expert": 2, "scene": 2, "env": 2}
    sizes = f.sizes({**stack, "out": 8, "inp": 8, "heads": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        assert rank_bound(net, sizes) == np.linalg.matrix_rank(matrix(net, sizes))
        if name in ("pera", "tensor_guide"):  # factors that are used twice
            with pytest.raises(NetworkError, match="jacobian_rank"):
                dof(net, sizes)
        else:
            freedom, rank = dof(net, sizes), jacobian_rank(net, sizes)
            assert freedom >= rank if name in UPPER else freedom == rank


def chain(factors: int) -> Network:
    ends = ["out", *(f"r{k}" for k in range(1, factors)), "inp"]
    parts = (f"G{k}[{a} {b}]" for k, (a, b) in enumerate(pairwise(ends)))
    return tnpeft.network(f"{' '.join(parts)} -> out inp")


@pytest.mark.filterwarnings("ignore::tnpeft.counting.RankWarning")
@pytest.mark.parametrize("rank", [8, 100, 10**24])
def test_long_chains_are_answered_in_seconds(rank: int) -> None:
    """A chain carries its smallest bond; products that Python cannot print (4,300 digits) work."""
    net = chain(400)
    sizes = {index: 64 if index in ("out", "inp") else rank for index in net.indices}
    kept = min(rank, 64)
    started = time.process_time()
    assert rank_bound(net, sizes) == kept
    assert dof(net, sizes) == min(kept * (128 - kept), 64 * 64)
    assert tnpeft.budget(net, parameters=30_000, out=64, inp=64)[0].nearest.count > 20_000
    assert time.process_time() - started < 30


def test_cuts_below_a_limit_are_those_without_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        nodes = int(rng.integers(2, 7))
        edges = [
            Edge(
                frozenset(rng.choice(nodes, int(rng.integers(1, min(nodes, 3) + 1)), replace=False).tolist()),
                int(size),
            )
            for size in rng.integers(1, 9, int(rng.integers(1, 10)))
        ]
        sides = [{0, *(k for k in range(2, nodes) if mask >> k & 1)} for mask in range(0, 2**nodes, 4)]
        sizes = [prod(e.size for e in edges if e.nodes & side and e.nodes - side) for side in sides]
        found = min_cut(edges, {0}, {1})
        assert found.size == min(sizes)
        assert prod(e.size for e in edges if e.nodes & found.side and e.nodes - found.side) == found.size
        assert 1 not in found.side
        for limit in (1, 3, 10):
            assert min_cut(edges, {0}, {1}, limit=limit).size == min(found.size, limit)


# ---- over the sites of a model

GROUPED = {"model": "meta-llama/Llama-3.2-1B", "targets": ["q_proj", "k_proj", "v_proj", "down_proj"]}


def test_a_model_is_asked_as_its_sites_are() -> None:
    f = tnpeft.families.lora(4)
    shapes = site_shapes(f, **GROUPED)
    assert [(s.sizes["layer"], s.sizes["proj"]) for s in shapes] == [(16, 1), (16, 2), (16, 1)]
    assert rank_bound(f, **GROUPED) == 4 == max(rank_bound(s.network, s.sizes) for s in shapes)
    assert dof(f, **GROUPED) == 16 * 4 * (4092 + 2 * (2560 - 4) + 2048 + 8192 - 4)
    assert rank_bound(tnpeft.families.lora(4).network, r=7, **GROUPED) == 7
    with pytest.raises(NetworkError, match="no rank for the bond 'r'"):
        dof(f.network, **GROUPED)
    with pytest.raises(NetworkError, match="comes from the model"):
        dof(f, out=5, **GROUPED)
    for question in (rank_bound, dof, tnpeft.plan, tnpeft.plan_table):
        with pytest.raises(NetworkError, match="without a model"):
            question(f, targets=["q_proj"], layer=1, proj=1, out=4, inp=4)


def test_factors_that_sites_of_several_shapes_share_are_bounded_by_the_parameters() -> None:
    f = tnpeft.families.lorta(8)
    targets = ["q_proj", "k_proj"]
    shared = dof(f, model=GROUPED["model"], targets=targets)
    assert shared <= tnpeft.parameters(f, model=GROUPED["model"], targets=targets)
    assert shared >= dof(f, model=GROUPED["model"], targets=["q_proj"])


def test_sites_that_are_not_a_grid_count_once_each() -> None:
    """A projection that some layers lack stands with the layers that have it."""
    up = Projection("up_proj", "up", "mlp.up_proj", 6, 4)
    some = replace(up, name="gate_proj", role="gate", path="mlp.gate_proj", layers="sparse")
    card = Card("ragged", 3, {}, "layers", (up, some), ("up",), "0", dense=(0,))
    assert dof(tnpeft.families.lora(2), model=card, targets="mlp") == 5 * 2 * (6 + 4 - 2)
