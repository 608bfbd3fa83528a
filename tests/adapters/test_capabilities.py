"""What PEFT's own capability probe asks of a method, asked of ours: by doing it on one layer wherever it can be done.

PEFT reads some answers off the source of a tuner. The same readings are taken here, and what they claim is then done.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import peft
import pytest
import torch
from adapter_models import MODELS, NETWORKS, TARGETS, adapted, shake
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import quantization_utils
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tnpeft
from tnpeft.adapters import model as model_module
from tnpeft.adapters.constants import TENSOR_NETWORK
from tnpeft.adapters.layer import merging as dense_module
from tnpeft.adapters.layer.bank import FactorBank
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.adapters.sites import bases as bases_module

SIZE = 64
EPS = torch.finfo(torch.float32).eps
LAYERS = {
    "Linear": lambda: nn.Linear(SIZE, SIZE),
    "Conv1D": lambda: Conv1D(SIZE, SIZE),
    "Embedding": lambda: nn.Embedding(16, SIZE),
    "Conv1d": lambda: nn.Conv1d(SIZE, SIZE, 3),
    "Conv2d": lambda: nn.Conv2d(SIZE, SIZE, 3),
    "LayerNorm": lambda: nn.LayerNorm(SIZE),
    "MultiheadAttention": lambda: nn.MultiheadAttention(SIZE, num_heads=4),
}
REFUSED = ("LayerNorm", "MultiheadAttention")


def Host(layer: nn.Module) -> nn.Module:
    """A model of one layer."""
    return nn.Sequential(OrderedDict(layer=layer))


def tuner() -> type[BaseTuner]:
    return PEFT_TYPE_TO_TUNER_MAPPING[TENSOR_NETWORK]


def settings() -> peft.PeftConfig:
    return PEFT_TYPE_TO_CONFIG_MAPPING[TENSOR_NETWORK](target_modules=["layer"])


def host(kind: str = "Linear") -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(Host(LAYERS[kind]()), settings()).eval()


close = partial(oracles.close, least=0.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_can_be_targeted(kind: str) -> None:
    if kind not in REFUSED:
        assert any(isinstance(module, BaseTunerLayer) for module in host(kind).modules())
        return
    with pytest.raises(tnpeft.NetworkError, match=f"layer is a {kind}, not a linear"):
        host(kind)


def test_raw_parameters_are_not_claimed() -> None:
    assert "target_parameters" not in {field.name for field in dataclasses.fields(tnpeft.TensorNetworkConfig)}


def test_mixed_batches_weighted_sums_and_saved_modules() -> None:
    assert "_enable_peft_forward_hooks" in vars(tuner())
    body = ast.parse(textwrap.dedent(inspect.getsource(tuner().add_weighted_adapter))).body[0].body  # type: ignore[attr-defined]
    assert not isinstance(body[1], ast.Raise)
    assert "modules_to_save" in {field.name for field in dataclasses.fields(tnpeft.TensorNetworkConfig)}
    model = host()
    model.add_adapter("second", settings())
    shake(model, 1), shake(model, 2, "second")
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    x = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parts = [model(x, adapter_names=[name] * 3) for name in ("__base__", "default", "second", "sum")]
    assert close(parts[3] - parts[0], parts[1] + parts[2] - 2 * parts[0], 4 * SIZE)


# ---- conversion to LoRA


def test_the_probe_finds_lora_conversion() -> None:
    model = host()
    first = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    assert first.supports_lora_conversion("default")
    assert model.supports_lora_conversion()


@pytest.mark.parametrize("key", sorted(NETWORKS))
@pytest.mark.parametrize(("name", "rank"), [*((name, 16) for name in sorted(MODELS)), ("gpt2", 1 - 2.0**-20)])
def test_pefts_own_conversion_writes_the_same_model(name: str, key: str, rank: float, tmp_path: Path) -> None:
    model = adapted(key, MODELS[name](), target_modules=TARGETS[name])
    shake(model)
    peft.save_as_lora(tmp_path, model, rank=rank)
    assert any(isinstance(module, FactorBank) for module in model.modules())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT sets it itself for Conv1D
        again = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path)
    lost = 0.0 if isinstance(rank, int) else (1 - rank) ** 0.5  # the threshold is one of energy
    ours = {path: module for path, module in model.named_modules() if isinstance(module, TensorNetworkLinear)}
    for path, module in ours.items():
        theirs = again.get_submodule(path)
        assert theirs.r["default"] == rank if isinstance(rank, int) else theirs.r["default"] < 16
        delta = module.get_delta_weight("default")
        error = (theirs.get_delta_weight("default") - delta).norm()
        assert delta.norm() > 0
        assert error <= (lost + SIZE * EPS) * delta.norm()


def test_conversion_of_plain_and_injected_models_and_what_it_refuses() -> None:
    injected = peft.inject_adapter_in_model(settings(), Host(LAYERS["Linear"]()))
    _, state = peft.convert_to_lora(injected, rank=2)
    assert set(state) == {"layer.lora_A.weight", "layer.lora_B.weight"}
    lora = peft.get_peft_model(Host(LAYERS["Linear"]()), peft.LoraConfig(target_modules=["layer"]))
    with pytest.warns(UserWarning, match="already a LoRA"):
        peft.convert_to_lora(lora, rank=2)
    with pytest.raises(TypeError, match="Could not detect any layer"):
        peft.convert_to_lora(Host(LAYERS["Linear"]()), rank=2)


# ---- quantisation


def _backends() -> dict[str, QuantizationBackend]:
    """Each of PEFT's back ends by its name, without the library behind it."""
    found: dict[str, QuantizationBackend] = {}
    for kind in vars(quantization_utils).values():
        if not inspect.isclass(kind) or not issubclass(kind, QuantizationBackend) or kind is QuantizationBackend:
            continue
        if kind is quantization_utils.ForwardOnlyQuantizationBackend:
            found |= {name: kind(name) for name in ("aqlm", "eetq", "gptq", "awq", "inc")}
        else:
            found[kind.backend_name] = kind.__new__(kind)
    return found


