"""Linears that read one input take their first steps together, and nothing but the work shows it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from adapter_models import MODELS, NETWORKS, adapted, config, inputs, opt, shake
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watching import Watching

import tnpeft
from tnpeft.adapters.layer import shared_input

QKV = ["q_proj", "k_proj", "v_proj"]
TARGETS = {
    "opt": [*QKV, "fc1"],
    "llama": [*QKV, "gate_proj", "up_proj"],
    "bert": ["query", "key", "value"],
    "vit": [*QKV, "fc2"],
}
KEYS = sorted(NETWORKS)


def model(key: str = "lora", name: str = "opt", base: nn.Module | None = None, **changes: Any) -> Any:
    few = {"tokens": 12, **changes}  # for which no update of so small a linear is best added to its weight
    net = adapted(key, base or MODELS[name](), target_modules=TARGETS[name], **few).double().train()
    shake(net)
    return net


def linears(net: Any) -> list[Any]:
    return [module for module in net.modules() if hasattr(module, "input_groups")]


def group(net: Any) -> list[Any]:
    """The q, k and v of the first layer."""
    attention = net.base_model.model.model.decoder.layers[0].self_attn
    return [getattr(attention, name) for name in QKV]


def apart(net: Any) -> Any:
    """A copy whose linears know of no other."""
    copied = copy.deepcopy(net)
    for linear in linears(copied):
        linear.input_groups.clear()
    return copied


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many linears something was begun, each time."""
    found: list[int] = []
    original = shared_input.project

    def start(prefixes: Any, *args: Any) -> Any:
        found.append(len(prefixes))
        return original(prefixes, *args)

    monkeypatch.setattr(shared_input, "project", start)
    return found


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_input, "MIN_ELEMENTS", 0)


def gradients(net: Any, name: str = "opt") -> dict[str, Tensor]:
    net.zero_grad()
    torch.manual_seed(0)  # a backbone may have dropout
    given = inputs(name)
    out = net(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()})
    out.logits.sin().sum().backward()
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def trained(net: Any) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters() if p.requires_grad]


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def compare(net: Any, act: Callable[..., Any], wanted: Callable[..., Any] | None = None, leaf: bool = False) -> None:
    """What a function makes of q, k and v, and all gradients, are those of three that know of no other."""
    found = []
    for one, its in ((net, act), (apart(net), wanted or act)):
        x = x_of(leaf)
        x.retain_grad()
        found.append([its(group(one), x), x.grad, *trained(one)])
    same(*found)


def x_of(leaf: bool = False) -> Tensor:
    x = torch.linspace(-1, 1, 2 * 5 * 32, dtype=torch.float64).reshape(2, 5, 32).requires_grad_()
    return x if leaf else x * 1.0


# ---- what is shared


def test_which_linears_share() -> None:
    expected = {"opt": [3, 3], "llama": [3, 2, 3, 2], "bert": [3, 3], "vit": [3, 3]}
    for name, sizes in expected.items():
        net = model(name=name)
        groups = dict.fromkeys(linear.input_groups["default"] for linear in linears(net) if linear.input_groups)
        assert [len(one.linears) for one in groups] == sizes
    assert not any(linear.input_groups for linear in linears(adapted(target_modules=["q_proj", "out_proj", "fc1"])))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("key", KEYS)
def test_a_step_is_that_of_each_alone(key: str, name: str, begun: list[int]) -> None:
    net, calls = model(key, name), begun
    wanted = gradients(apart(net), name)
    assert not calls
    same(gradients(net, name), wanted)
    assert calls == {"opt": [3, 3], "llama": [3, 2, 3, 2], "bert": [3, 3], "vit": [3, 3]}[name]
    assert all(p.requires_grad is (n in wanted) for n, p in net.named_parameters() if "tnpeft" in n)


