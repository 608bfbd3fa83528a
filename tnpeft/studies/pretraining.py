"""The demo's backbone: a small OPT taught to name upright digits."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def pretrain_digits(folder: Path, sizes: Mapping[str, int], *, steps: int, batch: int, lr: float, seed: int) -> float:
    """Train a fresh OPT on upright digits and put it into ``folder``; its accuracy on the evaluation part."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    from tnpeft.studies.data import load
    from tnpeft.studies.digits import save_tokenizer
    from tnpeft.studies.protocol import Protocol
    from tnpeft.studies.scoring import Scorer, evaluate
    from tnpeft.studies.tasks import TASKS
    from tnpeft.studies.training import fit

    with new_folder(folder) as work:
        return _pretrain(work, sizes, steps, batch, lr, seed)


def _pretrain(work: Path, sizes: Mapping[str, int], steps: int, batch: int, lr: float, seed: int) -> float:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    save_tokenizer(work)
    tokenizer = AutoTokenizer.from_pretrained(work)
    torch.manual_seed(seed)
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), dropout=0.0, **sizes, **ids))
    protocol = Protocol(train=0, dev=1, eval=0, steps=steps, batch=batch, schedule="cosine", evaluate_every=steps)
    task = TASKS["digits_upright"]
    scorer = Scorer(task, tokenizer)
    splits = load(task).splits(seed, 0, 1)
    fit(model, scorer, splits, protocol, lr=lr, seed=seed)
    accuracy, _ = evaluate(scorer, model, scorer.encode(splits.eval))
    model.save_pretrained(work)
    try:
        os.replace(work, folder)
    except OSError:  # another process was first
        shutil.rmtree(work)
    return accuracy


def describe(folder: Path) -> dict[str, Any]:
    """Parameters and accuracy on upright digits of a backbone in ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tnpeft.studies.data import load
    from tnpeft.studies.scoring import Scorer, evaluate
    from tnpeft.studies.tasks import TASKS

    model, task = AutoModelForCausalLM.from_pretrained(folder), TASKS["digits_upright"]
    scorer = Scorer(task, AutoTokenizer.from_pretrained(folder))
    accuracy, _ = evaluate(scorer, model, scorer.encode(load(task).eval))
    return {"parameters": model.num_parameters(), "accuracy": accuracy}
