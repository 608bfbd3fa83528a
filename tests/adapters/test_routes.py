"""Which path a layer takes and why; no change between the calls of layers that share an input loses a gradient."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from adapter_models import shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tnpeft
from tnpeft.adapters.layer import shared_input
from tnpeft.adapters.layer.routes import _unmatched


class Attention(nn.Module):
    """Three linears that read one input."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.q_proj(x) + self.k_proj(x) + self.v_proj(x)
        return result


def config(**options: Any) -> tnpeft.TensorNetworkConfig:
    options = {"network": "lora", "ranks": {"r": 2}, "tokens": 6, "target_modules": r".*\.[qkv]_proj", **options}
    return tnpeft.TensorNetworkConfig(**options)


def attached(**options: Any) -> Any:
    torch.manual_seed(0)
    blocks = nn.ModuleDict({"self_attn": Attention()}).double()
    net = peft.get_peft_model(blocks, config(**options)).double().train()
    shake(net)
    shared_input.join("default", [layer for layer in three(net) if hasattr(layer, "updates")])
    return net


def three(net: Any) -> list[Any]:
    attention = net.base_model.model["self_attn"]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def watched(net: Any, x: Tensor, stack: contextlib.ExitStack) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    stack.callback(handle.remove)


def factors_replaced(net: Any, x: Tensor, stack: contextlib.ExitStack) -> None:
    for layer in three(net):
        for parameter in layer.tnpeft_factors.parameters():
            parameter.data = parameter.data * 2


def factor_narrowed(net: Any, x: Tensor, stack: contextlib.ExitStack) -> None:
    store = three(net)[1].tnpeft_factors["default"]
    store.A.data = store.A.data.float()


def stepped(net: Any, x: Tensor, stack: contextlib.ExitStack) -> None:
    parameters = [p for p in net.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1, fused=True).step()


def dropping(net: Any, x: Tensor, stack: contextlib.ExitStack) -> None:
    for layer in three(net):
        layer.dropouts["default"] = 0.5


def made_anew(net: Any, x: Tensor, stack: contextlib.ExitStack) -> None:
    net.delete_adapter("default")
    net.add_adapter("default", config(ranks={"r": 3}))
    net.double().set_adapter("default")
    shake(net, 8)


CHANGES: dict[str, Callable[[Any, Tensor, contextlib.ExitStack], object]] = {
    "the input is edited": lambda net, x, _: x.detach().mul_(2),
    "the input begins to require": lambda net, x, _: x.requires_grad_(),
    "the input moves in the graph": lambda net, x, _: x.detach_().requires_grad_(),
    "the input gets other data": lambda net, x, _: setattr(x, "data", x.data * 2),
    "factors are edited": lambda net, x, _: shake(net, 5),
    "factors are replaced": factors_replaced,
    "a factor is frozen": lambda net, x, _: three(net)[2].tnpeft_factors["default"].A.requires_grad_(False),
    "a factor is narrowed": factor_narrowed,
    "factors are stepped": stepped,
    "the adapter is frozen": lambda net, x, _: net.base_model.set_requires_grad("default", False),
    "the adapter is made anew": made_anew,
    "another adapter": lambda net, x, _: net.set_adapter("other"),
    "both adapters": lambda net, x, _: net.base_model.set_adapter(["default", "other"]),
    "no adapter": lambda net, x, _: net.base_model.disable_adapter_layers(),
    "one is merged": lambda net, x, _: three(net)[1].merge(),
    "one is hooked": lambda net, x, _: three(net)[1].base_layer.register_forward_hook(lambda m, a, found: found * 2),
    "one gets another input": lambda net, x, _: three(net)[1].register_forward_pre_hook(lambda m, a: (a[0] * 3,)),
    "all modules are watched": watched,
    "dropout": dropping,
    "autocast": lambda net, x, stack: stack.enter_context(torch.autocast("cpu", torch.bfloat16)),
    "no gradients": lambda net, x, stack: stack.enter_context(torch.no_grad()),
}


