"""Runs on SST-2 in one pass.

Steps in the same time over those of the runs in turn, each alone: above 1 is faster. A step is the scores of two
label words, forward, backward, clipping and AdamW of an adapter on q_proj and v_proj; sentences are SST-2's, in a
study's order, and go through the model in lots of about equal length, those of a run alone as those of a pack. *As
they come* is a run alone whose batches are padded to their longest sentence instead. {{ steps }} steps spread over
an epoch of {{ train }} sentences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, median
from typing import Any

from bench import driver, models, replicas
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.running import training
from tnpeft.studies.running.batching import batches
from tnpeft.studies.tasks.data import Data, load
from tnpeft.studies.tasks.scoring import Scorer
from tnpeft.studies.tasks.task import TASKS

ORDERS = {"shuffled": False, "by length": True}
WAYS = {"alone": True, "as they come": False}  # whether batches are cut by length
OPTIONS = {
    "data": {"default": "", "help": "folder with sst2/train.jsonl.gz and sst2/dev.jsonl.gz, or the hub"},
    "tokenizer": {"default": "facebook/opt-125m", "help": "folder or name (default: %(default)s)"},
    "words": {"nargs": 2, "default": [" bad", " good"], "help": "of the labels, a token each"},
    "shapes": replicas.SHAPES,
    "families": {"nargs": "+", "choices": ("lora r=8", "cp r=16"), "default": ["lora r=8"]},
    "batches": (8, 16),
    "orders": {"nargs": "+", "choices": ORDERS, "default": [*ORDERS]},
    "replicas": (2, 4, 8),
    "train": {"type": int, "default": 1000, "help": "sentences of an epoch"},
    "steps": 9,
    "samples": 3,
}
PUBLISHED = {"sst2": "--steps 7 --samples 3 --clock cpu"}


class Runs:
    """Runs that train in one pass; ``numbers`` are their seeds."""

    def __init__(
        self, scorer: Scorer, base: Any, title: str, data: Data, protocol: Protocol, numbers: Sequence[int]
    ) -> None:
        self.scorer = scorer
        sizes = protocol.train, protocol.dev, protocol.eval
        self.rows = [scorer.encode(data.splits(k, *sizes).train) for k in numbers]
        lengths = [[len(row["ids"]) for row in rows] for rows in self.rows]
        orders = [batches(each, protocol, k) for each, k in zip(lengths, numbers, strict=True)]
        self.steps = [[*itertools.islice(order, protocol.steps)] for order in orders]
        f = models.family(title)
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


def gains(make: Callable[[Sequence[int]], Runs], at: Sequence[int], options: driver.Options) -> dict[str, Any]:
    """Return the gain of each way to take the steps of the largest number of runs, in turn; for fewer, of these."""
    alone = [make([k]) for k in range(max(options.replicas))]
    ways = {(what, k): partial(its.step, cut=cut) for k, its in enumerate(alone) for what, cut in WAYS.items()}
    ways |= {("pack", k): make(range(k)).step for k in options.replicas}
    runs = {(*way, place): partial(step, place) for place in at for way, step in ways.items()}
    times = driver.interleaved(runs, options)

    def total(what: str, numbers: Iterable[int]) -> list[float]:
        return [sum(each) for each in zip(*(times[what, k, place] for k in numbers for place in at), strict=True)]

    every = range(len(alone))
    own, padded = zip(*(its.tokens(place) for place in at for its in alone), strict=True)
    return {
        "milliseconds": 1e3 * median(total("alone", every)) / len(alone) / len(at),
        "tokens": round(fmean(own)),
        "padded": round(fmean(padded)),
        "cut": driver.ratio(total("as they come", every), total("alone", every)),
        "gain": {k: driver.ratio(total("alone", range(k)), total("pack", [k])) for k in options.replicas},
    }


def measure(options: driver.Options) -> driver.Rows:
    """Yield every case; steps are spread evenly over the epoch, whose order by length begins with the longest."""
    from transformers import AutoTokenizer

    task = replace(TASKS["sst2"], words=dict(zip("01", options.words, strict=True)))
    scorer, data = (
        Scorer(task, AutoTokenizer.from_pretrained(options.tokenizer), "words", 128),
        load(task, options.data),
    )
    for shape, layers in options.shapes:
        fields = {"vocab_size": len(scorer.tokenizer), "pad_token_id": scorer.pad}
        base = models.backbone(shape, layers, causal=True, **fields)
        for family, batch, order in itertools.product(options.families, options.batches, options.orders):
            sizes = {"train": options.train, "dev": 1, "eval": 1, "steps": options.train // batch, "batch": batch}
            its = Protocol(**sizes, by_length=ORDERS[order])
            gaps = max(1, options.steps - 1)
            at = sorted({round(k * (its.steps - 1) / gaps) for k in range(options.steps)})
            make = partial(Runs, scorer, base, replicas.FAMILIES[family], data, its)
            row = {"shape": shape, "layers": layers, "family": family, "batch": batch, "order": order}
            yield row | gains(make, at, options)


def tables(data: Any) -> driver.Rows:
    """Yield a row for each case."""
    for its in data["cases"]:
        between = {
            "examples": f"{its['batch']} {its['order']}",
            "tokens": its["tokens"],
            "padded as they come": its["padded"],
            "ms alone": its["milliseconds"],
            "as they come": f"{1 / its['cut']:.2f}",
        }
        yield replicas.row(its, between)