@pytest.mark.parametrize(("key", "narrow"), [("lora", 9), ("vera", 4), ("cp", 15)])
def test_one_narrow_product_in_each_group(key: str, narrow: int) -> None:
    """Of the matrices of all three, or of the one that all three have; apart, of each one's own."""
    x = torch.ones(40, 32, dtype=torch.float64).requires_grad_()
    found: list[int] = []

    def note(name: str, args: Any, result: Tensor) -> None:
        if name == "mm" and args[0].shape[1] == 32 and 40 in (args[0].shape[0], args[1].shape[1]):
            found.append(min(args[0].shape[0], args[1].shape[1]))

    net = model(key)
    for one, wanted in ((net, [narrow]), (apart(net), 3 * [narrow // (1 if key == "vera" else 3)])):
        found.clear()
        with Watching(note):
            _ = [linear(x) for linear in group(one)]
        assert found == wanted


# ---- any of them left out, in any order, in passes of their own


@pytest.mark.parametrize("used", [(0,), (2,), (1, 0), (2, 0, 1)])
@pytest.mark.parametrize("key", KEYS)
def test_some_of_the_outputs_in_any_order(key: str, used: Any) -> None:
    def act(three: list[Any], x: Tensor) -> Any:
        outputs = [three[k](x) for k in used]
        outputs[-1].sin().sum().backward()
        return outputs

    compare(model(key), act)


@pytest.mark.parametrize("retained", [True, False])
@pytest.mark.parametrize("key", ["lora", "cp", "vera"])
def test_passes_of_their_own(key: str, retained: bool) -> None:
    def act(three: list[Any], x: Tensor) -> None:
        for output in [linear(x) for linear in three]:
            output.sin().sum().backward(retain_graph=retained)

    compare(model(key), act, leaf=True)


@pytest.mark.parametrize("key", ["lora", "cp", "vera"])
def test_second_derivatives(key: str) -> None:
    def act(three: list[Any], x: Tensor) -> None:
        (first,) = torch.autograd.grad(sum(linear(x).sin().sum() for linear in three), x, create_graph=True)
        first.square().sum().backward()

    compare(model(key), act, leaf=True)


# ---- gradient checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("key", KEYS)
def test_checkpointed_layers(key: str, reentrant: bool, begun: list[int]) -> None:
    net, calls = model(key), begun
    wanted = gradients(net)
    net.enable_input_require_grads()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    same(gradients(net), wanted)
    assert calls == [3] * (4 if reentrant else 6)  # a reentrant forward runs without gradients, and shares nothing


@pytest.mark.parametrize("reentrant", [True, False, None])  # None: without one
@pytest.mark.parametrize("cut", [((0,), (1, 2)), ((0, 1), (2,)), ((0,), (1,), (2,)), ((2, 0), (1,))])
@pytest.mark.parametrize("key", KEYS)
def test_a_checkpoint_between_them(key: str, cut: Any, reentrant: bool | None) -> None:
    def act(three: list[Any], x: Tensor, reentrant: bool | None = None) -> Tensor:
        def part(x: Tensor, which: Any) -> Tensor:
            return sum(three[k](x).sin() for k in which)

        around = part if reentrant is None else partial(checkpoint, part, use_reentrant=reentrant)
        total = sum(around(x, which) for which in cut)
        total.square().sum().backward()
        return total

    compare(model(key), partial(act, reentrant=reentrant), act)


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_of_them_in_a_checkpoint_of_its_own(reentrant: bool) -> None:
    def act(three: list[Any], x: Tensor) -> Tensor:
        q, k, v = three
        total = q(x) * checkpoint(k, x, use_reentrant=reentrant) + v(x)
        total.square().sum().backward()
        return total

    compare(model("lora"), act)


# ---- what ends what was begun


def test_a_replaced_module_leaves_the_others(begun: list[int]) -> None:
    net, calls = model("lora"), begun
    q, k, v = group(net)
    q.base_layer.register_forward_hook(lambda *_: None)
    x = x_of()
    q(x), k(x), v(x)
    assert calls == [2]


@pytest.mark.parametrize("key", ["lora", "mixed"])
def test_dropout_draws_for_each(key: str, begun: list[int]) -> None:
    net, calls = model(key, dropout=0.3), begun
    results = []
    for one in (net, apart(net)):
        torch.manual_seed(0)
        results.append(gradients(one))
    same(*results)
    assert not calls
    net.eval()
    gradients(net)
    assert calls == [3, 3]


def test_small_inputs_are_not_worth_it(monkeypatch: pytest.MonkeyPatch, begun: list[int]) -> None:
    net = model("lora")
    x = x_of()
    monkeypatch.setattr(shared_input, "MIN_ELEMENTS", x.numel() + 1)
    group(net)[0](x)
    assert not begun
    monkeypatch.setattr(shared_input, "MIN_ELEMENTS", x.numel())
    group(net)[0](x)
    assert begun == [3]


def test_what_runs_without_gradients_or_otherwise_shares_nothing(begun: list[int]) -> None:
    net, calls = model("lora"), begun
    with torch.no_grad():
        net(**inputs())
    with torch.inference_mode():
        net(**inputs())
    with torch.autocast("cpu", torch.bfloat16):
        net.float()(**inputs()).logits.sum().backward()
    assert not calls


def test_two_adapters_and_replicas(begun: list[int]) -> None:
    net, calls = model("lora"), begun
    net.add_adapter("other", config("cp", target_modules=QKV, tokens=12))
    shake(net.double(), 3, "other")
    net.base_model.set_adapter(["default", "other"])
    same(gradients(net), gradients(apart(net)))
    assert not calls
    net.set_adapter("other")
    same(gradients(net), gradients(apart(net)))
    assert calls == [3, 3]
    many = adapted(target_modules=QKV, replicas=2)
    assert not any(linear.input_groups for linear in linears(many))


def test_other_ranks_share_as_well(begun: list[int]) -> None:
    net, calls = model("lora", rank_pattern={"v_proj": {"r": 1}}), begun
    same(gradients(net), gradients(apart(net)))
    assert calls == [3, 3]


# ---- nothing stays


def test_nothing_is_left_after_the_last_one() -> None:
    net = model("cp")
    q, k, v = group(net)
    x = x_of()
    outputs = [q(x)]
    left = q.input_groups["default"]._pending()
    assert set(left.waiting) == {k, v}
    outputs += [k(x), v(x)]
    assert not left.waiting
    assert left.x is left.rows is None
    del outputs, left
    assert q.input_groups["default"]._pending() is None


def test_an_exception_between_them_leaves_nothing() -> None:
    net = model("lora")
    q, k, _ = group(net)
    k.register_forward_pre_hook(lambda *_: 1 / 0)

    def attempt() -> tuple[Any, Any]:
        x = x_of()
        above = x * 2.0
        output = q(above)
        assert output.requires_grad
        left = q.input_groups["default"]._pending()
        found = weakref.ref(left), weakref.ref(left.rows.untyped_storage())
        try:
            k(above)
        except ZeroDivisionError:
            return found
        raise AssertionError

    gc.disable()
    try:
        left, storage = attempt()
        assert left() is None
        assert storage() is None
    finally:
        gc.enable()


def test_copies_and_pickles_know_each_other_and_have_begun_nothing(begun: list[int]) -> None:
    net, calls = model("lora"), begun
    q, *_ = group(net)
    alive = q(x_of())
    for one in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        its = [linear.input_groups["default"] for linear in group(one)]
        assert its[0] is its[1] is its[2]
        assert [*its[0].linears] == group(one)
        assert its[0]._pending is None
        calls.clear()
        same(gradients(one), gradients(net))
        assert calls == [3, 3, 3, 3]
    del alive


def test_a_compiled_step_shares_nothing(begun: list[int]) -> None:
    net, calls = model("lora", base=opt(layers=1)), begun
    wanted = gradients(net)
    assert calls == [3]
    calls.clear()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    same(gradients(compiled), {f"_orig_mod.{n}": g for n, g in wanted.items()})
    assert not calls


def test_a_linear_of_its_own_class_and_a_bank_in_half_precision() -> None:
    """What cannot join is left out; the others still share."""
    net = model("shared")
    attention = net.base_model.model.model.decoder.layers[0].self_attn

    class Special(nn.Linear):
        pass

    attention.k_proj.base_layer.__class__ = Special
    same(gradients(net), gradients(apart(net)))
    assert tnpeft.factors(net)["A"].dtype == torch.float64
