"""Lines over experts: the index stays an axis of one array, and every question is answered for one expert."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnpeft
from tnpeft.layout import layout
from tnpeft.networks import Factorization, Network, NetworkError, Site
from tnpeft.testing.cases import small_sizes

SHARED = "B[layer proj expert out r] A[layer proj r inp] -> layer proj expert out inp"
CP = "U[layer proj out r] e[layer proj expert r] V[layer proj inp r] -> layer proj expert out inp"


@settings(max_examples=40, deadline=None)
@given(tnpeft.testing.networks(stack=("layer", "proj", "expert")), st.integers(2, 4))
def test_an_expert_is_one_value_of_a_stack_index(net: Network, experts: int) -> None:
    if not any(factor.kind == "trainable" for factor in net.factors):
        return
    sizes = small_sizes(net)
    sizes |= {"expert": experts} if "expert" in net.indices else {}
    one = net.select(*net.stack)
    assert tnpeft.rank_bound(net, sizes) == tnpeft.rank_bound(one, sizes)
    assert tnpeft.plan(net, sizes, tokens=8).macs == tnpeft.plan(one, sizes, tokens=8).macs
    assert tnpeft.dof(net, sizes) <= tnpeft.parameters(net, sizes) if len(net.terms) == 1 else True
    assert tnpeft.testing.check(net, sizes)


@pytest.mark.parametrize("line", [SHARED, CP])
def test_the_expert_axis_stays_in_one_array(line: str) -> None:
    f = Factorization.of(line, ranks={"r": 3})
    sites = [Site(layer, "experts_down", 8, 6, experts=5) for layer in range(2)]
    placed = layout(f, sites)
    assert placed.count() == tnpeft.parameters(f, layer=2, proj=1, expert=5, out=8, inp=6)
    assert len(placed.parameters) == 2 * len(f.network.factors)
    for piece in placed.parameters:
        assert piece.shape == tuple({"expert": 5, "out": 8, "inp": 6, "r": 3}[index] for index in piece.indices)
    assert placed.site_layouts[0].network.stack == ("expert",)
    assert placed.site_layouts[0].sizes["expert"] == 5


def test_a_linear_counts_as_one_expert_and_a_line_without_experts_is_shared_by_all() -> None:
    f = Factorization.of(SHARED, ranks={"r": 3})
    assert layout(f, [Site(0, "q_proj", 8, 6)]).count() == 3 * (8 + 6)
    lora = tnpeft.families.lora(rank=3)
    assert layout(lora, [Site(0, "experts_down", 8, 6, experts=5)]).count() == 3 * (8 + 6)


def test_further_stack_indices_are_sized_by_name_and_otherwise_refused() -> None:
    f = Factorization.of("B[layer scene out r] A[r inp] -> layer scene out inp", ranks={"r": 2})
    count = tnpeft.parameters(f, model="facebook/opt-125m", scene=24)
    assert count == 12 * 24 * 768 * 2 + 2 * 768
    with pytest.raises(NetworkError, match="'scene' has no meaning"):
        tnpeft.parameters(f, model="facebook/opt-125m")
    with pytest.raises(NetworkError, match="'expert' comes from the model"):
        tnpeft.parameters(Factorization.of(SHARED, ranks={"r": 2}), model="facebook/opt-125m", expert=4)
