"""TRL's own trainers, supervised and by preference, with a tensor network as the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import NETWORKS, library, logits, opt
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tnpeft

pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
WORDS = ["a", "good", "film", "and", "bad", "one", "that", "I", "saw", "was", "it"]


def words() -> PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    known = {word: place for place, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model: Any = opt()
    model.save_pretrained(tmp_path / "opt")
    words().save_pretrained(tmp_path / "opt")
    return tmp_path


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    common = {"output_dir": str(folder / "run"), "max_steps": 4, "per_device_train_batch_size": 4, "seed": 1}
    quiet = {"report_to": [], "use_cpu": True, "logging_steps": 1, "bf16": False, "disable_tqdm": True}
    return {**common, **quiet, "max_length": 16, "learning_rate": 0.05, **more}


def adapter(key: str) -> tnpeft.TensorNetworkConfig:
    return tnpeft.TensorNetworkConfig(**NETWORKS[key], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def trained(trainer: Any, folder: Path) -> list[float]:
    """The losses; what was saved is what was trained, and the backbone is as it was."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    found = trainer.accelerator.unwrap_model(trainer.model).eval()
    again = peft.PeftModel.from_pretrained(loaded(folder), folder / "adapter").eval()
    assert torch.equal(logits(again), logits(found))
    assert not torch.equal(logits(again), logits(loaded(folder)))
    assert all(torch.equal(p, before[name]) for name, p in found.named_parameters() if name in before)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def loaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "opt").eval()


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("key", ["mixed", "cp"])
def test_supervised(key: str, checkpoints: bool, folder: Path) -> None:
    trl = library("trl")
    texts = Dataset.from_dict({"text": ["a good film and a bad one", "that film I saw was good"] * 8})
    args = trl.SFTConfig(**settings(folder, gradient_checkpointing=checkpoints))
    trainer = trl.SFTTrainer(
        model=loaded(folder), processing_class=words(), train_dataset=texts, peft_config=adapter(key), args=args
    )
    losses = trained(trainer, folder)
    assert losses[-1] < losses[0]


def test_by_preference(folder: Path) -> None:
    """Without a second model: the reference is this one with its adapter off, so the first loss is log 2."""
    trl = library("trl")
    pair = {"prompt": "that film I saw", "chosen": "was a good one", "rejected": "was a bad one"}
    pairs = Dataset.from_list([pair] * 16)
    args = trl.DPOConfig(**settings(folder, gradient_checkpointing=False))
    trainer = trl.DPOTrainer(
        model=loaded(folder), processing_class=words(), train_dataset=pairs, peft_config=adapter("mixed"), args=args
    )
    losses = trained(trainer, folder)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
