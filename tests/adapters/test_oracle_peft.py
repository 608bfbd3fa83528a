"""PEFT's own layers as oracles: the same weights in, the same outputs, gradients and merged weights out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from adapter_models import Blocks
from torch import Tensor, nn

import tnpeft
from tnpeft.adapters.state import bank_of
from tnpeft.nn.init.philox import normal

PROJECTIONS = ("q_proj", "v_proj", "o_proj")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
Read = Callable[[nn.Module, Callable[[Tensor], Tensor]], dict[str, Tensor]]


def model(dtype: torch.dtype) -> nn.Module:
    """Two blocks of tall, wide and square linears, their weights from a fixed stream."""

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        return x + layer.o_proj(torch.tanh(layer.v_proj(torch.tanh(layer.q_proj(x)))))

    made = Blocks(run, q_proj=(16, 24), v_proj=(24, 16), o_proj=(16, 16)).to(dtype)
    for name, parameter in made.named_parameters():
        parameter.data.copy_(0.3 * draw(parameter.shape, "base", name))
    return made


def draw(shape: Any, *key: str) -> Tensor:
    return torch.from_numpy(normal(int(torch.Size(shape).numel()), *key)).reshape(tuple(shape))


@dataclass(frozen=True)
class Case:
    """A method in PEFT and here; ``read`` gives a PEFT layer's arrays (or their gradients) by our factors' names."""

    config: Callable[[], peft.PeftConfig]
    network: Any
    read: Read
    frozen: Callable[[nn.Module], dict[str, Tensor]] = lambda layer: {}
    fields: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = PROJECTIONS
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    backward: bool = True  # whether PEFT's gradient of a layer's input is right


def named(**names: str) -> Read:
    """Arrays by our factors' names, from PEFT's of the layer."""

    def read(layer: nn.Module, get: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        held = {label: getattr(layer, name)["default"] for label, name in names.items()}
        return {label: get(getattr(its, "weight", its)) for label, its in held.items()}

    return read


LORA = {"B": "lora_B", "A": "lora_A"}


def vera_frozen(layer: nn.Module) -> dict[str, Tensor]:
    """PEFT cuts one pair of matrices to the size of each linear."""
    return {
        "B": layer.vera_B["default"][: layer.out_features],
        "A": layer.vera_A["default"][:, : layer.in_features],
    }


def randlora(layer: nn.Module, get: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Our names on a wide linear end in T."""
    found = named(lam="randlora_lambda", gam="randlora_gamma")(layer, get)
    return {f"{label}T" if layer.out_features < layer.in_features else label: its for label, its in found.items()}


