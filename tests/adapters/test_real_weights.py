"""Real weights and real sentences: SmolLM2-135M and MiniLM, adapted, saved, reloaded, merged; and beside PEFT."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bench import compare_peft
from torch import Tensor

import tnpeft

pytestmark = [
    pytest.mark.weights,
    pytest.mark.data,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
FAMILIES = {
    "lora": tnpeft.families.lora(rank=4),
    "cp": tnpeft.families.cp(rank=8),
    "lorta": tnpeft.families.lorta(rank=8),
    "lotr": tnpeft.families.lotr(rank=8),
}


@pytest.fixture(scope="module")
def sentences(data_dir: Path) -> list[str]:
    """Four of SST-2."""
    import gzip

    with gzip.open(data_dir / "sst2" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(next(lines))["sentence"] for _ in range(4)]


def through(make: Any, batch: dict[str, Tensor], output: str, targets: list[str], f: Any, tmp_path: Path) -> None:
    """Attach, train a step, save, reload, merge: the outputs are the same."""

    def out(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = getattr(model.eval()(**batch), output)
        return found

    plain = out(make())
    model = peft.get_peft_model(make(), tnpeft.TensorNetworkConfig(network=f, target_modules=targets))
    assert torch.equal(out(model), plain)
    optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, lr=0.03))
    torch.manual_seed(0)  # of dropout
    for _ in range(2):
        getattr(model.train()(**batch), output).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = out(model)
    moved = float((wanted - plain).abs().max())
    assert moved > 0
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(out(again), wanted)
    wanted = out(again.double())  # in fp32 outputs differ by rounding alone, which attention can amplify
    merged = out(again.merge_and_unload())
    assert float((merged - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert float((merged - wanted).abs().max()) < 1e-2 * moved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where SmolLM2 is unpacked, which takes longer than a test: one folder for all processes."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "smollm2"


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path, folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from tnpeft.studies import backbones

    cache = folder / "cache"
    return backbones.load("smollm2", head="words", classes=2, dtype="float32", cache=cache)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["lora", "lorta"])  # the others see grouped heads as lora does
def test_smollm2_with_its_grouped_heads(
    name: str, smollm2: tuple[Any, Any], sentences: list[str], tmp_path: Path
) -> None:
    model, words = smollm2
    batch = dict(words(sentences[:1], return_tensors="pt"))
    through(lambda: copy.deepcopy(model), batch, "logits", ["q_proj", "v_proj"], FAMILIES[name], tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_minilm_an_encoder(name: str, minilm_dir: Path, sentences: list[str], tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    batch = dict(AutoTokenizer.from_pretrained(minilm_dir)(sentences, return_tensors="pt", padding=True))

    def make() -> Any:
        return AutoModel.from_pretrained(minilm_dir)

    through(make, batch, "last_hidden_state", ["query", "value"], FAMILIES[name], tmp_path)


def test_first_losses_on_sst2_are_those_of_peft(
    data_dir: Path, smollm2_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_peft, "LOSSES", 6)
    its = compare_peft.PROTOCOL
    task = compare_peft.TASKS["sst2"]
    splits = compare_peft.load(task, str(data_dir)).splits(compare_peft.SEED, its.train, its.dev, its.eval)
    found = compare_peft.first_losses("smollm2", splits, its, folder)
    assert found["largest_difference"] <= compare_peft.TOLERANCE
    theirs, ours = found["curves"].values()
    assert len(theirs) == len(ours) == 6
    assert max(theirs) - min(theirs) > 0.1  # it trains
