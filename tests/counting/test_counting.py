"""Counts against brute sums over stored arrays, published numbers and fresh processes; budgets against full scans."""

from __future__ import annotations

import subprocess
import sys
from math import prod

import pytest
import sympy

import tnpeft
from tnpeft.counting import budgets, layout, optimizer_megabytes, sites, stored_megabytes
from tnpeft.networks import Factorization, NetworkError, Site, SiteRule

LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
CP = "w[layer proj r] A[layer proj o1 r] B[layer proj o2 r] C[layer proj i1 r] D[layer proj i2 r] "
CP += "-> layer proj (o1 o2) (i1 i2)"
VERA = "b[layer proj out] ~B[out r] d[layer proj r] ~A[r inp] -> layer proj out inp"
LOTR = "U[out a] G[layer proj a b] V[inp b] -> layer proj out inp"
QV = ("q_proj", "v_proj")
OPT = {"layer": 24, "proj": 2, "out": 2048, "inp": 2048}
DIGITS = {"layer": 24, "proj": 2, "o1": 32, "o2": 64, "i1": 32, "i2": 64}


@pytest.mark.parametrize(
    ("line", "sizes", "value"),
    [  # published: arXiv 2606.00428 (CP, LoRA), 2310.11454 (VeRA on RoBERTa-base q and v), 2106.09685 (LoRA there)
        (LORA, {**OPT, "r": 1}, 196_608),
        (LORA, {**OPT, "r": 6}, 1_179_648),
        (CP, {**DIGITS, "r": 1}, 9_264),
        (CP, {**DIGITS, "r": 21}, 194_544),
        (CP, {**DIGITS, "layer": 1, "proj": 1, "r": 1}, 193),
        (VERA, {"layer": 12, "proj": 2, "out": 768, "inp": 768, "r": 1024}, 43_008),
        (LORA, {"layer": 12, "proj": 2, "out": 768, "inp": 768, "r": 8}, 294_912),
    ],
)
def test_published_counts(line: str, sizes: dict[str, int], value: int) -> None:
    net = tnpeft.network(line)
    assert tnpeft.parameters(net, **sizes) == value
    assert tnpeft.parameters(net, {**sizes, "unused": 3}) == value
    formula = tnpeft.parameters(net)
    assert formula.subs(sizes) == value
    assert sum(tnpeft.parameters_by_factor(net, **sizes).values()) == value


def test_symbols_are_plain_and_mix_with_numbers() -> None:
    net = tnpeft.network(LORA)
    layer, proj, out, inp, r = sympy.symbols("layer proj out inp r")
    assert sympy.expand(tnpeft.parameters(net) - layer * proj * r * (out + inp)) == 0
    assert tnpeft.parameters(net, layer=2, proj=1, out=4, inp=4) == 16 * r
    assert tnpeft.parameters(net, layer=2, proj=1, out=sympy.Symbol("n"), inp=4, r=1) == 8 + 2 * sympy.Symbol("n")
    assert tnpeft.parameters_by_factor(net, r=1)["B"] == layer * out * proj


def test_only_sizes_of_counted_factors_are_needed() -> None:
    net = tnpeft.network(VERA)
    assert tnpeft.parameters(net, layer=2, proj=1, out=8, r=3) == 22
    assert tnpeft.parameters(net, layer=2, proj=1, out=8, inp=5, r=3, frozen=True) == 22 + 24 + 15
    assert tnpeft.parameters(net, layer=2, proj=1, out=8, r=3, frozen=True).free_symbols == {sympy.Symbol("inp")}
    assert tnpeft.parameters(tnpeft.network("~A[o r] ~B[r i] -> o i")) == 0


def test_a_factor_used_twice_counts_once_and_a_frozen_twin_apart() -> None:
    assert tnpeft.parameters(tnpeft.network("A[o r] A[i r] -> o i"), o=5, i=5, r=2) == 10
    twin = tnpeft.network("G[o i] - ~G[o i] -> o i")
    assert tnpeft.parameters(twin, o=3, i=4) == 12
    assert tnpeft.parameters(twin, o=3, i=4, frozen=True) == 24


