"""Training as users do it: Trainer with resume, checkpointing in both modes, compiling, transformers' own loading."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch._dynamo.testing
from adapter_models import NETWORKS, adapted, config, logits, opt, shake
from torch import Tensor
from watching import compiled

import tnpeft

KEYS = sorted(NETWORKS)


def graphs_of_steps(model: Any) -> list[int]:
    """Graphs after steps at three batch sizes, whose gradients are those of the model that is not compiled."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    faster = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    seen = []
    for rows, tokens in ((2, 7), (3, 9), (5, 4)):
        ids = torch.randint(2, 60, (rows, tokens), generator=torch.Generator().manual_seed(rows))
        grads = []
        for run in (model, faster):
            model.zero_grad()
            run(input_ids=ids).logits.square().sum().backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        seen.append(counter.frame_count)
        assert grads[0].keys() == grads[1].keys()
        for name, wanted in grads[0].items():
            assert (grads[1][name] - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    return seen


@cache
def backbone_graphs() -> list[int]:
    return graphs_of_steps(opt(layers=1).train())


@pytest.mark.parametrize("key", ["shared", "cp"])
def test_compiled_training_takes_no_more_graphs_than_the_backbone(key: str) -> None:
    """Forward and backward, the same gradients at every batch size, and nothing is compiled a second time."""
    model = adapted(key, opt(layers=1 + (key == "shared"))).train()
    shake(model)
    assert len(set(backbone_graphs())) == 1
    assert graphs_of_steps(model) == backbone_graphs()


@pytest.mark.parametrize("key", KEYS)
def test_one_dynamic_graph_when_compiled(key: str, tmp_path: Path) -> None:
    layers = 1 + (key == "shared")
    model = adapted(key, opt(layers))
    shake(model)
    run, graphs = compiled(model, dynamic=True)
    generator = torch.Generator().manual_seed(3)
    for rows, tokens in ((2, 7), (3, 9), (5, 4)):
        ids = torch.randint(2, 60, (rows, tokens), generator=generator)
        with torch.no_grad():
            wanted, found = model(input_ids=ids).logits, run(input_ids=ids).logits
        assert float((wanted - found).abs().max()) <= 1e-5
    assert len(graphs) == 1
    other = adapted(key, opt(layers))
    shake(other, 5)
    other.save_pretrained(tmp_path)
    tnpeft.hotswap(model, str(tmp_path))
    with torch.no_grad():
        found, wanted = run(input_ids=ids).logits, other(input_ids=ids).logits
    assert float((wanted - found).abs().max()) <= 1e-5
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [True, False])
def test_tokens_trained_beside_the_factors(tied: bool, tmp_path: Path) -> None:
    """Their rows of the embedding move and no other; files, merging, export and mixed batches hold them."""
    chosen, ids = [3, 7, 20], torch.arange(2, 58).reshape(4, 14)
    plain = opt(tie_word_embeddings=tied)
    model = adapted("mixed", opt(tie_word_embeddings=tied), trainable_token_indices=chosen)
    optimizer = torch.optim.SGD(tnpeft.parameter_groups(model, lr=0.5))
    for _ in range(2):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = logits(model.eval())
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(opt(tie_word_embeddings=tied), tmp_path / "ours")
    assert torch.equal(logits(again), found)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(plain))
    mixed = logits(again, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([found[0], logits(plain)[1]]))
    tnpeft.export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(opt(tie_word_embeddings=tied), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), found)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), found)
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in plain.named_modules()]
    rows = (merged.get_input_embeddings().weight != plain.get_input_embeddings().weight).any(dim=1)
    assert rows.nonzero().flatten().tolist() == chosen
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied


class _Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 16

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        ids = torch.randint(2, 60, (6,), generator=torch.Generator().manual_seed(k))
        return {"input_ids": ids, "labels": ids}


def _trainer(folder: Path, model: Any, steps: int, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=0.05,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, seed=0, logging_steps=100,
        gradient_checkpointing=True,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=_Data(), **options)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_takes_the_learning_rates_of_factors(tmp_path: Path) -> None:
    moved = []
    for rates in ({}, {"G": 4.0}):
        model = adapted("mixed", task_type="CAUSAL_LM", lr_multiplier=rates)
        start = tnpeft.factors(model)
        optimizer = torch.optim.SGD(tnpeft.parameter_groups(model, lr=0.1))
        _trainer(tmp_path, model, 1, optimizers=(optimizer, None)).train()
        moved.append({name: value - start[name] for name, value in tnpeft.factors(model).items()})
    torch.testing.assert_close(moved[1], {**moved[0], "G": 4 * moved[0]["G"]})
    assert any(value.any() for value in moved[0].values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", ["lora", "mixed"])
def test_trainer_stops_and_resumes_bit_for_bit(key: str, tmp_path: Path) -> None:
    whole = adapted(key, task_type="CAUSAL_LM")
    _trainer(tmp_path / "a", whole, 4).train()
    _trainer(tmp_path / "b", adapted(key, task_type="CAUSAL_LM"), 2).train()
    resumed = adapted(key, task_type="CAUSAL_LM")
    _trainer(tmp_path / "b", resumed, 4).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    start = tnpeft.factors(adapted(key))
    for name, value in tnpeft.factors(whole).items():
        assert torch.equal(tnpeft.factors(resumed)[name], value)
        assert not torch.equal(start[name], value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", KEYS)
def test_transformers_add_and_load_adapter(key: str, tmp_path: Path) -> None:
    model = opt()
    model.add_adapter(config(key), adapter_name="mine")
    shake(model, adapter="mine")
    found = logits(model)
    assert not torch.equal(found, logits(opt()))
    model.save_pretrained(tmp_path)
    again = opt()
    again.load_adapter(str(tmp_path), adapter_name="yours")
    assert torch.equal(logits(again), found)
    for name, value in tnpeft.factors(model, "mine").items():
        assert torch.equal(tnpeft.factors(again, "yours")[name], value)
    again.disable_adapters()
    assert torch.equal(logits(again), logits(opt()))
    again.enable_adapters()
    again.delete_adapter("yours")
    assert torch.equal(logits(again), logits(opt()))


def test_auto_classes_and_injection(tmp_path: Path) -> None:
    model = adapted("mixed", task_type="CAUSAL_LM")
    shake(model)
    opt().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    plain = peft.inject_adapter_in_model(config("mixed"), opt())
    assert torch.equal(logits(plain), logits(opt()))


def test_bias_and_modules_to_save(tmp_path: Path) -> None:
    model = adapted("lora", opt(tie_word_embeddings=False), bias="tensor_network_only", modules_to_save=["lm_head"])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(n.endswith("base_layer.bias") for n in names) == 4
    assert any("lm_head" in n for n in names)
    shake(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(opt(tie_word_embeddings=False), tmp_path)
    assert torch.equal(logits(again), logits(model))
