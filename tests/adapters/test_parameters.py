"""Raw Parameters that modules read themselves: in-projections against a dense oracle, and a life of a tuner."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_oracle import dense
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import tnpeft
from tnpeft.adapters.sites.parameter import TensorNetworkParameter
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.networks import NetworkError
from tnpeft.nn.init.philox import normal

FOUNDING = ("cp", "lorta", "tenslora", "tera", "tucker", "lora", "tensor_train")
NOT_HERE = {
    name
    for name in tnpeft.families.names()
    if {"expert", "basis", "scene"} & {*tnpeft.families.get(name)().network.indices}
}
FAMILIES = [name for name in tnpeft.families.names() if name not in NOT_HERE]
LORA = {"network": "B[layer proj out r] A[layer proj r inp] -> layer proj out inp", "ranks": {"r": 3}}
CP = {
    "network": "w[layer proj r] A[layer o1 r] B[o2 r] C[layer i1 r] D[i2 r] -> layer proj (o1 o2) (i1 i2)",
    "ranks": {"r": 4},
    "unit_norm": ["A", "C"],
}


class Attention(nn.Module):
    """Two attention layers; the second reads keys and values of another width, whose projections stand apart."""

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        widths = {"kdim": 8, "vdim": 8} if apart else {}
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, batch_first=True, **widths)}) for _ in range(2)
        )
        self.width = 8 if apart else 16

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = x if self.width == 16 else x[..., :8]
            x = layer["attn"](x, y, y, need_weights=False)[0] + x
        return x


class Kernel(nn.Module):
    """A module with a matrix of its own, read in two methods and from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(16, 16))

    def back(self, x: Tensor) -> Tensor:
        return x @ self.kernel

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.T


class Kernels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mix": Kernel()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (layer["mix"] for layer in self.layers)
        return first.back(second(first(x)).tanh()) + x @ second.kernel


KINDS = {
    "attention": (Attention, ["in_proj"]),
    "attention apart": (lambda: Attention(True), ["q_proj_weight", "v_proj"]),
    "parameter": (Kernels, ["mix.kernel"]),
}


def example() -> Tensor:
    return torch.randn(2, 5, 16, dtype=torch.float64)


def adapted(kind: str = "attention", **options: Any) -> tuple[nn.Module, peft.PeftModel]:
    torch.manual_seed(0)
    make, targets = KINDS[kind]
    base = make().double()
    config = tnpeft.TensorNetworkConfig(**{**LORA, "target_modules": targets, **options})
    return base, peft.get_peft_model(copy.deepcopy(base), config).double()


