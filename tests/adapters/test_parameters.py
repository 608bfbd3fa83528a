"""Raw Parameters that modules read themselves, such as in-projections."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from failing_steps import refused
from torch import Tensor, nn
from weight_kinds import RAW as KINDS
from weight_kinds import Attention, attached, sequence, shake

import tnpeft
from tnpeft.adapters.sites.parameter import TensorNetworkParameter
from tnpeft.networks import NetworkError

LORA = {"network": "B[layer proj out r] A[layer proj r inp] -> layer proj out inp", "ranks": {"r": 3}}


def adapted(kind: str = "attention", **options: Any) -> tuple[nn.Module, peft.PeftModel]:
    return attached(kind, **{**LORA, **options})


def test_the_fused_kernels_of_inference_read_the_adapted_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: calls.append(1) or kernel(*args))
    base, model = adapted()
    shake(model, 0.2)
    base.eval(), model.eval()
    x = sequence()
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
    shake(model, 0.2)
    wanted = model.train()(x)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_formed_at_every_call_and_start_as_they_were(kind: str) -> None:
    _, model = adapted(kind)
    reasons = {row.reason for row in tnpeft.explain(model).rows}
    assert reasons == {"the module reads the weight itself: it is formed at every call"}
    for layer in (m for m in model.modules() if isinstance(m, TensorNetworkParameter)):
        assert torch.equal(layer.adapted(), layer.weight)


def test_dora_and_named_stacks() -> None:
    _, model = adapted(dora=True)
    x = sequence()
    start = model(x)
    shake(model, 0.2)
    found = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), found, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    tnpeft.set_factors(model, {"B": torch.zeros_like(tnpeft.factors(model)["B"])})
    assert torch.allclose(model(x), start, rtol=0, atol=1e-12)
    line = "B[layer proj scene out r] A[layer proj r inp] -> layer proj scene out inp"
    _, model = adapted(network=line, stack={"scene": 2})
    shake(model, 0.2)
    outputs = []
    for scene in (0, 1):
        tnpeft.select(model, scene=scene)
        outputs.append(model(x))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    tnpeft.select(model, scene=[0, 1])
    assert all("scene is chosen by row" in row.reason for row in tnpeft.explain(model).rows)
    with pytest.raises(NetworkError, match="a value of 'scene' for each row, not one update"):
        model(x)


def test_a_failure_after_attaching_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(peft.tuners.tuners_utils, "set_additional_trainable_modules", fail)
    with refused(base := Attention(), None, MemoryError):
        peft.get_peft_model(base, tnpeft.TensorNetworkConfig(**LORA, target_modules=["in_proj"]))


class Mixed(nn.Module):
    """Two Parameters of several matrices, and a module that says itself which axis is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 8)), nn.Parameter(torch.randn(4, 8, 16))
        self.told = nn.Module()
        self.told.weight = nn.Parameter(torch.randn(4, 16, 8))
        self.told.in_features, self.told.out_features = 16, 8

    def forward(self, x: Tensor) -> Tensor:
        for matrices in (self.up, self.down, self.told.weight):
            x = torch.einsum("...i,eio->...o", x, matrices)
        return x


def test_axes_of_several_matrices_are_declared_or_told_by_the_module() -> None:
    def shapes(targets: list[str], **options: Any) -> dict[str, tuple[int, int, int]]:
        config = tnpeft.TensorNetworkConfig(network="expert_lora", target_modules=targets, **options)
        model = peft.get_peft_model(nn.Sequential(Mixed()), config)
        return {row.site: (row.experts, row.out, row.inp) for row in tnpeft.explain(model).rows}

    axes = {"up": "expert inp out", "0.down": "expert out inp"}
    assert shapes(["up", "down"], axes=axes) == {"up_weight": (4, 8, 16), "down_weight": (4, 8, 16)}
    assert shapes(["told.weight"]) == {"weight_weight": (4, 8, 16)}
    with pytest.raises(NetworkError, match=r"0.up holds 4 matrices of 16 x 8, and nothing says which axis") as caught:
        shapes(["up"])
    assert caught.value.remedy == 'declare it: axes={"up": "expert out inp"}, or "expert inp out"'
    with pytest.raises(NetworkError, match=r"the axes of 0.up are 'inp out'"):
        shapes(["up"], axes={"up": "inp out"})
    with pytest.raises(NetworkError, match="axes names 'wp', and no targeted Parameter is called so"):
        shapes(["up"], axes={"up": "expert inp out", "wp": "expert inp out"})
    with pytest.raises(NetworkError, match="0 is a Mixed, whose weights of several matrices have an unknown layout"):
        shapes(["0"])
    _, model = adapted("parameter turned")
    with pytest.raises(NetworkError, match=r"another adapter declares other axes of layers.0.mix.kernel"):
        model.add_adapter("second", tnpeft.TensorNetworkConfig(**LORA, target_modules=["kernel"]))