def miss(layer: nn.Module, get: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {"D": get(layer.miss_block["default"]).T}


def randlora_frozen(layer: nn.Module) -> dict[str, Tensor]:
    """PEFT flattens (n a) on B against (a n) on A, so that its B is ours with the entries relabelled."""
    t = "T" if layer.out_features < layer.in_features else ""
    (short, long), bases = sorted((layer.out_features, layer.in_features)), layer.num_bases
    b = layer.randlora_B["default"][:long, :bases]
    rank = b.shape[-1]
    return {
        f"B{t}": b.reshape(long, rank, bases).transpose(1, 2),
        f"A{t}": layer.randlora_A["default"][:, 0, :short],
    }


def gralora(layer: nn.Module, get: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """PEFT keeps ``A[i1, i2, (o1 a)]`` and ``B[o1, (i1 a), o2]``."""
    a, b = get(layer.gralora_A["default"]), get(layer.gralora_B["default"])
    k = len(a)
    return {
        "A": a.unflatten(2, (k, -1)).permute(2, 0, 3, 1),
        "B": b.unflatten(1, (k, -1)),
    }


def config(kind: str, **fields: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: getattr(peft, kind)(**{"target_modules": list(PROJECTIONS), **fields})


CASES = {
    "lora": Case(config("LoraConfig", r=4, lora_alpha=8), tnpeft.families.lora(rank=4, alpha=8), named(**LORA)),
    "rslora": Case(
        config("LoraConfig", r=4, lora_alpha=6, use_rslora=True),
        tnpeft.families.lora(rank=4, alpha=6, rslora=True),
        named(**LORA),
    ),
    "dora": Case(
        config("LoraConfig", r=4, lora_alpha=8, use_dora=True),
        tnpeft.families.lora(rank=4, alpha=8),
        named(**LORA, magnitude="lora_magnitude_vector"),
        fields={"dora": True},
    ),
    "vera": Case(
        config("VeraConfig", r=5),
        tnpeft.families.vera(rank=5),
        named(b="vera_lambda_b", d="vera_lambda_d"),
        vera_frozen,
    ),
    "lokr": Case(
        config("LoKrConfig", r=2, alpha=3, decompose_factor=2),
        tnpeft.families.lokr(rank=2, alpha=3, out=(2, None), inp=(2, None)),
        named(C="lokr_w1", P="lokr_w2_a", Q="lokr_w2_b"),
    ),
    "loha": Case(
        config("LoHaConfig", r=3, alpha=6),
        tnpeft.families.loha(rank=3, alpha=6),
        named(B1="hada_w1_a", A1="hada_w1_b", B2="hada_w2_a", A2="hada_w2_b"),
    ),
    "randlora": Case(
        config("RandLoraConfig", r=3, randlora_alpha=6),
        tnpeft.families.randlora(rank=3, alpha=6),
        randlora,
        randlora_frozen,
    ),
    "miss": Case(config("MissConfig", r=8), tnpeft.families.miss(rank=8), miss),
    "hira": Case(config("HiraConfig", r=4), tnpeft.families.hira(rank=4), named(B="hira_B", A="hira_A")),
    "gralora": Case(
        config("GraloraConfig", r=4, gralora_k=2, alpha=8), tnpeft.families.gralora(rank=4, k=2, alpha=8), gralora
    ),
    "c3a": Case(
        config("C3AConfig", block_size=8, target_modules=["q_proj", "o_proj"]),
        tnpeft.families.c3a(block=8, scale=1 / 16),
        named(K="c3a_kernel"),
        targets=("q_proj", "o_proj"),
        dtypes=(torch.float32,),
        backward=False,  # PEFT 0.21.2: the input gradient of its circular convolution fails torch's gradcheck
    ),
}
RUNS = [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]


def same(parameter: Tensor) -> Tensor:
    return parameter.detach()


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def pair(case: Case, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """PEFT's model with random factors, and ours with the same ones."""
    theirs = peft.get_peft_model(model(dtype), case.config()).to(dtype).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.3 * draw(parameter.shape, "adapter", name))
            if "magnitude" in name:
                parameter.data.abs_().add_(1)
    own = tnpeft.TensorNetworkConfig(network=case.network, target_modules=list(case.targets), **case.fields)
    ours = peft.get_peft_model(model(dtype), own).to(dtype).eval()
    copy_factors(case, theirs, ours)
    return theirs, ours


def layer_of(model: nn.Module, layer: int, proj: str) -> nn.Module:
    return model.get_base_model().get_submodule(f"layers.{layer}.{proj}")


def copy_factors(case: Case, theirs: nn.Module, ours: nn.Module) -> None:
    """By the public ``set_factors`` where the factor is trained, into the buffers where it is frozen."""
    found = {(k, p): case.read(layer_of(theirs, k, p), same) for k in range(2) for p in case.targets}
    values = {}
    for name, current in tnpeft.factors(ours).items():
        label = name.partition("#")[0]
        shape = current.shape[2:]
        rows = [
            [found[k, p][label] for p in case.targets if label in found[k, p] and found[k, p][label].shape == shape]
            for k in range(2)
        ]
        if rows[0]:
            values[name] = torch.stack([torch.stack(row) for row in rows])
    tnpeft.set_factors(ours, values)
    bank = bank_of(ours)
    for site_layout in bank.layouts["default"].site_layouts:
        theirs_layer = layer_of(theirs, site_layout.site.layer, site_layout.site.proj)
        for label, value in case.frozen(theirs_layer).items():
            bank.tnpeft_factors["default"].get(site_layout.parameters[label].key).copy_(value)
    for (k, p), arrays in found.items():
        if "magnitude" in arrays:
            layer_of(ours, k, p).tnpeft_magnitude["default"].data.copy_(arrays["magnitude"])


def assert_close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    scale = wanted.detach().norm()
    assert scale > 1e-4, f"{what} is empty"
    error = float((found - wanted).detach().norm() / scale)
    assert error <= tolerance, f"{what} is off by {error:.2e}"


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_outputs_gradients_and_merged_weights_of_every_layer(name, dtype):
    case, tolerance = CASES[name], TOLERANCE[dtype]
    models = pair(case, dtype)
    for number, proj in [(k, p) for k in range(2) for p in case.targets]:
        theirs, ours = (layer_of(each, number, proj) for each in models)
        where = f"{number}, {proj}"
        x = draw((2, 5, theirs.in_features), "x", where).to(dtype)
        loss = draw((2, 5, theirs.out_features), "loss", where).to(dtype)
        inputs = [x.clone().requires_grad_() for _ in models]
        outputs = [layer(x) for layer, x in zip((theirs, ours), inputs, strict=True)]
        assert (outputs[0] - theirs.get_base_layer()(x)).norm() > 0.01 * outputs[0].norm()
        assert_close(outputs[1], outputs[0], tolerance, f"output of {where}")
        for output in outputs:
            (output * loss).sum().backward()
        if case.backward:
            assert_close(inputs[1].grad, inputs[0].grad, tolerance, f"input gradient of {where}")
        for label, wanted in case.read(theirs, gradient).items():
            parameter = (
                ours.tnpeft_magnitude["default"]
                if label == "magnitude"
                else ours.tnpeft_factors["default"].get(label)
            )
            assert_close(gradient(parameter), wanted, tolerance, f"gradient of {label} at {where}")
    counts = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in models]
    assert counts[0] == counts[1] > 0  # of RandLoRA's gam and the like, too
    before = layer_of(models[1], 0, case.targets[0]).get_base_layer().weight.clone()
    merged = [each.merge_and_unload() for each in models]
    for place in [f"layers.{k}.{p}.weight" for k in range(2) for p in case.targets]:
        assert_close(*(each.get_parameter(place) for each in merged[::-1]), tolerance, f"merged {place}")
    assert not torch.equal(before, merged[1].get_parameter(f"layers.0.{case.targets[0]}.weight"))


def test_the_comparison_can_fail():
    theirs, ours = pair(CASES["lora"], torch.float64)
    x = draw((2, 16), "x")
    tnpeft.set_factors(ours, {name: value * (1 + 1e-6) for name, value in tnpeft.factors(ours).items()})
    with pytest.raises(AssertionError, match="output is off by"):
        assert_close(ours(x), theirs(x), TOLERANCE[torch.float64], "output")
