"""The same LoRA through tnpeft and through PEFT.

{{ setting.model }} on SST-2, rank {{ setting.rank }} on q and v, {{ "{:,}".format(examples[0]) }} training examples,
batch {{ setting.protocol.batch }}, {{ setting.protocol.steps }} steps, learning rate {{ setting.lr }}, label words,
accuracy on the {{ examples[2] }} examples of the development set. From the same factors the first
{{ losses.curves["PEFT LoRA"] | length }} training losses differ by at most {{ "%.2g" % losses.largest_difference }}
({{ "within" if losses.agree else "not within" }} 0.0001).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch

from bench import driver
from tnpeft.studies import TASKS, Protocol, Scorer, backbones, methods
from tnpeft.studies.files import digest, write_json
from tnpeft.studies.running import training
from tnpeft.studies.runs import quiet
from tnpeft.studies.tasks.data import Splits, load
from tnpeft.studies.tasks.scoring import evaluate

RANK = ALPHA = 8
LR, SEED, LOSSES, TOLERANCE, POINT = 1e-3, 0, 20, 1e-4, 0.01
PROTOCOL = Protocol(
    targets=("q_proj", "v_proj"), train=1000, dev=100, eval=0, steps=125, batch=8, evaluate_every=25, max_length=96
)
OPTIONS = {
    "data": {"default": "../shared/data", "help": "folder with sst2/ (default: %(default)s)"},
    "model": "smollm2",
    "steps": PROTOCOL.steps,
    "work": {
        "type": Path,
        "default": Path("runs/compare_peft"),
        "help": "folder of trainings, which go on from there",
    },
    "short": {"action": "store_true", "help": "compare the first losses only, a minute"},
    "threads": 2,
}
PUBLISHED = {"compare_peft": ""}
EXACT = True
PEFT_ROW, OUR_METHOD = "PEFT LoRA", {"family": "lora", "args": {"rank": RANK, "alpha": ALPHA}}
ROWS = {  # name: method, whether PEFT's initial factors are copied in
    PEFT_ROW: ({"peft": "lora", "args": {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True}}, False),
    "tnpeft LoRA, PEFT's initial factors": (OUR_METHOD, True),
    "tnpeft LoRA, its own initial factors": (OUR_METHOD, False),
}


def attached(name: str, model: str, protocol: Protocol, work: Path) -> tuple[Any, Scorer]:
    """The backbone with a row's adapter, PEFT's start values in it if the row says so, and the scorer of the task."""
    method, copied = ROWS[name]
    torch.manual_seed(SEED)  # PEFT draws its start values from it
    base, words = backbones.load(model, head="words", classes=2, dtype=protocol.dtype, cache=work / "cache")
    ours = methods.attach(base, method, protocol.targets, classifier=False, seed=SEED)
    if copied:
        state = peft.get_peft_model_state_dict(attached(PEFT_ROW, model, protocol, work)[0])
        names = {".lora_A.weight": ".tnpeft_factors.A", ".lora_B.weight": ".tnpeft_factors.B"}
        renamed = {key.replace(old, new): state[key] for key in state for old, new in names.items() if old in key}
        found = peft.set_peft_model_state_dict(ours, renamed)
        assert len(renamed) == len(state), "PEFT's LoRA holds other arrays than A and B"
        assert not found.unexpected_keys, found.unexpected_keys
    return ours, Scorer(TASKS["sst2"], words, "words", protocol.max_length)


def first_losses(model: str, splits: Splits, protocol: Protocol, work: Path) -> dict[str, Any]:
    """The losses of the first steps, at a constant learning rate, of both from the same factors."""
    short, curves = replace(protocol, steps=LOSSES, evaluate_every=1, schedule="constant"), {}
    for name in list(ROWS)[:2]:
        adapted, scorer = attached(name, model, protocol, work)
        few = replace(splits, dev=splits.dev[:1])
        (course,), _ = training.fit(adapted, scorer, [few], short, lrs=[LR], seeds=[SEED])
        curves[name] = [loss for _, loss, *_ in course.curve]
    largest = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    return {"curves": curves, "largest_difference": largest, "agree": largest <= TOLERANCE}


def accuracy(model: str, splits: Splits, protocol: Protocol, work: Path, name: str, folder: Path) -> dict[str, Any]:
    """What one training reaches on SST-2's development set, at its best checkpoint."""
    adapted, scorer = attached(name, model, protocol, work)

    def say(step: int, steps: int, loss: float, dev: float) -> None:
        driver.told(f"{name}: step {step} of {steps}, loss {loss:.4f}, held-out {dev:.4f}")

    (best,), seconds = training.fit(
        adapted, scorer, [splits], protocol, lrs=[LR], seeds=[SEED], folder=folder / "checkpoints", progress=say
    )
    score, loss = evaluate(scorer, adapted, scorer.encode(splits.eval))
    found = {"parameters": methods.trainable(adapted)[0], "accuracy": score, "loss": loss}
    return {**found, "best_step": best.reported[0], "curve": best.curve, "seconds": round(seconds, 1)}


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, else what ``make`` gives, written to it."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def measure(options: driver.Options) -> dict[str, Any]:
    """Return the first losses and the accuracies; what is finished is taken from the work folder."""
    quiet()
    protocol = replace(PROTOCOL, steps=options.steps)
    splits = load(TASKS["sst2"], options.data).splits(SEED, protocol.train, protocol.dev, protocol.eval)
    setting = {"model": options.model, "protocol": asdict(protocol), "lr": LR, "seed": SEED, "rank": RANK}
    given, work = (options.model, splits, protocol, options.work), options.work / digest(setting)
    record = {"setting": setting, "examples": [len(splits.train), len(splits.dev), len(splits.eval)]}
    record["losses"] = kept(work / "losses.json", partial(first_losses, *given))
    if not options.short:
        folders = {name: work / digest(name) for name in ROWS}
        make = partial(accuracy, *given)
        found = {name: kept(at / "result.json", partial(make, name, at)) for name, at in folders.items()}
        gaps = {name: abs(row["accuracy"] - found[PEFT_ROW]["accuracy"]) for name, row in found.items()}
        record |= {"accuracy": found, "within_a_point": {name: gap <= POINT for name, gap in gaps.items()}}
    return record


def tables(data: Any) -> driver.Rows:
    """Yield a row for each adapter."""
    found = data.get("accuracy", {})
    for name, row in found.items():
        yield {
            "adapter": name,
            "parameters": row["parameters"],
            "accuracy": f"{100 * row['accuracy']:.2f} %",
            "difference": f"{100 * (row['accuracy'] - found[PEFT_ROW]['accuracy']):+.2f}",
            "loss": f"{row['loss']:.4f}",
        }