def outcome(change: str, places: tuple[int, int], order: tuple[int, ...], leaf: bool, apart: bool) -> Any:
    """Outputs and gradients of the three, called in an order, with a change from one call to another."""
    net = attached()
    net.add_adapter("other", config(ranks={"r": 1}))
    shake(net.double(), 3, "other")
    shared_input.join("other", three(net))
    net.set_adapter("default")
    if apart:
        for layer in three(net):
            layer.input_groups.clear()
    x = torch.linspace(-1, 1, 6 * 12, dtype=torch.float64).reshape(6, 12).clone()
    x = x if leaf else (x.requires_grad_() * 1.0)
    outputs = []
    with contextlib.ExitStack() as stack:
        for k, place in enumerate(order):
            if k == places[0]:
                CHANGES[change](net, x, stack)
                torch.manual_seed(0)
            if k == places[1]:
                stack.close()
            outputs.append(three(net)[place](x))
    after = [output for output in outputs[places[0] :] if output.requires_grad]
    wanted = [p for p in net.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])
    if not after:
        return outputs
    loss = sum(output.double().sin().sum() for output in after)
    return [*outputs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
@settings(max_examples=7)
@given(st.sampled_from(((1, 3), (2, 3), (1, 2))), st.permutations((0, 1, 2)), st.booleans())
def test_a_change_between_the_calls_is_met(change: str, places: Any, order: Any, leaf: bool) -> None:
    leaf |= change == "the input begins to require"
    smallest, shared_input.MIN_ELEMENTS = shared_input.MIN_ELEMENTS, 0
    try:
        found, wanted = (outcome(change, places, tuple(order), leaf, apart) for apart in (False, True))
    finally:
        shared_input.MIN_ELEMENTS = smallest
    close = 1e-2 if change in ("autocast", "a factor is narrowed") else 1e-10
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)


@pytest.mark.parametrize("network", ["quanta", "B[layer proj out r] A[layer proj r inp] - C[out s] E[proj s inp]"])
def test_autocast_where_the_input_enters_several_products(network: str) -> None:
    line = network if network == "quanta" else f"{network} -> layer proj out inp"
    options: dict[str, Any] = {} if network == "quanta" else {"ranks": {"r": 2, "s": 1}, "tokens": 2}
    config = tnpeft.TensorNetworkConfig(network=line, target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), config).train()
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    (found,) = torch.autograd.grad(model(x).float().square().mean(), x)
    torch.testing.assert_close(x.grad, found, rtol=0.1, atol=0.01)


# ---- DoRA


def dora(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    its = {"network": "lora", "ranks": {"r": 2}, "dora": True, "dropout": dropout, "target_modules": ["0"]}
    base = nn.Sequential(nn.Linear(6, 5)).double()
    return peft.get_peft_model(base, tnpeft.TensorNetworkConfig(**its), autocast_adapter_dtype=False).train()


def test_forward_derivatives_are_those_of_the_gradient() -> None:
    model = dora()
    own = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    x = torch.randn(4, 6, dtype=torch.float64)

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, {**rest, **values}, (x,)).pow(2).sum()

    along = {n: torch.randn_like(p) for n, p in own.items()}
    gradient = torch.func.grad(loss)(own)
    wanted = sum((gradient[n] * along[n]).sum() for n in own)
    torch.testing.assert_close(torch.func.jvp(loss, (own,), (along,))[1], wanted)


def test_dropout_is_of_the_input_of_base_and_update_alike() -> None:
    """m / |W + dW| (W + dW) acts on the dropped input, beside the base's output of the whole one."""
    model, x = dora(dropout=0.5), torch.randn(4, 6, dtype=torch.float64)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.tnpeft_factors["default"].B.normal_()
        layer.tnpeft_magnitude["default"].mul_(1.5)
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    weight = layer.base_layer.weight
    updated = weight + layer._delta("default")
    scaled = layer.tnpeft_magnitude["default"][:, None] * updated / updated.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, layer.base_layer(x) + dropped @ (scaled - weight).T)


def test_magnitudes_compile_before_any_other_call() -> None:
    model, x = dora(), torch.randn(4, 6, dtype=torch.float64)
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("network", ["vera", "refta"])
def test_frozen_factors_and_constants_in_the_dtype_of_the_model_compile(network: str) -> None:
    config = tnpeft.TensorNetworkConfig(network=tnpeft.families.get(network)(), target_modules=["q_proj"])
    base = nn.ModuleDict({"self_attn": Attention()}).bfloat16()
    layer = three(peft.get_peft_model(base, config, autocast_adapter_dtype=False))[0]
    torch._dynamo.reset()
    x = torch.randn(6, 12).bfloat16()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


# ---- routes


