"""What one site keeps for backward, multiplies and launches: counted, asserted, never timed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from typing import Any

import peft
import pytest
import torch
from bench import meters
from torch import Tensor, nn
from watching import Watching

import tnpeft
from tnpeft.adapters.layer.binding import SiteUpdate

WIDE, TOKENS, MANY, BYTES, REPLICAS = 1024, 64, 512, 4, 3
MATRIX = WIDE * WIDE * BYTES
FAMILIES = [
    name
    for name in tnpeft.families.names()
    if all({*line.network.stack} <= {"layer", "proj"} for line in tnpeft.families.get(name)().lines)
]  # of linears: the others have indices of experts, or such as no model has
CONSTRUCTIONS = ("att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth")
FOUNDING = [
    *("lora", "cp", "lorta", "lotr", "fact_tt", "fact_tk", "metatt_4d", "metatt_5d"),
    *(f"tenslora {construction}" for construction in CONSTRUCTIONS),
]
PEFT = {
    "lora": peft.LoraConfig(r=8, target_modules=["q_proj"]),
    "vera": peft.VeraConfig(r=256, target_modules=["q_proj"]),
    "lokr": peft.LoKrConfig(r=8, target_modules=["q_proj"]),
    "loha": peft.LoHaConfig(r=8, target_modules=["q_proj"]),
    "randlora": peft.RandLoraConfig(r=32, target_modules=["q_proj"]),
}


def linear(width: int = WIDE) -> nn.Module:
    """A model of one linear."""
    return nn.Sequential(OrderedDict(q_proj=nn.Linear(width, width)))


@lru_cache(maxsize=2)
def activations(tokens: int = TOKENS, width: int = WIDE) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).requires_grad_()


def site(f: Any, tokens: int = TOKENS, replicas: int = 1, width: int = WIDE) -> tuple[nn.Module, SiteUpdate]:
    config = tnpeft.TensorNetworkConfig(network=f, target_modules=["q_proj"], tokens=tokens, replicas=replicas)
    model = peft.get_peft_model(linear(width), config)
    return model, model.base_model.model.q_proj.updates["default"][0]


def family(name: str) -> Any:
    name, *options = name.split()
    f = tnpeft.families.get(name)(*options)
    return replace(f, init={"U": "kaiming", "V": "kaiming"}) if name == "lora_xs" else f  # no SVD of a large weight


def loss(model: nn.Module, tokens: int = TOKENS) -> Tensor:
    return model(activations(tokens)).sum()


def saved(model: nn.Module, tokens: int = TOKENS, width: int = WIDE) -> int:
    return meters.saved_bytes(model, partial(model, activations(tokens, width)))


def width(update: SiteUpdate) -> int:
    """The inner width: the elements for each token of the narrowest result on activations."""
    plan = update.program.plan
    through = [s for s in plan.steps if plan.activation in s.indices and s.kind == "contract" and s.result != "y"]
    return min(prod(plan.sizes[i] for i in step.indices if i != plan.activation) for step in through)


@pytest.mark.parametrize("tokens", [TOKENS, MANY])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_keeps_a_matrix(name: str, tokens: int) -> None:
    """Nor, beside parameters and buffers, more than the input and its half again."""
    model, _ = site(family(name), tokens)
    kept = saved(model, tokens)
    assert kept < BYTES * tokens * WIDE + MATRIX
    assert 2 * kept <= 3 * BYTES * tokens * WIDE


@pytest.mark.parametrize("name", ["lora", "cp", "tenslora", "tensor_train", "loha", "lokr", "randlora", "quanta"])
def test_replicas_keep_what_as_many_adapters_keep(name: str) -> None:
    """So no family keeps a matrix there either."""
    kept = saved(site(family(name), TOKENS, REPLICAS)[0], REPLICAS * TOKENS)
    assert kept < BYTES * REPLICAS * TOKENS * WIDE + MATRIX
    assert kept <= REPLICAS * saved(site(family(name))[0])


@pytest.mark.parametrize("tokens", [TOKENS, MANY])
@pytest.mark.parametrize("name", FOUNDING)
def test_founding_families_keep_what_a_lora_of_their_width_keeps_plus_factors(name: str, tokens: int) -> None:
    """The input, one result as wide as the bond, and the factors: no thin matrix."""
    model, update = site(family(name), tokens)
    factors = sum(piece.size for piece in update.site_layout.parameters.values())
    assert saved(model, tokens) <= BYTES * (tokens * (WIDE + width(update)) + factors)


@pytest.mark.parametrize("tokens", [TOKENS, MANY])
def test_factors_with_columns_of_length_one_are_not_kept(tokens: int) -> None:
    """As little as of the same line without: the input, and for many tokens one narrow result."""
    f = family("cp")
    model, update = site(f, tokens)
    assert update.norms
    kept = saved(model, tokens)
    assert kept == saved(site(replace(f, unit_norm=()), tokens)[0], tokens)
    assert kept <= BYTES * tokens * (WIDE + width(update))


@pytest.mark.parametrize("name", ["lora_xs", "miss"])
def test_behind_frozen_factors_a_narrow_result_is_kept_in_place_of_the_input(name: str) -> None:
    assert 2 * saved(site(family(name))[0]) <= BYTES * TOKENS * WIDE


@pytest.mark.parametrize("tokens", [TOKENS, MANY])
@pytest.mark.parametrize("name", ["lokr", "loha", "randlora"])
def test_at_most_a_tenth_of_what_peft_keeps(name: str, tokens: int) -> None:
    """At many tokens beyond the input, which is kept by both, and is a third of what PEFT keeps there."""
    common = BYTES * MANY * WIDE if tokens == MANY else 0
    theirs = saved(peft.get_peft_model(linear(), PEFT[name]), tokens) - common
    assert theirs >= MATRIX
    assert 10 * (saved(site(tnpeft.families.get(name)(), tokens)[0], tokens) - common) <= theirs


@pytest.mark.parametrize("name", ["lora", "vera"])
def test_no_more_than_peft_keeps(name: str) -> None:
    assert saved(site(tnpeft.families.get(name)())[0]) <= saved(peft.get_peft_model(linear(), PEFT[name]))


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_tenslora_keeps_a_hundredth_of_a_rebuilt_tensor(construction: str) -> None:
    """A 36-site model's tensor, 24 x 3 matrices where all are shared, is kept by no one who never forms it."""
    f, width = tnpeft.families.tenslora(construction, ranks=8), 2 * WIDE
    model, update = site(f, width=width)
    beyond_input = saved(model, width=width) - BYTES * TOKENS * width
    assert 0 < 100 * beyond_input <= BYTES * width**2
    assert update.program.plan.largest < width**2


