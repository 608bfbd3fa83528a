"""Embeddings and heads that hold one Parameter: one site, with one update in all of them."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import opt
from safetensors.torch import load_file
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration
from weight_kinds import shake

import tnpeft
from tnpeft.adapters.state import bank_of

LINES: dict[str, dict[str, Any]] = {
    "lora": {"network": "B[layer proj out r] A[layer proj r inp] -> layer proj out inp", "ranks": {"r": 3}},
    "cp": {"network": tnpeft.families.cp(3)},
    "slices": {"network": tnpeft.families.cara()},
    "hira": {"network": tnpeft.families.hira(2)},
}
SPECIAL = {"vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 0}
TARGETS = {"embedding": ["embed_tokens"], "head": ["lm_head"], "both": ["q_proj", "lm_head", "embed_tokens"]}


def attached(base: nn.Module, **options: Any) -> peft.PeftModel:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.get_peft_model(copy.deepcopy(base), tnpeft.TensorNetworkConfig(**options)).double()
    texts = [str(warning.message) for warning in said if warning.category is UserWarning]
    assert texts == [
        "lm_head and model.decoder.embed_tokens hold one Parameter: they are one site, and its update is in all of "
        "them; exclude_modules=['lm_head'] leaves lm_head as it is"
    ]
    return model


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("targets", TARGETS)
def test_a_tied_head_and_its_embedding_are_one_site(targets: str, line: str, tmp_path: Path) -> None:
    base, ids = opt(tie_word_embeddings=True).double(), torch.randint(3, 60, (2, 7))
    model = attached(base, **LINES[line], target_modules=TARGETS[targets])
    rows = tnpeft.explain(model).rows
    sites = [{row.site for row in rows if row.layer.endswith(path)} for path in ("embed_tokens", "lm_head")]
    assert sites[0] == sites[1] != set()
    assert tnpeft.explain(model).unmatched == {"default": ()}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    stored = sum(value.numel() for value in load_file(tmp_path / "adapter_model.safetensors").values())
    assert count == bank_of(model).layouts["default"].count() == stored  # and no weight of the embedding's own
    assert torch.allclose(model(ids).logits, base(ids).logits, rtol=0, atol=1e-13)
    shake(model, 0.2)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    dense = copy.deepcopy(base)
    with torch.no_grad():  # one Parameter, and the update in it
        for path, layer in model.get_base_model().named_modules():
            if hasattr(layer, "get_delta_weight") and path not in ("lm_head", "factor_bank"):
                dense.get_submodule(path).weight += layer.get_delta_weight("default")
    assert dense.lm_head.weight is dense.get_input_embeddings().weight
    found, wanted = model(ids).logits.detach(), dense(ids).logits.detach()
    size = 1e-10 * float(wanted.abs().max())
    assert torch.allclose(found, wanted, rtol=0, atol=size)
    assert not torch.allclose(found, base(ids).logits, rtol=0, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(ids).logits, found)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for its in (model, copied):
        its.merge_adapter()
        first, second = its.get_input_embeddings(), its.get_output_embeddings()
        assert first.get_base_layer().weight is second.get_base_layer().weight
        assert torch.allclose(its(ids).logits, found, rtol=0, atol=size)
    model.unmerge_adapter()
    assert embedding.get_base_layer().weight is head.get_base_layer().weight
    assert torch.equal(head.get_base_layer().weight, base.lm_head.weight)
    assert torch.equal(model(ids).logits, found)
    copied.unmerge_adapter()
    plain = copied.merge_and_unload()
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)


def test_the_gradient_is_that_of_the_tied_parameter() -> None:
    base, ids = opt(tie_word_embeddings=True).double(), torch.randint(3, 60, (2, 7))
    line = {"network": "D[layer proj out inp] -> layer proj out inp", "init": {"D": "zeros"}}
    model = attached(base, **line, target_modules=["embed_tokens"])
    for its in (model, base):
        its(ids, labels=ids).loss.backward()
    [found] = [p.grad for p in model.parameters() if p.requires_grad]
    assert torch.allclose(found.T, base.lm_head.weight.grad, rtol=0, atol=1e-12)
    shake(model, 0.2)
    mixed = model.eval()(ids, adapter_names=["default", "__base__"]).logits
    assert torch.allclose(mixed[0], model(ids[:1]).logits[0], rtol=0, atol=1e-10)
    assert torch.allclose(mixed[1], base.eval()(ids[1:]).logits[0], rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:lm_head and model.decoder.embed_tokens hold one Parameter")
def test_two_adapters_of_one_tied_site() -> None:
    base, ids = opt(tie_word_embeddings=True).double(), torch.randint(3, 60, (2, 7))
    model = attached(base, **LINES["lora"], target_modules=["embed_tokens"])
    model.add_adapter("second", tnpeft.TensorNetworkConfig(**LINES["cp"], target_modules=["lm_head"]))
    model.double()
    shake(model, 0.2)
    model.base_model.set_adapter(["default", "second"])
    both = model(ids).logits.detach()
    model.merge_adapter()
    weights = [m.get_base_layer().weight for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert weights[0] is weights[1]
    assert torch.allclose(model(ids).logits, both, rtol=0, atol=1e-10 * float(both.abs().max()))
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert not torch.allclose(model(ids).logits, both, rtol=0, atol=1e-3)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**SPECIAL, **sizes, tie_word_embeddings=True)).double().eval()


def bart() -> nn.Module:
    sizes = {f"{side}_{what}": 4 for side in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
    layers = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = BartConfig(**SPECIAL, **sizes, **layers, scale_embedding=True)
    return BartForConditionalGeneration(config).double().eval()


@pytest.mark.filterwarnings("ignore:.* hold one Parameter")
@pytest.mark.parametrize("targets", ["shared", "embed_tokens", "lm_head"])
@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_decoder_and_head(make: Any, targets: str) -> None:
    base, ids = make(), torch.randint(3, 60, (2, 7))
    config = tnpeft.TensorNetworkConfig(**LINES["lora"], target_modules=[targets])
    model = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    assert {row.site for row in tnpeft.explain(model).rows} == {"shared"}
    assert len(tnpeft.explain(model).rows) == 4
    shake(model, 0.2)
    dense = copy.deepcopy(base)
    with torch.no_grad():
        dense.get_input_embeddings().weight += model.get_input_embeddings().get_delta_weight("default")
    found, wanted = (its(input_ids=ids, decoder_input_ids=ids).logits for its in (model, dense))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10 * float(wanted.detach().abs().max()))
    model.merge_adapter()
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
    assert len({id(layer.get_base_layer().weight) for layer in layers}) == 1


def test_an_excluded_head_stays_as_it_was() -> None:
    base = opt(tie_word_embeddings=True)
    ids = torch.randint(3, 60, (2, 7))
    before = base(ids).logits.detach()
    options = {"target_modules": ["embed_tokens"], "exclude_modules": ["lm_head"]}
    model = peft.get_peft_model(base, tnpeft.TensorNetworkConfig(**LINES["lora"], **options))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = embedding.get_base_layer()
    assert own.weight is head.weight
    assert torch.equal(model(ids).logits, before)
    shake(model)
    wanted = model(ids).logits.detach()
    assert (wanted - before).abs().max() > 1e-3
    weight = head.weight
    model.merge_adapter()
    assert head.weight is weight is not own.weight
    assert torch.allclose(model(ids).logits, wanted, atol=1e-4)
    model.unmerge_adapter()
    assert own.weight is head.weight is weight
