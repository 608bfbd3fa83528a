"""What inference keeps: it is there, it is never stale, and it is off wherever it could be."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tnpeft

X = torch.linspace(-1, 1, 3 * 48, dtype=torch.float64).reshape(3, 48)


FAMILIES = {
    "cp": tnpeft.families.cp(rank=4, out=(8, 6), inp=(6, 8)),
    "lora": tnpeft.families.lora(rank=3),
    "subtracted": tnpeft.network("-B[layer proj out r] A[r inp] -> layer proj out inp"),
    "kron": tnpeft.families.krona(out=(8, 6), inp=(6, 8)),  # the only one of these that is not two matrices
}


def model(key: str = "cp", **options: Any) -> Any:
    torch.manual_seed(0)
    f = FAMILIES[key]
    options = {"ranks": {"r": 3}, **options} if key == "subtracted" else options
    config = tnpeft.TensorNetworkConfig(network=f, target_modules=["q_proj"], **options)
    net = peft.get_peft_model(nn.Sequential(OrderedDict(q_proj=nn.Linear(48, 48))).double(), config).double().eval()
    return randomise(net)


def randomise(net: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return net


def layer(net: Any) -> Any:
    return net.base_model.model.q_proj


def entries(net: Any) -> list[Any]:
    return [entry for items in layer(net).updates.values() for item in items for entry in item.kept.values()]


def kept(net: Any) -> int:
    return len(entries(net))


@torch.no_grad()
def plain(net: Any) -> Tensor:
    """The same output with nothing kept."""
    result: Tensor = copy.deepcopy(net)(X)
    return result


@torch.no_grad()
def test_the_second_forward_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    run = layer(net).updates["default"][0].program
    first, calls = net(X), []
    (entry,) = entries(net)
    monkeypatch.setattr(type(run), "prepare", lambda *args: calls.append(args))
    assert torch.equal(net(X), first)
    assert not calls
    (again,) = entries(net)
    assert again is entry


def assigned(net: Any) -> None:
    state = {name: value + 1 if "tnpeft" in name else value for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def replaced(net: Any) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data + 1


def stepped(net: Any, fused: bool = False) -> None:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, fused=fused)
    with torch.enable_grad():
        net(X).sum().backward()
    optimizer.step()


def one_more(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in held.items()}


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda net: randomise(net, 2),
    "loaded": lambda net: peft.set_peft_model_state_dict(net, one_more(peft.get_peft_model_state_dict(net))),
    "assigned": assigned,
    "replaced": replaced,
    "stepped": stepped,
    "stepped, fused": partial(stepped, fused=True),
    "set as declared": lambda net: tnpeft.set_factors(net, one_more(tnpeft.factors(net))),
}


@pytest.mark.parametrize("key", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_of_the_factors_is_seen(change: str, key: str) -> None:
    net = model(key)
    before = net(X)
    assert kept(net) == (key != "kron")
    CHANGES[change](net)
    after = net(X)
    assert not torch.equal(after, before)
    assert torch.equal(after, plain(net))


@torch.no_grad()
def test_an_edit_through_data_needs_a_refresh() -> None:
    net = model()
    before = net(X)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    assert torch.equal(net(X), before)  # the reason for tnpeft.refresh
    tnpeft.refresh(net)
    assert torch.equal(net(X), plain(net))
    assert not torch.equal(net(X), before)


@torch.no_grad()
def test_dtypes_adapters_and_merging() -> None:
    net = model()
    f = tnpeft.families.cp(rank=2, out=(8, 6), inp=(6, 8))
    net.add_adapter("other", tnpeft.TensorNetworkConfig(network=f, target_modules=["q_proj"]))
    randomise(net.double().eval())
    first = net(X)
    net.set_adapter("other")
    randomise(net)
    assert torch.equal(net(X), plain(net))
    net.set_adapter("default")
    assert torch.equal(net(X), first)
    net.merge_adapter()
    torch.testing.assert_close(net(X), first, rtol=1e-12, atol=1e-12)
    net.unmerge_adapter()
    assert torch.equal(net(X), first)
    torch.testing.assert_close(net.float()(X.float()), first.float(), rtol=1e-4, atol=1e-4)


def test_training_gradients_and_inference_mode_keep_nothing() -> None:
    net = model()
    net(X)
    assert kept(net) == 0
    with torch.inference_mode():
        net(X)
    assert kept(net) == 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        copy.deepcopy(net).float()(X.float())
    assert kept(net) == 0
    with torch.no_grad():
        net.train()(X)
        assert kept(net) == 0
        net.eval()(X)
    assert kept(net) == 1
    net.train()
    assert kept(net) == 0


@torch.no_grad()
def test_compiled_models_and_copies_keep_nothing() -> None:
    net = model()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), plain(net))
    assert kept(net) == 0
    net(X)
    assert kept(net) == 1
    assert kept(copy.deepcopy(net)) == 0


# ---- the direct way of one adapter


def hooked(net: Any) -> Any:
    """A copy that takes the general way."""
    copied = copy.deepcopy(net)
    layer(copied).base_layer.register_forward_hook(lambda *_: None)
    return copied


@pytest.mark.parametrize("key", FAMILIES)
@torch.no_grad()
def test_a_call_asks_for_no_factor_again(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model(key), X.reshape(3, 1, 48)
    first = net(x)
    general = hooked(net)
    torch.testing.assert_close(first, general(x), rtol=1e-13, atol=1e-13)
    assert layer(general).route(x).reason == "the base layer has hooks"
    asked: list[Any] = []
    kind = type(layer(net))
    original = kind.operands
    monkeypatch.setattr(kind, "operands", lambda *args: (asked.append(args), original(*args))[1])
    assert torch.equal(net(x), first)
    assert torch.equal(net(X), first.reshape(3, 48))
    assert net(x[:0]).shape == (0, 1, 48)
    assert bool(asked) == (key == "kron")
    assert kept(net) == (key != "kron")


def made_anew(net: Any) -> None:
    net.set_adapter("other")
    net.delete_adapter("default")
    net.add_adapter("default", tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 5}, target_modules=["q_proj"]))
    net.set_adapter("default")
    randomise(net.double().eval(), 3)


def training(net: Any) -> None:
    layer(net).dropouts["default"] = 0.999999
    net.train()


def bounded(net: Any) -> None:
    base = layer(net).base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias).tanh()


def scripted(net: Any) -> None:
    """The factors themselves computed from others."""
    arrays = layer(net).tnpeft_factors["default"]
    torch.nn.utils.parametrize.register_parametrization(arrays, "B", nn.Tanh(), unsafe=True)


ENDS: dict[str, Callable[[Any], Any]] = {
    "off": lambda net: net.disable_adapter(),
    "merged": lambda net: net.merge_adapter(),
    "another": lambda net: net.set_adapter("other"),
    "both": lambda net: net.base_model.set_adapter(["default", "other"]),
    "made anew": made_anew,
    "training": training,
    "watched": lambda net: layer(net).base_layer.register_forward_hook(lambda module, args, result: result * 2),
    "bounded": bounded,
    "scripted": scripted,
}


@pytest.mark.parametrize("change", ENDS)
@torch.no_grad()
def test_the_direct_way_ends_where_it_would_be_wrong(change: str) -> None:
    net = model("lora")
    net.add_adapter("other", tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["q_proj"]))
    net.set_adapter("other")
    randomise(net.double().eval(), 5)
    net.set_adapter("default")
    before = net(X)
    assert kept(net) == 1
    inside = ENDS[change](net)
    with inside if change == "off" else contextlib.nullcontext():
        torch.manual_seed(7)
        found = net(X)
        general = net if change == "scripted" else copy.deepcopy(net)
        tnpeft.refresh(general)
        torch.manual_seed(7)
        assert torch.equal(general(X), found)
        wanted = layer(net).base_layer(X)
    if change == "merged":
        torch.testing.assert_close(found, before, rtol=1e-12, atol=1e-12)
    else:
        assert not torch.allclose(found, before)
    if change not in ("off", "merged", "training"):
        delta = sum(layer(net).get_delta_weight(name) for name in layer(net).active_adapters)
        torch.testing.assert_close(found, wanted + X @ delta.T, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_direct_way_takes_the_dtypes_of_the_call() -> None:
    net = model("lora").float()
    net(X.float())
    net.get_base_model().to(torch.float64)
    for module in net.modules():
        if hasattr(module, "tnpeft_factors"):
            module.tnpeft_factors.float()  # a wider base: the general way
    found = net(X)
    assert layer(net).route(X) == ("plain", "gradients are disabled")
    torch.testing.assert_close(found, plain(net), rtol=1e-12, atol=1e-12)
    half = net.to(torch.bfloat16)
    assert half(X.bfloat16()).dtype == torch.bfloat16
    assert layer(half).route(X.bfloat16()).kind == "cached"


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_numbers_of_another_mode_are_not_kept(dora: bool) -> None:
    """A trial run on fake tensors, as for an estimate of memory, leaves the next call its real ones."""
    net = model(dora=dora)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert net(mode.from_tensor(X)).shape == X.shape
    assert torch.equal(net(X), plain(net))