@pytest.mark.parametrize("replicas", [1, REPLICAS])
@pytest.mark.parametrize("name", ["lora", "cp", "lorta", "tenslora", "lotr", "tensor_train", "loha", "lokr"])
def test_flops_are_the_plan_s_beside_the_linear_s(name: str, replicas: int) -> None:
    model, update = site(tnpeft.families.get(name)(), TOKENS, replicas)
    plan = update.program.plan.resized(tokens=TOKENS)
    summed = [s for s in plan.steps if s.kind == "contract" and set(s.uses[0]) & set(s.uses[1]) - set(s.indices)]
    frozen = 2 * replicas * TOKENS * WIDE * WIDE
    with meters.flop_counter() as counter:
        result = loss(model, replicas * TOKENS)
        forward = counter.get_total_flops()
        result.backward()
    assert forward == frozen + 2 * sum(step.macs for step in summed)
    again = sum(step.macs for step in summed if step.result in update.program.recomputed)
    assert counter.get_total_flops() - forward == frozen + 2 * (again + sum(step.backward_macs for step in summed))


def test_a_lora_step_launches_fewer_operations_than_peft_s() -> None:
    floor = meters.meters(bare := linear().requires_grad_(False), partial(loss, bare))
    ours = meters.meters(model := site("lora")[0], partial(loss, model))
    theirs = meters.meters(model := peft.get_peft_model(linear(), PEFT["lora"]), partial(loss, model))
    # forward two products; backward four, and B's gradient put into B's layout (two); replicas as one adapter
    assert ours.kernels - floor.kernels == 8
    many = meters.meters(model := site("lora", TOKENS, REPLICAS)[0], partial(loss, model, REPLICAS * TOKENS))
    assert many.kernels == ours.kernels
    assert ours.kernels < theirs.kernels
    assert ours.peak <= theirs.peak
    assert ours.saved <= theirs.saved


def test_a_vera_step_multiplies_full_width_twice_and_peft_s_three_times() -> None:
    """Forward the row times the output; backward the row's own gradient, but not the output's."""

    def full(model: nn.Module) -> int:
        found: list[int] = []
        with Watching(lambda name, args, result: found.append("mul" in name and result.numel() >= MANY * WIDE)):
            loss(model, MANY).backward()
        return sum(found)

    assert full(site(family("vera"), MANY)[0]) == 2
    assert full(peft.get_peft_model(linear(), PEFT["vera"])) == 3


def test_the_meter_sees_what_is_kept() -> None:
    """A square keeps its operand once; what is a parameter is left out."""
    x = torch.ones(10, requires_grad=True)
    assert meters.saved_bytes(nn.Identity(), lambda: (x * 1.0) ** 2) == 40
    layer = nn.Linear(10, 10)
    assert meters.saved_bytes(layer, lambda: layer(x[None])) == 40
