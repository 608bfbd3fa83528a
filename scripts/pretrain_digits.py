"""Pretrain the ten frozen digits backbones: small OPTs that differ in their seed and name upright handwritten digits.

Writes ``tnpeft/studies/weights/``: ``digits-K.safetensors`` (float16, which is what they are from then on),
the configuration, the tokenizer and ``digits.toml`` with the hash of each. These files define the backbones; another
machine or library version that runs this again gets others, so that results on them cannot be mixed with these.

    python scripts/pretrain_digits.py
    python scripts/pretrain_digits.py 3 4
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from tnpeft.studies import digits, packaged
from tnpeft.studies.files import read_toml, write_text
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.running.training import fit
from tnpeft.studies.runs import versions
from tnpeft.studies.tasks.data import load
from tnpeft.studies.tasks.scoring import Scorer, evaluate
from tnpeft.studies.tasks.task import TASKS

WEIGHTS = packaged.WEIGHTS
STEPS, BATCH, RATE = 500, 64, 2e-3


def pretrain(seed: int, folder: Path) -> float:
    """Return the accuracy on upright digits that were seen in no training, of the model that is put into a folder."""
    task, ids = TASKS["digits_upright"], {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    protocol = Protocol(train=0, dev=1, eval=0, steps=STEPS, batch=BATCH, schedule="cosine", evaluate_every=STEPS)
    digits.save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), dropout=0.0, **packaged.DIGITS_SHAPE, **ids))
    scorer, splits = Scorer(task, tokenizer), load(task).splits(seed, 0, 1)
    fit(model, scorer, [splits], protocol, lrs=[RATE], seeds=[seed])
    model = model.half()  # what is kept is what is judged
    model.save_pretrained(folder)
    return evaluate(scorer, model.float(), scorer.encode(splits.eval))[0]


def main() -> None:
    torch.use_deterministic_algorithms(True)
    path = WEIGHTS / "digits.toml"
    table = read_toml(path) if path.exists() else {}
    for seed in map(int, sys.argv[1:] or range(packaged.DIGITS_COUNT)):
        weights = WEIGHTS / f"digits-{seed}.safetensors"
        with tempfile.TemporaryDirectory() as made:
            accuracy = pretrain(seed, Path(made))
            save_file(load_file(Path(made) / "model.safetensors"), weights, {"format": "pt"})
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                text = (Path(made) / name).read_text(encoding="utf-8").replace('"float16"', '"float32"')
                write_text(WEIGHTS / name, text.rstrip() + "\n")
        digest = packaged.file_hash(weights)
        table[str(seed)] = {"sha256": digest, "accuracy": round(accuracy, 4), "torch": versions()["torch"]}
        print(f"digits:{seed}: {accuracy:.1%} of upright digits, {digest}", flush=True)
    text = "# Ten frozen backbones by seed: hash of the weights, accuracy on upright digits not trained on.\n"
    for seed in sorted(table, key=int):
        text += f"\n[{seed}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table[seed].items())
    write_text(path, text)


if __name__ == "__main__":
    main()