def shake(model: nn.Module) -> None:
    """Random factors, not so large that attention saturates: its gradients would be ill-conditioned."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tnpeft_factors" in name:
                values = torch.from_numpy(normal(parameter.numel(), 0, name)).reshape(parameter.shape)
                parameter.copy_(0.2 * values)


def raw(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "tnpeft" not in name}


def oracle(base: nn.Module, model: nn.Module, f: tnpeft.Factorization, values: dict, x: Tensor) -> Tensor:
    weights: dict[str, Tensor] = {}
    for place in bank_of(model).layouts["default"].site_layouts:
        site = place.site
        owner, _, child = site.module.rpartition(".")
        name = f"{owner}.kernel" if child == "kernel_weight" else f"{owner}.{child}_weight"
        weight = base.get_parameter(name).detach()
        axis, length = (1, site.inp) if "/inp:" in site.proj else (0, site.out)
        part = dense(place, values, f, weight.narrow(axis, site.start, length))
        sides = (site.start, weight.shape[axis] - site.start - length)
        pad = (*sides, 0, 0) if axis else (0, 0, *sides)
        weights[name] = weights.get(name, weight) + nn.functional.pad(part, pad)
    return functional_call(base, weights, (x,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "attention" and family not in FOUNDING:
        pytest.skip("the other kinds meet the founding families")
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", False)
    f = tnpeft.families.get(family)()
    base, model = adapted(kind, network=f, ranks=None)
    x = example()
    if family in FOUNDING:
        for layer in (m for m in model.modules() if isinstance(m, TensorNetworkParameter)):
            assert torch.equal(layer.adapted(), layer.weight)
        assert torch.allclose(model(x), base(x), rtol=0, atol=1e-13)
    shake(model)
    held = arrays(model, bank_of(model), "default")
    leaves = {piece: a.detach().clone().requires_grad_(piece.kind == "trainable") for piece, a in held.items()}
    wanted, found = oracle(base, model, f, leaves, x), model(x)
    assert (wanted - base(x)).abs().max() > 1e-6
    size = 1e-10 * float(wanted.detach().abs().max())
    assert torch.allclose(found, wanted, rtol=0, atol=size)
    for output in (wanted, found):
        output.square().mean().backward()
    trained = {piece: leaf for piece, leaf in leaves.items() if piece.kind == "trainable"}
    total = torch.stack([leaf.grad.norm() for leaf in trained.values()]).norm()
    for piece, leaf in trained.items():
        assert (held[piece].grad - leaf.grad).norm() <= 1e-8 * leaf.grad.norm() + 1e-13 * total, piece
    assert not any(p.grad is not None for p in raw(model.get_base_model()).values())
    model.merge_adapter()
    assert torch.allclose(model(x), wanted, rtol=0, atol=size)
    model.unmerge_adapter()
    for name, weight in base.named_parameters():
        assert torch.equal(raw(model.get_base_model())[name], weight)


def test_the_fused_kernels_of_inference_read_the_adapted_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: calls.append(1) or kernel(*args))
    base, model = adapted()
    shake(model)
    base.eval(), model.eval()
    x = example()
    wanted = model(x)
    assert not calls
    with torch.no_grad():
        attn = model.get_base_model().layers[0]["attn"]
        alone = attn(x, x, x, need_weights=False)[0]
        assert calls == [1]
        attn.train()
        assert torch.allclose(alone, attn(x, x, x, need_weights=False)[0], rtol=0, atol=1e-10)
        attn.eval()
        assert torch.allclose(model(x), wanted, rtol=0, atol=1e-10)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).double()
    encoder = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    config = tnpeft.TensorNetworkConfig(**LORA, target_modules=["in_proj_weight", "linear1"])
    model = peft.get_peft_model(encoder, config).double()
    shake(model)
    wanted = model.train()(x)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), wanted, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("kind", KINDS)
def test_a_tuners_life(kind: str, tmp_path: Path) -> None:
    base, model = adapted(kind)
    x = example()
    shake(model)
    outputs = {"default": model(x).detach()}
    model.save_pretrained(tmp_path)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert count == bank_of(model).layouts["default"].count() == sum(value.numel() for value in stored.values())
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(again(x), outputs["default"], rtol=0, atol=1e-12)
    assert sum(p.numel() for g in tnpeft.parameter_groups(model, relative_step=0.1) for p in g["params"]) == count
    explained = tnpeft.explain(model)
    assert {row.reason for row in explained.rows} == {
        "the module reads the weight itself: it is formed at every call"
    }
    assert explained.unmatched == {"default": ()}
    targets = {"attention": ["in_proj_weight"], "attention apart": ["q_proj"], "parameter": ["kernel"]}[kind]
    model.add_adapter("second", tnpeft.TensorNetworkConfig(**CP, target_modules=targets))
    model.double()
    shake(model)
    model.set_adapter("second")
    outputs["second"] = model(x).detach()
    model.base_model.set_adapter(["default", "second"])
    both, size = model(x).detach(), 1e-10
    with model.disable_adapter():
        assert torch.allclose(model(x), base(x), rtol=0, atol=1e-12)
    for order in (["default", "second"], ["second", "default"]):
        for name in order:
            model.merge_adapter([name])
        assert torch.allclose(model(x), both, rtol=0, atol=size)
        model.unmerge_adapter()
        for name, weight in base.named_parameters():
            assert torch.equal(raw(model.get_base_model())[name], weight)
            assert not raw(model.get_base_model())[name].requires_grad
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.allclose(model(x), outputs["default"], rtol=0, atol=1e-12)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(copied(x), model(x))
    assert {name for name, _ in copied.named_parameters()} == {name for name, _ in model.named_parameters()}
    merged = copied.merge_and_unload()
    assert torch.allclose(merged(x), outputs["default"], rtol=0, atol=size)
    for plain in (merged, model.unload()):
        assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
        assert not any(isinstance(m, BaseTunerLayer) for m in plain.modules())
    assert torch.allclose(plain(x), base(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["attention", "parameter"])
def test_checkpointing(kind: str, reentrant: bool) -> None:
    _, model = adapted(kind, **CP)
    shake(model)
    x = example().requires_grad_()

    def gradients(run: Any) -> list[Tensor]:
        model.zero_grad()
        run(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients(model)
    again = gradients(lambda y: checkpoint(model, y, use_reentrant=reentrant))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("kind", ["attention", "parameter"])
def test_compiled_in_one_graph(kind: str) -> None:
    _, model = adapted(kind)
    shake(model)
    x = example()
    torch._dynamo.reset()  # its limit of recompilations counts all models
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(found, model(x), rtol=0, atol=1e-10)
    found.square().mean().backward()


def test_dora_and_named_stacks() -> None:
    _, model = adapted(dora=True)
    x = example()
    start = model(x)
    shake(model)
    found = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), found, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    tnpeft.set_factors(model, {"B": torch.zeros_like(tnpeft.factors(model)["B"])})
    assert torch.allclose(model(x), start, rtol=0, atol=1e-12)
    line = "B[layer proj scene out r] A[layer proj r inp] -> layer proj scene out inp"
    _, model = adapted(network=line, stack={"scene": 2})
    shake(model)
    outputs = []
    for scene in (0, 1):
        tnpeft.select(model, scene=scene)
        outputs.append(model(x))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    tnpeft.select(model, scene=[0, 1])
    with pytest.raises(NetworkError, match="a value of 'scene' for each row, not one update"):
        model(x)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dropout": 0.1}, "in_proj is read by its module itself, and dropout needs the input"),
        ({"replicas": 2}, "in_proj is read by its module itself, and replicas needs the input"),
        ({"target_modules": ["attn"]}, "attn is a MultiheadAttention, not a linear"),
        ({"target_modules": ["out_proj"]}, "reads its weight without calling it"),
        ({"ranks": {"r": 10**7}}, "elements on this model"),
    ],
)
def test_what_is_refused_leaves_no_trace(options: dict[str, Any], problem: str) -> None:
    base = Attention()
    before = {name: (id(m), type(m), {*m._modules}) for name, m in base.named_modules()}
    config = tnpeft.TensorNetworkConfig(**{**LORA, "target_modules": ["in_proj"], **options})
    with pytest.raises(NetworkError, match=problem):
        peft.get_peft_model(base, config)
    assert {name: (id(m), type(m), {*m._modules}) for name, m in base.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_a_failure_after_attaching_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError

    base, x = Attention().double(), example()
    before = [(name, type(m)) for name, m in base.named_modules()]
    wanted = base(x)
    monkeypatch.setattr(peft.tuners.tuners_utils, "set_additional_trainable_modules", fail)
    with pytest.raises(MemoryError):
        peft.get_peft_model(base, tnpeft.TensorNetworkConfig(**LORA, target_modules=["in_proj"]))
    assert [(name, type(m)) for name, m in base.named_modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert torch.equal(base(x), wanted)


def test_a_batch_of_several_adapters_is_refused() -> None:
    _, model = adapted()
    model.eval()
    with pytest.raises(NetworkError, match="once for all rows of a batch"):
        model(example(), adapter_names=["default", "__base__"])