def test_a_layer_says_its_path_and_why() -> None:
    net = attached()
    q = three(net)[0]
    x = torch.ones(6, 12, dtype=torch.float64)
    assert q.route(x) == ("fused", "")
    assert q.route(x, ["default"] * 6).kind == "mixed"
    assert q.route(x.float()) == ("plain", "the input's dtype is not the base weight's")
    with torch.no_grad():
        assert q.route(x) == ("plain", "gradients are disabled")
        assert q.eval().route(x) == ("cached", "gradients are disabled")
    q.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert q.route(x) == ("plain", "autocast is active")
    q.dropouts["default"] = 0.5
    assert q.route(x) == ("plain", "dropout in training")
    q.dropouts["default"] = 0.0
    handle = q.base_layer.register_forward_hook(lambda *_: None)
    assert q.route(x) == ("plain", "the base layer has hooks")
    handle.remove()
    with net.disable_adapter():
        assert q.route(x).kind == "base"
    net.merge_adapter()
    assert q.route(x).kind == "merged"


def test_layers_that_share_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = attached()
    x = torch.ones(6, 12, dtype=torch.float64)
    monkeypatch.setattr(shared_input, "MIN_ELEMENTS", x.numel())
    assert [layer.route(x).kind for layer in three(net)] == ["shared"] * 3
    assert three(net)[0].route(x[:5]).kind == "fused"


def test_a_model_is_explained() -> None:
    net = attached(target_modules=["q_proj", "v_proj"])
    found = tnpeft.explain(net)
    assert [row.layer.rpartition(".")[2] for row in found.rows] == ["q_proj", "v_proj"]
    assert {(row.out, row.inp, row.path, row.adapter) for row in found.rows} == {(12, 12, "fused", "default")}
    assert found.rows[0].factors == {"B": (12, 2), "A": (2, 12)}
    assert found.unmatched == {"default": ()}
    assert _unmatched(["q_proj", "o_proj"], found.rows) == ("o_proj",)
    assert "default: no layer matches o_proj" in str(replace(found, unmatched={"default": ("o_proj",)}))
    with pytest.raises(tnpeft.networks.ConfigError, match="no adapter"):
        tnpeft.explain(nn.Linear(2, 2))


# ---- half precision: the model in bfloat16, the factors in float32, as PEFT has them by default