def test_parameter_step() -> None:
    assert tnpeft.parameter_step(tnpeft.network(LORA), "r", OPT) == 196_608
    assert tnpeft.parameter_step(tnpeft.network(CP), "r", layer=1, proj=1, o1=32, o2=64, i1=32, i2=64) == 193
    lotr = tnpeft.network(LOTR)
    assert tnpeft.parameter_step(lotr, "a", **OPT, b=5) == 2048 + 48 * 5
    assert tnpeft.parameter_step(lotr, "a") == sympy.sympify("out + layer*proj*b")
    f = Factorization.of(LORA, ranks={"r": 3})
    assert tnpeft.parameter_step(f, "r", model="facebook/opt-1.3b") == 196_608
    assert tnpeft.parameter_step(tnpeft.network(LORA), "r", r=7, model="opt-1.3b", targets="q_proj") == 98_304
    with pytest.raises(NetworkError, match="unknown index"):
        tnpeft.parameter_step(lotr, "z")
    with pytest.raises(NetworkError, match="follows from the rule"):
        tnpeft.parameter_step(Factorization.of(LORA, ranks={"r": "out // 2"}), "r")


def test_errors_of_sizes() -> None:
    net = tnpeft.network(LORA)
    for wrong in ({"rank": 1}, {"r": 0}, {"r": -1}, {"r": 1.5}, {"r": True}, {"r": "8"}):
        with pytest.raises(NetworkError):
            tnpeft.parameters(net, **wrong)
    with pytest.raises(NetworkError, match="without a model"):
        tnpeft.parameters(net, targets="q_proj")
    with pytest.raises(NetworkError, match=r"pass r=\.\.\."):
        tnpeft.parameters(net, model="facebook/opt-1.3b")
    with pytest.raises(NetworkError, match="'layer' comes from the model"):
        tnpeft.parameters(net, r=1, layer=3, model="facebook/opt-1.3b")
    with pytest.raises(NetworkError, match="unknown index 'q'"):
        tnpeft.parameters(net, r=1, q=3, model="facebook/opt-1.3b")


def test_a_line_on_a_model_takes_ranks_and_splits_by_name() -> None:
    net = tnpeft.network(CP)
    assert tnpeft.parameters(net, r=21, o1=32, i1=32, model="facebook/opt-1.3b", targets=[*QV]) == 194_544
    assert tnpeft.parameters(net, {"r": 21, "layer": 99}, model="facebook/opt-1.3b") == 194_544
    f = tnpeft.families.cp(rank=21, out=(32, 64), inp=(32, 64))
    assert tnpeft.parameters(f, model="facebook/opt-1.3b", targets=["q_proj", "v_proj"]) == 194_544
    assert tnpeft.parameters(f, model="facebook/opt-1.3b", r=1) == 9_264


def test_grouped_queries_make_ragged_groups() -> None:
    net = tnpeft.network(LORA)
    q, v = 16 * 8 * (2048 + 2048), 16 * 8 * (512 + 2048)
    assert tnpeft.parameters(net, r=8, model="meta-llama/Llama-3.2-1B", targets="q_proj,v_proj") == q + v
    shared = tnpeft.network(LOTR)  # U once for each number of rows, V once for all, G at every site
    count = (2048 + 512) * 4 + 32 * 4 * 5 + 2048 * 5
    assert tnpeft.parameters(shared, a=4, b=5, model="meta-llama/Llama-3.2-1B") == count


@pytest.mark.parametrize("index", ["task", "replica"])
def test_other_stack_indices_on_a_model_need_a_size(index: str) -> None:
    net = tnpeft.network(f"B[{index} layer proj out r] A[layer proj r inp] -> {index} layer proj out inp")
    assert tnpeft.parameters(net, r=1, model="opt-125m", targets="q_proj", **{index: 3}) == 12 * (3 * 768 + 768)
    with pytest.raises(NetworkError, match=f"no size for '{index}'"):
        tnpeft.parameters(net, r=1, model="opt-125m")


@pytest.mark.parametrize("name", [n for n in tnpeft.families.names() if n not in ("lotra", "tuka")])
@pytest.mark.parametrize("model", ["facebook/opt-125m", "meta-llama/Llama-3.2-1B"])
def test_every_family_counts_what_its_layout_stores(name: str, model: str) -> None:
    f = tnpeft.families.get(name)()
    targets = "fc1,fc2" if name == "kradapter" and model.startswith("facebook") else QV
    pieces = layout(f, sites(model, targets)).parameters
    by_kind = {k: sum(prod(p.shape) for p in pieces if p.kind == k) for k in ("trainable", "frozen", "constant")}
    assert tnpeft.parameters(f, model=model, targets=targets) == by_kind["trainable"]
    assert tnpeft.parameters(f, model=model, targets=targets, frozen=True) == by_kind["trainable"] + by_kind["frozen"]
    assert len({(p.home, p.key) for p in pieces}) == len(pieces)


