"""A dense oracle for every family on every architecture: weights replaced by base plus a plain einsum."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapter_models import MODELS, inputs
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D
from weight_kinds import dense

import tnpeft
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.layout import ParameterSpec
from tnpeft.networks import Factorization, NetworkError
from tnpeft.nn.init.philox import normal

# Attention and MLP, so that grouped queries, fused and transposed linears and both oblong shapes are among them.
TARGETS = {
    "opt": ["q_proj", "v_proj", "fc1", "fc2"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "bert": ["query", "value", "intermediate.dense", "output.dense"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
}
SQUARE = {"llama": ["q_proj", "o_proj"]}
NEEDS_SQUARES = {(family, "llama") for family in ("cara", "fact_tk", "fact_tt")}  # 48 is not a multiple of 32
NOT_IN_A_MODEL = {
    "lotra": "'basis' has no meaning in a model",
    "tuka": "'scene' has no meaning in a model",
    **{
        name: "'expert' has no meaning on q_proj"
        for name in tnpeft.families.names()
        if "expert" in tnpeft.families.get(name)().network.indices
    },
}
FAMILIES = [name for name in tnpeft.families.names() if name not in NOT_IN_A_MODEL]


@pytest.fixture(autouse=True)
def norms_in_double(monkeypatch):
    """Llama's norms round to fp32 inside, which in double turns the last bit of an input into errors of 1e-8."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def attach(family: str, architecture: str) -> tuple[nn.Module, nn.Module, Factorization]:
    """The base model, and an adapted copy with random trainable factors."""
    base = MODELS[architecture]().double()
    f = tnpeft.families.get(family)()
    model = _adapted(base, f, (SQUARE if (family, architecture) in NEEDS_SQUARES else TARGETS)[architecture])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                values = torch.from_numpy(normal(parameter.numel(), 0, name)).reshape(parameter.shape)
                parameter.copy_(0.5 * values)
    return base, model, f


def _adapted(base: nn.Module, f: Factorization, targets: list[str]) -> nn.Module:
    config = tnpeft.TensorNetworkConfig(network=f, target_modules=targets)
    return peft.get_peft_model(copy.deepcopy(base), config).double().eval()


def oracle(
    base: nn.Module, model: nn.Module, f: Factorization, values: dict[ParameterSpec, Tensor], batch: dict
) -> Tensor:
    """The base model's output with every adapted weight replaced."""
    weights: dict[str, Tensor] = {}
    for site_layout in bank_of(model).layouts["default"].site_layouts:
        site = site_layout.site
        linear = base.get_submodule(site.module)
        name = f"{site.module}.weight"
        turned = isinstance(linear, Conv1D)
        whole = weights.get(name, linear.weight.detach())
        whole = whole.T if turned and name not in weights else whole
        axis = 1 if "/inp:" in site.proj else 0
        length = site.inp if axis else site.out
        original = (linear.weight.detach().T if turned else linear.weight.detach()).narrow(axis, site.start, length)
        part = whole.narrow(axis, site.start, length) + dense(site_layout, values, f, original)
        before, after = (
            whole.narrow(axis, 0, site.start),
            whole.narrow(axis, site.start + length, whole.shape[axis] - site.start - length),
        )
        weights[name] = torch.cat([before, part, after], axis)
    for name in weights:
        if isinstance(base.get_submodule(name.removesuffix(".weight")), Conv1D):
            weights[name] = weights[name].T
    return functional_call(base, weights, (), batch).logits


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family, architecture, monkeypatch):
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", False)
    base, model, f = attach(family, architecture)
    batch = inputs(architecture)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    held = arrays(model, bank_of(model), "default")
    leaves = {
        piece: array.detach().clone().requires_grad_(piece.kind == "trainable") for piece, array in held.items()
    }
    wanted = oracle(base, model, f, leaves, batch)
    found = model(**batch).logits
    assert (wanted - base(**batch).logits).abs().max() > 1e-6
    # Updates of tiny models with random factors are large: errors are relative to what the outputs are made of.
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10 * float(wanted.detach().abs().max()))
    for output in (wanted, found):
        output.square().mean().backward()
    trained = {piece: leaf for piece, leaf in leaves.items() if piece.kind == "trainable"}
    total = torch.stack([leaf.grad.norm() for leaf in trained.values()]).norm()
    for piece, leaf in trained.items():
        assert (held[piece].grad - leaf.grad).norm() <= 1e-8 * leaf.grad.norm() + 1e-13 * total, piece


@pytest.mark.parametrize(("family", "architecture"), sorted(NEEDS_SQUARES))
def test_a_linear_that_has_no_square_slices_is_refused(family, architecture):
    with pytest.raises(NetworkError, match=r"up_proj \(48 x 32\) cannot be cut into squares"):
        _adapted(MODELS[architecture](), tnpeft.families.get(family)(), TARGETS[architecture])


@pytest.mark.parametrize("family", NOT_IN_A_MODEL)
def test_what_does_not_go_into_a_model_says_so(family):
    with pytest.raises(NetworkError, match=NOT_IN_A_MODEL[family]):
        _adapted(MODELS["opt"](), tnpeft.families.get(family)(), ["q_proj"])


def test_the_oracle_can_fail():
    base, model, f = attach("lora", "opt")
    held = arrays(model, bank_of(model), "default")
    values = {piece: array.detach() for piece, array in held.items()}
    first = next(iter(values))
    wrong = {**values, first: values[first] * (1 + 1e-6)}
    batch = inputs("opt")
    right, off = (oracle(base, model, f, v, batch).detach() for v in (values, wrong))
    assert torch.allclose(model(**batch).logits.detach(), right, rtol=0, atol=1e-10 * float(right.abs().max()))
    assert not torch.allclose(off, right, rtol=0, atol=1e-10 * float(right.abs().max()))