def in_half_precision(network: str, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    line = {"cp": tnpeft.families.cp(3), "tenslora": tnpeft.families.tenslora(ranks=3)}.get(network, network)
    config = tnpeft.TensorNetworkConfig(
        network=line, ranks={"r": 3} if network == "lora" else {}, target_modules=["q_proj"], **options
    )
    net = peft.get_peft_model(nn.ModuleDict({"self_attn": Attention(64)}).bfloat16(), config)
    for parameter in net.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            nn.init.normal_(parameter, std=0.3)
    return net, torch.randn(20, 64).bfloat16().requires_grad_()


@pytest.mark.parametrize("network", ["lora", "cp", "tenslora"])
def test_an_input_narrower_than_the_factors_is_kept_as_it_is(network: str) -> None:
    net, x = in_half_precision(network)
    layer, kept = three(net)[0], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    wide = [
        t for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel() and not isinstance(t, nn.Parameter)
    ]
    assert not wide
    assert out.dtype == torch.bfloat16
    grad = torch.randn(20, 64).bfloat16()
    out.backward(grad)
    exact, double = x.detach().double().requires_grad_(), copy.deepcopy(net).double()
    three(double)[0](exact).backward(grad.double())
    for (name, ours), theirs in zip(net.named_parameters(), double.parameters(), strict=True):
        if theirs.grad is not None:  # computed in float32 from the very input
            assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name
    assert x.grad.dtype == torch.bfloat16
    assert (x.grad - exact.grad).norm() <= 0.01 * exact.grad.norm()
    assert (out - three(double)[0](exact)).norm() <= 0.01 * out.norm()


@pytest.mark.parametrize("network", ["lora", "cp", "tenslora"])
def test_inference_adds_the_update_in_the_factors_dtype(network: str) -> None:
    net, x = in_half_precision(network)
    layer, seen = three(net.eval())[0], x.detach()
    with torch.no_grad():
        found, again = layer(seen), layer(seen)
        assert layer.path(seen)[2] is not None  # and kept, as two thin matrices
        base = layer.base_layer(seen).double()
        wanted = base + copy.deepcopy(layer).get_delta_weight("default").double().matmul(seen.double().T).T
    assert torch.equal(found, again)
    assert (found.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()  # rounded once


@pytest.mark.parametrize("network", ["lora", "cp", "tenslora"])
def test_dora_computes_its_update_in_the_factors_dtype_in_inference_too(network: str) -> None:
    net, x = in_half_precision(network, dora=True)
    layer, seen = three(net.eval())[0], x.detach()
    trained = layer._update("default", seen.requires_grad_(), None)
    with torch.no_grad():
        found = layer._update("default", seen.detach(), None)
    assert found.dtype == trained.dtype == torch.float32
    assert (found - trained).norm() <= 1e-5 * trained.norm()


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("mode", ["training", "inference_mode", "autocast", "no_grad"])
@pytest.mark.parametrize("dora", [False, True])
def test_half_precision_is_at_least_as_exact_as_pefts(dora: bool, mode: str) -> None:
    """The sum with the base's output is rounded once, and a magnitude as little as PEFT's, autocast or not."""
    net, x = in_half_precision("lora", dora=dora)
    theirs = peft.get_peft_model(
        nn.ModuleDict({"self_attn": Attention(64)}).bfloat16(),
        peft.LoraConfig(r=3, lora_alpha=3, use_dora=dora, target_modules=["q_proj"]),
    )
    ours, lora = three(net)[0], three(theirs)[0]
    lora.base_layer.load_state_dict(ours.base_layer.state_dict())
    factors = ours.tnpeft_factors["default"]
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_(factors.A)
        lora.lora_B["default"].weight.copy_(factors.B)
        if dora:
            ours.tnpeft_magnitude["default"].copy_(1 + torch.rand(64))
            lora.lora_magnitude_vector["default"].weight.copy_(ours.tnpeft_magnitude["default"])
    double = three(copy.deepcopy(net).double())[0]
    wanted = double(x.detach().double())
    modes = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), modes.get(mode, contextlib.nullcontext)():
        found, peer = ours.train(mode == "training")(x), lora.train(mode == "training")(x)
    assert found.dtype == torch.bfloat16
    assert error(found, wanted) <= 1.1 * error(peer, wanted)


@pytest.mark.parametrize("network", ["vera", "tera", "lora_xs"])
@pytest.mark.parametrize("dora", [False, True])
def test_trained_factors_alone_in_float32(network: str, dora: bool) -> None:
    """A frozen factor may be narrower: the dtype of the trained ones counts, and merging takes the widest."""
    line = tnpeft.families.get(network)()
    config = tnpeft.TensorNetworkConfig(network=line, target_modules=["q_proj"], dora=dora)
    net = peft.get_peft_model(nn.ModuleDict({"self_attn": Attention(64)}), config).bfloat16()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = torch.rand_like(parameter, dtype=torch.float32)
    layer, x = three(net)[0], torch.randn(20, 64).bfloat16()
    double = three(copy.deepcopy(net).double())[0]
    wanted, base = double(x.double()).detach(), layer.base_layer(x).double()
    change = double.get_delta_weight("default")
    assert layer._update("default", x, None).dtype == torch.float32
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            assert error(layer(x), wanted) <= 1.1 * error((base + x.double() @ change.T).bfloat16(), wanted)
    assert error(layer.get_delta_weight("default"), change) <= 1e-5
    net.merge_adapter()
    assert error(layer.base_layer.weight, double.base_layer.weight + change) <= 2**-8


@torch.no_grad()
def test_an_update_in_half_precision_is_merged_as_computed_in_float32() -> None:
    net, _ = in_half_precision("cp")
    layer, double = three(net.bfloat16())[0], three(copy.deepcopy(net).double())[0]
    assert error(layer.get_delta_weight("default"), double.get_delta_weight("default")) <= 1e-6


@torch.no_grad()
def test_a_convolutions_magnitudes_keep_their_dtype_under_autocast() -> None:
    torch.manual_seed(0)
    config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"], dora=True)
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(8, 16, 2)).bfloat16(), config).eval()
    layer, x = model.base_model.model[0], torch.randn(4, 8, 9, 9).bfloat16()
    layer.tnpeft_magnitude["default"].copy_(1 + torch.rand(16))
    wanted = copy.deepcopy(model).double()(x.double())
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert error(found, wanted) <= 1.1 * error(plain, wanted)
