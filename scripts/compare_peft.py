"""The same LoRA through tnpeft and through PEFT: SmolLM2-135M on SST-2, rank 8 on q and v, 1,000 examples.

Two questions. Started from the same factors, do the first training losses agree? And after a whole training with the
same data order and learning rate, is the accuracy on SST-2's development set the same? Each training is kept in the
work folder, goes on from its last evaluation if it was interrupted, and is not repeated once finished.

    python scripts/compare_peft.py --data DATA --losses          # the first question alone, a minute on two cores
    python scripts/compare_peft.py --data DATA                   # both
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import torch
from torch.nn.functional import cross_entropy

from tnpeft._text import Table
from tnpeft.studies import TASKS, Protocol, Scorer, backbones, methods
from tnpeft.studies.files import digest, write_json, write_text
from tnpeft.studies.running import training
from tnpeft.studies.runs import quiet, versions
from tnpeft.studies.tasks.data import Splits, load
from tnpeft.studies.tasks.scoring import evaluate

RANK = ALPHA = 8
LR = 1e-3
SEED = 0
LOSSES = 20
TOLERANCE, POINT = 1e-4, 0.01
PROTOCOL = Protocol(
    targets=("q_proj", "v_proj"), train=1000, dev=100, eval=0, steps=125, batch=8, evaluate_every=25, max_length=96
)
PEFT_ROW, OUR_METHOD = "PEFT LoRA", {"family": "lora", "args": {"rank": RANK, "alpha": ALPHA}}
ROWS = {  # name: method, whether PEFT's initial factors are copied in
    PEFT_ROW: ({"peft": "lora", "args": {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True}}, False),
    "tnpeft LoRA, PEFT's initial factors": (OUR_METHOD, True),
    "tnpeft LoRA, its own initial factors": (OUR_METHOD, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with sst2/ (default: %(default)s)")
    parser.add_argument("--model", default="smollm2", help="backbone (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=PROTOCOL.steps, help="of each training (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/compare_peft"), help="folder of unfinished trainings")
    parser.add_argument("--out", type=Path, default=Path("paper/tables"), help="folder of the results")
    parser.add_argument("--losses", action="store_true", help="compare the first losses only")
    args = parser.parse_args()
    quiet()
    protocol = replace(PROTOCOL, steps=args.steps)
    splits = load(TASKS["sst2"], args.data).splits(SEED, protocol.train, protocol.dev, protocol.eval)
    setting = {"model": args.model, "protocol": asdict(protocol), "lr": LR, "seed": SEED, "rank": RANK}
    record: dict[str, Any] = {"setting": setting, "examples": [len(splits.train), len(splits.dev), len(splits.eval)]}
    given, work = (args.model, splits, protocol, args.work), args.work / digest(setting)
    record["losses"] = kept(work / "losses.json", partial(first_losses, *given))
    publish(record, args.out)
    for name in ROWS if not args.losses else ():
        folder = work / digest(name)
        found = kept(folder / "result.json", partial(accuracy, name, *given, folder))
        record.setdefault("accuracy", {})[name] = found
        publish(record, args.out)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, else what ``make`` gives, written to it."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def attached(name: str, model: str, protocol: Protocol, cache: Path) -> tuple[Any, Scorer]:
    """The backbone with a row's adapter, PEFT's start values in it if the row says so, and the scorer of the task."""
    method, copied = ROWS[name]
    torch.manual_seed(SEED)  # PEFT draws its start values from it
    base, words = backbones.load(model, head="words", classes=2, dtype=protocol.dtype, cache=cache / "cache")
    ours = methods.attach(base, method, protocol.targets, classifier=False, seed=SEED)
    if copied:
        state = peft.get_peft_model_state_dict(attached(PEFT_ROW, model, protocol, cache)[0])
        names = {".lora_A.weight": ".tnpeft_factors.A", ".lora_B.weight": ".tnpeft_factors.B"}
        renamed = {key.replace(old, new): state[key] for key in state for old, new in names.items() if old in key}
        found = peft.set_peft_model_state_dict(ours, renamed)
        assert len(renamed) == len(state), "PEFT's LoRA holds other arrays than A and B"
        assert not found.unexpected_keys, found.unexpected_keys
    return ours, Scorer(TASKS["sst2"], words, "words", protocol.max_length)


def first_losses(model: str, splits: Splits, protocol: Protocol, cache: Path) -> dict[str, Any]:
    """The losses of the first steps, at a constant learning rate, of both from the same factors."""
    curves: dict[str, list[float]] = {name: [] for name in list(ROWS)[:2]}
    for name, curve in curves.items():
        adapted, scorer = attached(name, model, protocol, cache)
        optimizer = training.optimizer(adapted.train(), protocol, LR)
        for step in range(LOSSES):
            batch = scorer.collate(scorer.encode(splits.train[step * protocol.batch : (step + 1) * protocol.batch]))
            loss = cross_entropy(scorer.scores(adapted, batch), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
            print(f"{name}: step {step + 1}, loss {curve[-1]:.6f}", flush=True)
    largest = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    return {"curves": curves, "largest_difference": largest, "agree": largest <= TOLERANCE}


def accuracy(name: str, model: str, splits: Splits, protocol: Protocol, cache: Path, folder: Path) -> dict[str, Any]:
    """What one training reaches on SST-2's development set, at its best checkpoint."""
    adapted, scorer = attached(name, model, protocol, cache)

    def say(step: int, steps: int, loss: float, dev: float | None) -> None:
        print(f"{name}: step {step} of {steps}, loss {loss:.4f}, held-out {dev:.4f}", flush=True)

    (best,), seconds = training.fit(
        adapted, scorer, [splits], protocol, lrs=[LR], seeds=[SEED], folder=folder / "checkpoints", progress=say
    )
    score, loss = evaluate(scorer, adapted, scorer.encode(splits.eval))
    found = {"parameters": methods.trainable(adapted)[0], "accuracy": score, "loss": loss}
    return {**found, "best_step": best.step, "curve": best.curve, "seconds": round(seconds, 1)}


def publish(record: dict[str, Any], out: Path) -> None:
    """Write what is known so far as JSON and as a table."""
    record["versions"] = versions()
    losses, its = record["losses"], record["setting"]
    train, _, held = record["examples"]
    text = f"""# The same LoRA through tnpeft and through PEFT

{its["model"]} on SST-2, rank {RANK} on q and v, {train:,} training examples, batch {its["protocol"]["batch"]}, \
{its["protocol"]["steps"]} steps, learning rate {LR:g}, label words, \
accuracy on the {held} examples of the development set.

From the same factors the first {LOSSES} training losses differ by at most {losses["largest_difference"]:.2g} \
({"within" if losses["agree"] else "not within"} {TOLERANCE:g}).
"""
    if found := record.get("accuracy", {}):
        reference = found[PEFT_ROW]["accuracy"]
        record["within_a_point"] = {name: abs(row["accuracy"] - reference) <= POINT for name, row in found.items()}
        rows = (
            {
                "adapter": name,
                "parameters": row["parameters"],
                "accuracy": f"{100 * row['accuracy']:.2f} %",
                "difference": f"{100 * (row['accuracy'] - reference):+.2f}",
                "loss": f"{row['loss']:.4f}",
            }
            for name, row in found.items()
        )
        text += f"\n{Table.of(rows).markdown()}\n"
    write_json(out / "compare_peft.json", record)
    write_text(out / "compare_peft.md", text)


if __name__ == "__main__":
    main()
