"""The demo's backbone: a small OPT taught to name upright digits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tnpeft.studies.data import load
from tnpeft.studies.digits import save_tokenizer
from tnpeft.studies.files import new_folder
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.scoring import Scorer, evaluate
from tnpeft.studies.tasks import TASKS


def pretrain_digits(folder: Path, sizes: Mapping[str, int], *, steps: int, batch: int, lr: float, seed: int) -> float:
    """The accuracy on upright digits, seen in no training, of a fresh OPT that is trained and put into ``folder``."""
    import torch
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    from tnpeft.studies.training import fit

    task = TASKS["digits_upright"]
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    protocol = Protocol(train=0, dev=1, eval=0, steps=steps, batch=batch, schedule="cosine", evaluate_every=steps)
    with new_folder(folder) as work:
        save_tokenizer(work)
        tokenizer = AutoTokenizer.from_pretrained(work)
        torch.manual_seed(seed)
        model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), dropout=0.0, **sizes, **ids))
        scorer, splits = Scorer(task, tokenizer), load(task).splits(seed, 0, 1)
        fit(model, scorer, splits, protocol, lr=lr, seed=seed)
        model.save_pretrained(work)
    return evaluate(scorer, model, scorer.encode(splits.eval))[0]