@pytest.mark.parametrize("name", ["lora", "cp", "lotr", "vera", "tucker", "tensor_train", "lorta", "refta"])
def test_where_all_sites_have_one_shape_the_line_alone_counts_the_same(name: str) -> None:
    f = tnpeft.families.get(name)()
    assert len(f.lines) == 1
    alone = tnpeft.parameters(f, **OPT, heads=32)
    assert tnpeft.parameters(f, model="facebook/opt-1.3b", targets=QV) == alone
    assert isinstance(alone, int)


def test_layout_tells_shared_pieces_of_several_shapes_apart() -> None:
    f = Factorization.of(LOTR, ranks={"a": 2, "b": 3})
    its = layout(f, [Site(0, "q", 8, 8), Site(0, "v", 4, 8), Site(1, "q", 8, 8), Site(1, "v", 4, 8)])
    assert {p.key for p in its.parameters if p.label == "U"} == {"U#8x2", "U#4x2"}
    assert its.by_factor() == {"U": 24, "G": 24, "V": 24}


def test_what_two_lines_share_is_one_piece_whatever_they_call_its_indices() -> None:
    line = tnpeft.network("B[layer proj out r] A[r inp] -> layer proj out inp")
    lines = (SiteRule(line, "q"), SiteRule(line.rename(r="s"), "v"))
    two = [Site(0, "q", 4, 6), Site(0, "v", 4, 6)]
    counts = [layout(Factorization("both", lines, {"r": 2, "s": s}), two).by_factor() for s in (2, 1)]
    assert counts == [{"B": 16, "A": 12}, {"B": 12, "A": 18}]


def test_megabytes_are_mebibytes() -> None:
    assert stored_megabytes(196_608, bytes_each=2) == 0.375
    assert optimizer_megabytes(196_608) == 1.5
    assert optimizer_megabytes(9_264) == pytest.approx(0.0707, abs=1e-4)


# ---- budgets


def test_budget_of_the_founding_question() -> None:
    rows = tnpeft.budget(["lora", "cp", "tucker"], parameters=196_608, model="facebook/opt-1.3b", targets=[*QV])
    lora, cp, tucker = rows
    assert (lora.family, lora.nearest.ranks, lora.nearest.count) == ("lora", {"r": 1}, 196_608)
    assert (cp.nearest.ranks, cp.nearest.count) == ({"r": 21}, 194_544)
    assert cp.below == cp.nearest
    assert [rung.count for rung in cp.ladder] == [9_264 * k for k in range(1, 23)]
    assert tucker.below is None
    assert tucker.nearest.count == 48 * (1 + 2 * 2048)
    for text in ("lora", "194,544 (r=21)", "none", "budget 196,608"):
        assert text in str(rows)
    assert len(rows) == 3
    assert rows[1] is cp


def test_budget_may_be_another_adapters_count() -> None:
    lora = tnpeft.families.lora(rank=8)
    row = tnpeft.budget("cp", parameters=lora, model="facebook/opt-1.3b")[0]
    assert (row.nearest.ranks, row.nearest.count - 1_572_864) == ({"r": 170}, 2_016)
    assert row.below is not None
    assert row.below.ranks == {"r": 169}


@pytest.mark.parametrize("name", ["lora", "cp", "lotr", "tucker", "tensor_train", "tensor_ring", "metatt_4d", "lokr"])
@pytest.mark.parametrize("goal", [50, 1_000, 7_000, 20_000])
def test_budget_equals_a_scan_of_all_common_ranks(name: str, goal: int) -> None:
    sizes = {"layer": 3, "proj": 2, "out": 24, "inp": 16, "heads": 4}
    f = tnpeft.families.get(name)()
    row = tnpeft.budget(f, sizes, parameters=goal)[0]
    top = {rank: tnpeft.budget(f, sizes, parameters=10**15)[0].nearest.ranks[rank] for rank in row.nearest.ranks}
    counts = sorted(
        tnpeft.parameters(f.with_ranks(**{rank: min(k, cap) for rank, cap in top.items()}), sizes)
        for k in range(1, max(top.values()) + 1)
    )
    assert row.nearest.count == min(counts, key=lambda count: (abs(count - goal), count))
    within = [count for count in counts if count <= goal]
    assert (row.below.count if row.below else None) == (within[-1] if within else None)
    assert [rung.count for rung in row.ladder] == sorted(set(counts))[: len(row.ladder)]


