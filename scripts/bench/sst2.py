"""K runs on SST-2 in one pass against K runs in turn: real sentences, in batches as a study makes them.

Steps spread over an epoch are taken in turn: by every run alone, by packs of some of them, and by every run alone
with its batches padded as they come. All of it is the code of a sweep: the scores of two label words, passes of about
equal length, clipping, AdamW.

    python scripts/bench.py sst2 --data DATA --tokenizer TOKENIZER --clock cpu
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from bench import driver, models, replicas
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.running import training
from tnpeft.studies.running.batching import batches
from tnpeft.studies.tasks.data import Data, load
from tnpeft.studies.tasks.scoring import Scorer
from tnpeft.studies.tasks.task import TASKS

TITLE = "Runs on SST-2 in one pass"
ABOUT = """Steps in the same time over those of the runs in turn, each alone: above 1 is faster. A step is the scores
of two label words, forward, backward, clipping and AdamW of an adapter on q_proj and v_proj; sentences are SST-2's,
in a study's order, and go through the model in lots of about equal length, those of a run alone as those of a pack.
*As they come* is a run alone whose batches are padded to their longest sentence instead. {steps} steps spread over
an epoch of {train} sentences."""
FAMILIES = {name: f for name, f in replicas.FAMILIES.items() if name in ("lora r=8", "cp r=16")}
ORDERS = {"shuffled": False, "by length": True}
WAYS = {"alone": True, "as they come": False}  # whether batches are cut by length
OPTIONS = {
    "data": {"default": "", "help": "folder with sst2/train.jsonl.gz and sst2/dev.jsonl.gz, or the hub"},
    "tokenizer": {"default": "facebook/opt-125m", "help": "folder or name (default: %(default)s)"},
    "words": {"nargs": 2, "default": [" bad", " good"], "help": "of the labels, a token each"},
    "shapes": replicas.SHAPES,
    "families": {"nargs": "+", "choices": FAMILIES, "default": ["lora r=8"]},
    "batches": (8, 16),
    "orders": {"nargs": "+", "choices": ORDERS, "default": [*ORDERS]},
    "replicas": (2, 4, 8),
    "train": {"type": int, "default": 1000, "help": "sentences of an epoch"},
    "steps": 9,
    "samples": 3,
}


class Runs:
    """Runs that train in one pass; ``numbers`` are their seeds."""

    def __init__(
        self, scorer: Scorer, base: Any, f: Any, data: Data, protocol: Protocol, numbers: Sequence[int]
    ) -> None:
        self.scorer = scorer
        sizes = protocol.train, protocol.dev, protocol.eval
        self.rows = [scorer.encode(data.splits(k, *sizes).train) for k in numbers]
        lengths = [[len(row["ids"]) for row in rows] for rows in self.rows]
        orders = [batches(each, protocol, k) for each, k in zip(lengths, numbers, strict=True)]
        self.steps = [[*itertools.islice(order, protocol.steps)] for order in orders]
        config = models.network(f, 16 * protocol.batch, replicas.TARGETS, replicas=len(numbers))
        self.model = models.adapted(base, config).train()
        optimizer = training.optimizer(self.model, protocol, 1e-3)
        self.update = replicas.updater(self.model, optimizer, len(numbers))

    def step(self, at: int, cut: bool = True) -> None:
        """Take the step at a place of the epoch; a run alone may be padded to its longest row, not ``cut``."""
        if cut:
            training.backward(self.scorer, self.model, self.rows, [steps[at] for steps in self.steps])
        else:
            batch = self.scorer.collate([self.rows[0][k] for k in self.steps[0][at][0]])
            self.scorer.losses(self.model, batch).mean().backward()
        self.update()

    def tokens(self, at: int) -> tuple[int, int]:
        """Return the tokens of a run alone at a place: without padding, and padded as they come."""
        lengths = [len(self.rows[0][k]["ids"]) for k in self.steps[0][at][0]]
        return sum(lengths), len(lengths) * max(lengths)


def gains(make: Callable[[Sequence[int]], Runs], at: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Return the gain of each way to take the steps of the largest number of runs, in turn; for fewer, of these."""
    most = max(options.replicas)
    alone = [make([k]) for k in range(most)]
    ways = {f"{what} {k}": partial(its.step, cut=cut) for k, its in enumerate(alone) for what, cut in WAYS.items()}
    ways |= {f"pack {k}": make(range(k)).step for k in options.replicas}

    def turn(places: Sequence[int]) -> Counter[str]:
        spent: Counter[str] = Counter()
        for place, (name, step) in itertools.product(places, ways.items()):
            spent[name] += driver.stopwatch(partial(step, place), options.clock)()  # type: ignore[assignment]
        return spent

    turn(at[:1])
    rounds = [turn(at) for _ in range(options.samples)]

    def total(spent: Mapping[str, float], what: str, k: int) -> float:
        return sum(spent[f"{what} {number}"] for number in range(k))

    counted = [its.tokens(place) for place in at for its in alone]
    gain = {k: median(total(spent, "alone", k) / spent[f"pack {k}"] for spent in rounds) for k in options.replicas}
    return {
        "milliseconds": 1e3 * median(total(spent, "alone", most) for spent in rounds) / most / len(at),
        "tokens": round(sum(own for own, _ in counted) / len(counted)),
        "padded": round(sum(own for _, own in counted) / len(counted)),
        "cut": median(total(spent, "as they come", most) / total(spent, "alone", most) for spent in rounds),
        "gain": gain,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return every case; steps are spread evenly over the epoch, whose order by length begins with the longest."""
    from transformers import AutoTokenizer

    task = replace(TASKS["sst2"], words=dict(zip("01", options.words, strict=True)))
    scorer = Scorer(task, AutoTokenizer.from_pretrained(options.tokenizer), "words", 128)
    rows = []
    for shape, layers in options.shapes:
        fields = {"vocab_size": len(scorer.tokenizer), "pad_token_id": scorer.pad}
        base = models.backbone(shape, layers, causal=True, **fields)
        for family, batch, order in itertools.product(options.families, options.batches, options.orders):
            sizes = {"train": options.train, "dev": 1, "eval": 1, "steps": options.train // batch, "batch": batch}
            its = Protocol(**sizes, by_length=ORDERS[order])
            last, gaps = its.steps - 1, max(1, options.steps - 1)
            at = sorted({round(k * last / gaps) for k in range(options.steps)})
            row = {"shape": shape, "layers": layers, "family": family, "batch": batch, "order": order}
            make = partial(Runs, scorer, base, FAMILIES[family], load(task, options.data), its)
            rows.append({**row, **gains(make, at, options)})
            driver.progress(rows[-1])
    return {"cases": rows}


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each case."""
    return [
        {
            "backbone": f"{row['shape']}, {row['layers']} layers",
            "adapter": row["family"],
            "examples": f"{row['batch']} {row['order']}",
            "tokens": row["tokens"],
            "padded as they come": row["padded"],
            "ms alone": row["milliseconds"],
            "as they come": f"{1 / row['cut']:.2f}",
            **{f"K={k}": f"{gain:.2f}" for k, gain in row["gain"].items()},
        }
        for row in data["cases"]
    ]
