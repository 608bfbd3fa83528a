"""A quantised base: an 8-bit linear of our own behind the interface that PEFT's back ends have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import adapted, logits, opt, shake
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from tnpeft.adapters import model as model_module
from tnpeft.adapters.layer import merging as dense_module
from tnpeft.adapters.sites import bases as bases_module


class Linear8(nn.Module):
    """A linear whose weight is stored as 8-bit integers and one scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.store(linear.weight.data)

    def store(self, weight: Tensor) -> None:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("row_scale", scale)

    def dense(self) -> Tensor:
        return self.weight.float() * self.row_scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias)


class Backend8(QuantizationBackend):
    supports_merge = True
    layer_type = "linear"
    backend_name = "test 8bit"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        return base_layer.dense()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        peft_layer.get_base_layer().store(weight_data)


def quantised() -> nn.Module:
    model = opt()
    for block in model.model.decoder.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block.self_attn, name, Linear8(getattr(block.self_attn, name)))
    return model


def test_forward_merge_and_unmerge(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(base: nn.Module, **_: Any) -> Backend8 | None:
        return Backend8() if isinstance(base, Linear8) else None

    for module in (bases_module, dense_module, model_module):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)
    model = adapted("mixed", quantised())
    assert torch.equal(logits(model), logits(quantised()))
    model.add_adapter("second", model.peft_config["default"])
    shake(model, 1), shake(model, 2, "second")
    found = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter(["default"])
    merged = logits(model)
    assert float((merged - found).abs().max()) < 0.05 * float((found - logits(quantised())).abs().max())
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), found)