def test_ranks_stay_within_their_cuts_and_small_modes_come_to_full_size() -> None:
    sizes = {"layer": 3, "proj": 2, "out": 24, "inp": 16}
    row = tnpeft.budget(tnpeft.families.tenslora(), sizes, parameters=10**9)[0]
    assert row.nearest.ranks == {"a": 16, "b": 24, "c": 2, "d": 3}
    train = tnpeft.budget(tnpeft.families.tensor_train(out=(4, 6), inp=(4, 4)), sizes, parameters=10**9)[0]
    assert train.nearest.ranks == {"a": 4, "b": 16, "c": 4}


def test_a_line_is_a_family_with_every_rank_free() -> None:
    sizes = {"layer": 3, "proj": 2, "out": 64, "inp": 48}
    net = tnpeft.families.lotr().network
    by_name, by_text, by_network = tnpeft.budget(["lotr", str(net), net], sizes, parameters=2_000)
    assert by_text == by_network
    assert (by_text.family, by_text.nearest, by_text.ladder) == (str(net), by_name.nearest, by_name.ladder)


def test_ratios_and_errors() -> None:
    sizes = {"layer": 3, "proj": 2, "out": 64, "inp": 64}
    row = tnpeft.budget("lotr", sizes, parameters=2_000, ratios={"a": 2})[0]
    assert row.nearest.ranks["a"] == 2 * row.nearest.ranks["b"]
    with pytest.raises(NetworkError, match="no family has the rank 'z'"):
        tnpeft.budget("lotr", sizes, parameters=2_000, ratios={"z": 2})
    for ratio in (0, -1, float("nan"), float("inf"), "2"):
        with pytest.raises(NetworkError, match="the ratio of 'a' is"):
            tnpeft.budget("lotr", sizes, parameters=2_000, ratios={"a": ratio})  # type: ignore[dict-item]
    with pytest.raises(NetworkError, match="no size for 'layer', 'proj'"):
        tnpeft.budget("lora", parameters=2_000, out=8, inp=8)
    for bad in (0, -5, 1.5, "many"):
        with pytest.raises(NetworkError, match="whole number"):
            tnpeft.budget("lora", sizes, parameters=bad)
    with pytest.raises(NetworkError, match="did you mean"):
        tnpeft.budget("lorra", sizes, parameters=10)


def test_no_site_is_an_error() -> None:
    with pytest.raises(NetworkError, match="no site is selected"):
        layout(tnpeft.families.lora(1), [])


@pytest.mark.parametrize("index", ["task", "replica", "scene"])
def test_sizes_of_other_stack_indices_count_in_a_budget_on_a_model(index: str) -> None:
    net = tnpeft.network(f"B[{index} layer proj out r] A[layer proj r inp] -> {index} layer proj out inp")
    row = tnpeft.budget(net, model="opt-125m", targets="q_proj", parameters=100_000, **{index: 3})[0]
    assert (row.nearest.ranks, row.nearest.count) == ({"r": 3}, 12 * 3 * (3 * 768 + 768))


@pytest.mark.parametrize("top", [1, 2, 3, 13, 16, 100])
def test_the_search_meets_powers_of_two_and_both_sides_of_the_crossing(top: int) -> None:
    for goal in range(top + 1):
        seen: list[int] = []
        budgets._search(lambda step: seen.append(step) or step <= goal, top)  # type: ignore[func-returns-value]  # noqa: B023
        assert {*(1 << k for k in range(top.bit_length())), top} <= {*seen} <= {*range(1, top + 1)}
        assert {*range(max(goal, 1), min(goal + 1, top) + 1)} <= {*seen}


def test_a_held_bond_leaves_the_rest_of_the_cut_to_its_neighbour() -> None:
    net = tnpeft.network("B[out a b] A[a b inp] -> out inp")
    row = tnpeft.budget(net, out=16, inp=16, b=2, parameters=10**9)[0]
    assert row.nearest.ranks == {"a": 8}


# ---- fresh processes


def test_counting_every_family_needs_neither_torch_nor_sympy_and_takes_under_a_second() -> None:
    code = """
import sys, time
start = time.process_time()
import tnpeft
for name in tnpeft.families.names():
    if name not in ("lotra", "tuka"):
        tnpeft.parameters(tnpeft.families.get(name)(), model="facebook/opt-1.3b", targets=["q_proj", "v_proj"])
tnpeft.budget(["lora", "cp"], parameters=196608, model="facebook/opt-1.3b")
seconds = time.process_time() - start
net = tnpeft.network("B[out r] A[r inp] -> out inp")
tnpeft.rank_bound(net, out=8, inp=8, r=2), tnpeft.dof(net, out=8, inp=8, r=2)
print(seconds, *({"torch", "sympy", "networkx", "transformers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 1
