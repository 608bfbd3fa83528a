"""The page of features names tests that exist, and the few of them that stand nowhere else."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from adapter_models import MODELS, TARGETS, adapted, shake

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


def test_what_is_pushed_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    pushed: dict[str, bytes] = {}

    class Api:
        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": name})

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("theirs")

    def upload(_: Any, folder: str, name: str, **__: Any) -> str:
        pushed.update({file.name: file.read_bytes() for file in Path(folder).iterdir()})
        return name

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(peft.PeftModel, "_upload_modified_files", upload)
    model = adapted("mixed")
    shake(model)
    assert model.push_to_hub("me/adapter") == "me/adapter"
    assert set(pushed) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert b"U[out a] G[layer proj a b] V[b inp]" in pushed["adapter_config.json"]
