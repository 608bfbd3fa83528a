"""The page of features names tests that exist, and the few of them that stand nowhere else."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import MODELS, TARGETS, adapted, config, opt, shake

import tnpeft
from tnpeft.adapters import peft_patches

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "features.md"
ROWS = [
    re.split(r"\s*\|\s*", line.strip("| \n")) for line in PAGE.read_text(encoding="utf-8").splitlines() if "|" in line
]
ROWS = [row for row in ROWS if row[1:2] and row[1] in ("yes", "partly", "no")]


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip('`"'))
def test_every_yes_names_a_test_that_exists(row: list[str]) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", " ".join(row))
    assert bool(named) == (row[1] != "no")
    for file, function in named:
        assert function in functions(TESTS / file)


def test_the_page_is_whole() -> None:
    assert len(ROWS) >= 38
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_names_that_trl_sends_to_vllm(name: str) -> None:
    """TRL merges, drops names that hold the tuner's prefix, and takes the wrappers' names out of the others."""
    model = adapted("mixed", MODELS[name](), target_modules=TARGETS[name])
    model.add_adapter("second", model.peft_config["default"])
    model.merge_adapter(["default"])
    sent = [n for n, _ in model.named_parameters() if model.prefix not in n]
    plain = {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in sent}
    assert plain == {n for n, _ in MODELS[name]().named_parameters()}


@pytest.mark.parametrize("there", [None, "# Mine\n\nA text.\n\n## Tensor-network adapter\n\nold\n\n## More\n\nKept."])
def test_what_is_pushed_to_the_hub(there: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is the hub's if there is one; what PEFT and the adapters say of themselves is in it all the same."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    pushed: dict[str, bytes] = {}

    class Api:
        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": name})

        def create_commit(self, repo_id: str, operations: Any, **_: Any) -> str:
            pushed.update({item.path_in_repo: Path(item.path_or_fileobj).read_bytes() for item in operations})
            return repo_id

    def load(name: Any, **options: Any) -> ModelCard:
        if Path(name).is_file():
            return read(name, **options)
        if there is None:
            raise EntryNotFoundError("card not found")
        return ModelCard(there)

    read = ModelCard.load
    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(ModelCard, "load", load)
    model = adapted("mixed")
    model.add_adapter("second", config("lora"))
    shake(model)
    assert model.push_to_hub("me/adapter") == "me/adapter"
    files = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(pushed) == {"README.md", *files, *(f"second/{name}" for name in files)}
    assert b"U[out a] G[layer proj a b] V[b inp]" in pushed["adapter_config.json"]
    card = pushed["README.md"].decode()
    assert card.count("## Tensor-network adapter") == card.count("import peft, tnpeft") == 1
    parts = [
        card.index(text) for text in ("U[out a] G[layer proj a b] V[b inp]", "In `second`", "B[layer proj out r]")
    ]
    assert parts == sorted(parts)
    assert "library_name: peft" in card
    assert "old" not in card
    assert ("A text." in card, "## More\n\nKept." in card) == (bool(there), bool(there))


def test_a_card_of_other_adapters_is_left_to_peft(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("theirs")

    def upload(model: Any, folder: str) -> list[str]:
        return sorted(file.name for file in Path(folder).iterdir())

    model = peft.get_peft_model(opt(), peft.LoraConfig(target_modules=["q_proj"]))
    assert peft_patches._upload_with_card(upload, model, str(tmp_path)) == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "theirs"


@pytest.mark.parametrize("pattern", [{"v_proj": {"r": 2}}, {"v_proj": {"r": 2}, "q_proj": {"r": 3}}])
@pytest.mark.parametrize("family", ["lora", "loha", "vera", "lotr"])
def test_factors_by_rank_pattern(family: str, pattern: dict[str, dict[str, int]]) -> None:
    """Every entry of the factors comes back, whichever line of the pattern it belongs to."""
    rules = tnpeft.TensorNetworkConfig(network=family).factorization.lines
    bonds = {bond for rule in rules for bond in rule.network.bonds}
    ranks = {name: dict.fromkeys(bonds, its["r"]) for name, its in pattern.items()}
    targets = ["q_proj", "v_proj", "fc1"]
    model = peft.get_peft_model(
        opt(), tnpeft.TensorNetworkConfig(network=family, rank_pattern=ranks, target_modules=targets)
    )
    found = tnpeft.factors(model)
    kinds = {f.name: f.kind for r in model.peft_config["default"].factorization.lines for f in r.network.factors}
    trained = [name for name in found if kinds[re.split("[#@]", name)[0]] == "trainable"]
    new = {name: torch.randn_like(found[name]) for name in trained}
    tnpeft.set_factors(model, new)
    again = tnpeft.factors(model)
    assert new.keys() <= again.keys()
    assert all(torch.equal(again[name], value) for name, value in new.items())
    assert sum(v.numel() for v in new.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