BACKENDS = _backends()


class Packed(nn.Module):
    """A linear whose weight no one can read."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = SIZE
        self.bias = None
        self.qweight = nn.Parameter(torch.ones(SIZE, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


def test_the_probe_finds_every_quantisation_back_end() -> None:
    assert "resolve_quantization_backend" in inspect.getsource(sys.modules[tuner().__module__])
    assert set(BACKENDS) == {"bnb 8bit", "bnb 4bit", "hqq", "torchao", "aqlm", "eetq", "gptq", "awq", "inc"}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_quantised_layer_is_adapted_as_its_back_end_allows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(base: nn.Module, **_: Any) -> QuantizationBackend | None:
        return BACKENDS[name] if isinstance(base, Packed) else None

    for module in (bases_module, dense_module, model_module):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)
    model = peft.get_peft_model(Host(Packed()), settings())
    assert model.get_model_status().quantization_backend == name
    shake(model)
    x = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(1))
    delta = model.get_base_model().layer.get_delta_weight("default")
    assert close(model(x), x.flip(-1) + x @ delta.T, SIZE)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    rows = model.eval()(x, adapter_names=["__base__", "default"])
    assert close(rows, x.flip(-1) + torch.stack([0 * x[0], x[1] @ delta.T]), SIZE)
    if not BACKENDS[name].supports_merge:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(tnpeft.NetworkError, match=f"layer cannot be .* quantised with {name},"):
                merge()
        with pytest.raises(tnpeft.NetworkError, match="cannot be read"):
            peft.get_peft_model(Host(Packed()), tnpeft.TensorNetworkConfig(target_modules=["layer"], dora=True))
        assert close(model(x), x.flip(-1) + x @ delta.T, SIZE)
