"""Quantised bases of bitsandbytes, torchao and hqq themselves, on a processor: forward, gradients, merging, files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import peft
import pytest
import torch
from adapter_models import config, inputs, library, logits, shake
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OPTConfig, OPTForCausalLM, TorchAoConfig

import tnpeft
from tnpeft.adapters.layer.linear import TensorNetworkLinear

pytestmark = [
    pytest.mark.libraries,
    pytest.mark.filterwarnings("ignore"),  # which the libraries have a lot of
]

TARGETS = ("q_proj", "v_proj")
WIDTH = 64  # of which the 4-bit kernels take multiples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OPT on disk, which transformers quantises as it loads it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 2 * WIDTH, "num_hidden_layers": 2}
    options = {"num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 32, "dropout": 0.0}
    path = tmp_path_factory.mktemp("opt")
    OPTForCausalLM(OPTConfig(**sizes, **options)).save_pretrained(path)
    return path


def bitsandbytes(packs: bool = False, **options: Any) -> Callable[[Path], nn.Module]:
    def load(folder: Path) -> nn.Module:
        library("bitsandbytes")
        model = loaded(folder, quantization_config=BitsAndBytesConfig(**options))
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # after inference such a linear cannot be trained
                module.support_avx512bf16_for_cpu &= packs
        return model

    return load


def torchao(folder: Path) -> nn.Module:
    library("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return loaded(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


def hqq(bits: int) -> Callable[[Path], nn.Module]:
    def load(folder: Path) -> nn.Module:
        library("hqq")
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        model = loaded(folder)
        how = BaseQuantizeConfig(nbits=bits, group_size=64)
        for block in model.model.decoder.layers:
            for name in TARGETS:
                linear = getattr(block.self_attn, name)
                new = HQQLinear(linear, how, compute_dtype=torch.float32, device="cpu", del_orig=False)
                setattr(block.self_attn, name, new)
        return model

    return load


def loaded(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options).eval()


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BASES: dict[str, Callable[[Path], nn.Module]] = {
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": bitsandbytes(**_NF4),
    "bitsandbytes fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bitsandbytes nf4, nested": bitsandbytes(**_NF4, bnb_4bit_use_double_quant=True),
    "torchao int8": torchao,
    "hqq 4 bits": hqq(4),
    "hqq 8 bits": hqq(8),
}


def adapted(kind: str, folder: Path, key: str = "mixed", **changes: Any) -> Any:
    model = peft.get_peft_model(BASES[kind](folder), config(key, target_modules=list(TARGETS), **changes))
    shake(model)
    return model


def linears(model: nn.Module) -> list[TensorNetworkLinear]:
    found = [module for module in model.modules() if isinstance(module, TensorNetworkLinear)]
    assert len(found) == 4
    return found


def rows(requires_grad: bool = False) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_(requires_grad)


close = partial(oracles.close, roundings=4 * WIDTH)


@pytest.mark.parametrize("kind", BASES)
def test_the_update_is_added_and_its_gradients_flow(kind: str, folder: Path) -> None:
    """Of the output, of the input's gradient and of the factors' gradients what the update adds is exact."""
    model = adapted(kind, folder)
    for layer in linears(model):
        delta = layer.get_delta_weight("default")
        x, plain, seed = rows(True), rows(True), torch.linspace(-1, 1, 5 * WIDTH).reshape(5, WIDTH)
        base = layer.base_layer.train()(plain)
        base.backward(seed)
        found = layer.train()(x)
        found.backward(seed)
        assert delta.abs().max() > 0.01
        assert close(found, base + rows() @ delta.T)
        assert close(x.grad, plain.grad + seed @ delta)
        (item,) = layer.updates["default"]
        dense = [operand.detach().requires_grad_() for operand in layer.operands("default", item)]
        (rows() @ item.program.delta(dense, item.scale).T).backward(seed)
        factors = [layer.owner(o).tnpeft_factors["default"].get(o.key) for o in item.operands]
        for factor, wanted in zip(factors, dense, strict=True):
            assert close(factor.grad, wanted.grad)
            factor.grad = None


@pytest.mark.parametrize("kind", BASES)
def test_merging_quantises_the_sum_and_unmerging_restores_the_bits(kind: str, folder: Path) -> None:
    model = adapted(kind, folder)
    found, plain = logits(model), logits(BASES[kind](folder))
    layers = linears(model)
    before = [layer.get_base_weight().clone() for layer in layers]
    sums = [weight + layer.get_delta_weight("default") for weight, layer in zip(before, layers, strict=True)]
    model.merge_adapter()
    moved = float((found - plain).abs().max())
    assert float((logits(model) - found).abs().max()) < 0.25 * moved
    for layer, total in zip(layers, sums, strict=True):
        lost = (layer.get_base_weight() - total).norm()
        assert 0 < lost < 0.2 * layer.get_delta_weight("default").norm()
    merged = logits(model)
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_weight(), w) for layer, w in zip(layers, before, strict=True))
    assert torch.equal(logits(model), found)
    kinds = [type(layer.base_layer) for layer in layers]
    unloaded = model.merge_and_unload()
    assert not any(isinstance(module, TensorNetworkLinear) for module in unloaded.modules())
    assert [type(getattr(b.self_attn, n)) for b in unloaded.model.decoder.layers for n in TARGETS] == kinds
    assert torch.equal(logits(unloaded), merged)


@pytest.mark.parametrize("kind", BASES)
def test_the_same_factors_in_pefts_lora_give_the_same_model(kind: str, folder: Path) -> None:
    ours = adapted(kind, folder, "lora")
    lora = peft.LoraConfig(r=3, lora_alpha=3, target_modules=list(TARGETS))
    theirs = peft.get_peft_model(BASES[kind](folder), lora).eval()
    layers = [module for module in theirs.modules() if hasattr(module, "lora_A")]
    for mine, layer in zip(linears(ours), layers, strict=True):
        layer.lora_A["default"].weight.data = mine.tnpeft_factors["default"].get("A").data.clone()
        layer.lora_B["default"].weight.data = mine.tnpeft_factors["default"].get("B").data.clone()
    assert close(logits(ours), logits(theirs))
    ours.merge_adapter()
    theirs.merge_adapter()
    for mine, layer in zip(linears(ours), layers, strict=True):
        weight = layer.get_base_weight() if layer.quantization_backend else mine.quantization_backend.get_base_weight(
            layer.get_base_layer()
        )  # fmt: skip
        # rounding may put an element on the other side of a step
        assert (mine.get_base_weight() - weight).abs().gt(1e-6).float().mean() < 0.01


@pytest.mark.parametrize("kind", BASES)
def test_trained_saved_and_loaded(kind: str, folder: Path, tmp_path: Path) -> None:
    model = adapted(kind, folder)
    ids = inputs()["input_ids"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        losses.append(model.train()(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    found = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(BASES[kind](folder), tmp_path)
    assert torch.equal(logits(again), found)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(BASES[kind](folder)))


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind.startswith("bitsandbytes")])
def test_prepared_for_training_as_pefts_guide_says(kind: str, folder: Path) -> None:
    """With checkpointed layers, and factors that several of them share."""
    base = peft.prepare_model_for_kbit_training(BASES[kind](folder))
    model = peft.get_peft_model(base, config("shared", target_modules=list(TARGETS)))
    shake(model)
    ids = inputs()["input_ids"]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() > 0 for grad in grads.values())
    model.zero_grad()
    base.gradient_checkpointing_disable()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(close(p.grad, grads[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", BASES)
def test_what_reads_the_weight(kind: str, folder: Path) -> None:
    """Magnitudes and a start from the base weight."""
    plain = logits(BASES[kind](folder))
    dora = peft.get_peft_model(BASES[kind](folder), config("lora", dora=True, target_modules=list(TARGETS)))
    assert close(logits(dora), plain)
    shake(dora)
    assert not close(logits(dora), plain)
    svd = tnpeft.TensorNetworkConfig(network=tnpeft.families.lora_xs(rank=4), target_modules=list(TARGETS))
    model = peft.get_peft_model(BASES[kind](folder), svd)
    for layer in linears(model):
        weight = layer.get_base_weight().float()
        wanted = torch.linalg.svdvals(weight)[:4]
        u = layer.tnpeft_factors["default"].get("U")
        assert torch.allclose((u.T @ weight).norm(dim=1), wanted * u.norm(dim=0), rtol=1e-3)


def test_weights_that_bitsandbytes_has_repacked_for_inference(folder: Path) -> None:
    """Some processors have the kernel; PEFT's own back end then reads the weight wrongly."""
    library("bitsandbytes")
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("the processor has no such kernel")
    model = peft.get_peft_model(bitsandbytes(packs=True, **_NF4)(folder), config("mixed", target_modules=[*TARGETS]))
    shake(model)
    layers = linears(model)
    before = [layer.get_base_weight().clone() for layer in layers]
    found = logits(model)
    assert all(layer.base_layer.weight.quant_state.packing_format_for_cpu for layer in layers)
    for layer, weight in zip(layers, before, strict=True):
        assert (layer.get_base_weight() - weight).norm() <= 2**-8 * weight.norm()
    model.merge_adapter()
    with torch.no_grad():
        plain = logits(bitsandbytes(packs=True, **_NF4)(folder))
    assert float((logits(model) - found).abs().max()) < 0.25 * float((found - plain).abs().max())
    model.unmerge_adapter()
    assert torch.equal(logits(model), found)
