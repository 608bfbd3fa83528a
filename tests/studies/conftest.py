"""A tiny backbone with the digits' tokenizer, and a study over it that takes seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an OPT of width 16 with fresh weights."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    from tnpeft.studies.digits import save_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "opt"
    save_tokenizer(folder)
    sizes: dict[str, Any] = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=95, num_attention_heads=2, max_position_embeddings=32, dropout=0.0, **sizes, **ids)
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def table(tiny: Path) -> dict[str, Any]:
    """A study of five cells, two seeds, nine runs."""
    return {
        "name": "tiny",
        "backbone": str(tiny),
        "tasks": ["digits_upright"],
        "seeds": [0, 1],
        "protocol": {
            "targets": ["q_proj", "v_proj"],
            "train": 64,
            "dev": 32,
            "eval": 64,
            "steps": 4,
            "batch": 8,
            "evaluate_every": 2,
            "learning_rates": [1e-2],
        },
        "methods": [
            {"label": "LoRA", "family": "lora", "grid": {"rank": [1, 2]}},
            {"label": "CP", "family": "cp", "args": {"rank": 3}, "learning_rates": [1e-2, 1e-1]},
            {"label": "none", "none": True, "protocol": {"steps": 0}},
        ],
    }


@pytest.fixture
def ray(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Ray on this machine; ended after the test, so that no process of it stays."""
    if find_spec("ray") is None:
        reason = "Ray is not installed: pip install --constraint constraints.txt 'tnpeft[ray]'"
        if os.environ.get("TNPEFT_CI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    import ray as library

    here = sys.modules[request.module.__name__]  # which the workers cannot import
    library.cloudpickle.register_pickle_by_value(here)
    yield library
    library.cloudpickle.unregister_pickle_by_value(here)
    library.shutdown()
