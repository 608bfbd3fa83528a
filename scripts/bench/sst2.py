"""Runs on SST-2 in one pass.

Steps in the same time over those of the runs in turn, each alone: above 1 is faster. A step is the scores of two
label words, forward, backward, clipping and AdamW of an adapter on q_proj and v_proj; sentences are SST-2's, in a
study's order, and go through the model in lots of about equal length, those of a run alone as those of a pack. *As
they come* is a run alone whose batches are padded to their longest sentence instead. {{ steps }} steps spread over
an epoch of {{ train }} sentences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, median
from typing import Any

from transformers import AutoTokenizer

from bench import driver, models, replicas
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.running import training
from tnpeft.studies.tasks.data import Data, load
from tnpeft.studies.tasks.scoring import Scorer
from tnpeft.studies.tasks.task import TASKS

OPTIONS = {
    "data": {"default": "", "help": "folder with sst2/train.jsonl.gz and sst2/dev.jsonl.gz, or the hub"},
    "tokenizer": {"default": "facebook/opt-125m", "help": "folder or name (default: %(default)s)"},
    "words": {"nargs": 2, "default": [" bad", " good"], "help": "of the labels, a token each"},
    "shapes": replicas.SHAPES,
    "families": ("lora rank=8",),
    "batches": (8, 16),
    "orders": ("shuffled", "by length"),
    "replicas": (2, 4, 8),
    "train": 1000,
    "steps": 9,
    "samples": 3,
}
PUBLISHED = {"sst2": "--steps 7 --samples 3 --clock cpu"}


class Runs:
    """Runs that train in one pass; ``seeds`` are theirs."""

    def __init__(
        self, scorer: Scorer, base: Any, title: str, data: Data, protocol: Protocol, seeds: Sequence[int]
    ) -> None:
        self.scorer, sizes = scorer, (protocol.train, protocol.dev, protocol.eval)
        self.rows = [scorer.encode(data.splits(seed, *sizes).train) for seed in seeds]
        lengths = [[len(row["ids"]) for row in rows] for rows in self.rows]
        orders = [training.batches(each, protocol, seed) for each, seed in zip(lengths, seeds, strict=True)]
        self.steps = [[*itertools.islice(order, protocol.steps)] for order in orders]
        config = models.config(title, 16 * protocol.batch, replicas.TARGETS, replicas=len(seeds))
        self.model = models.adapted(base, config).train()
        self.update = replicas.updater(self.model, training.optimizer(self.model, protocol, 1e-3), len(seeds))

    def step(self, at: int) -> None:
        """Take the step at a place of the epoch."""
        training.backward(self.scorer, self.model, self.rows, [steps[at] for steps in self.steps])
        self.update()

    def padded(self, at: int) -> None:
        """Take that of a run alone, padded to its longest row."""
        self.scorer.losses(self.model, self.scorer.collate(self.batch(at))).mean().backward()
        self.update()

    def batch(self, at: int) -> list[dict[str, Any]]:
        """Return the rows of a run alone at a place."""
        return [self.rows[0][k] for k in self.steps[0][at][0]]


def gains(make: Callable[[Sequence[int]], Runs], at: Sequence[int], options: driver.Options) -> dict[str, Any]:
    """Return the gain of each way to take the steps of the largest number of runs, in turn; for fewer, of these."""
    alone = [make([k]) for k in range(max(options.replicas))]
    ways = {("alone", k): its.step for k, its in enumerate(alone)}
    ways |= {("as they come", k): its.padded for k, its in enumerate(alone)}
    ways |= {("pack", k): make(range(k)).step for k in options.replicas}
    times = driver.interleaved({(*way, k): partial(step, k) for k in at for way, step in ways.items()}, options)

    def total(what: str, numbers: Sequence[int]) -> list[float]:
        return [sum(each) for each in zip(*(times[what, k, place] for k in numbers for place in at), strict=True)]

    every = range(len(alone))
    lengths = [[len(row["ids"]) for row in its.batch(place)] for place in at for its in alone]
    return {
        "milliseconds": 1e3 * median(total("alone", every)) / len(alone) / len(at),
        "tokens": round(fmean(map(sum, lengths))),
        "padded": round(fmean(len(each) * max(each) for each in lengths)),
        "cut": driver.ratio(total("as they come", every), total("alone", every)),
        "gain": {k: driver.ratio(total("alone", range(k)), total("pack", [k])) for k in options.replicas},
    }


def measure(options: driver.Options) -> driver.Rows:
    """Yield every case; steps are spread evenly over the epoch, whose order by length begins with the longest."""
    task = replace(TASKS["sst2"], words=dict(zip("01", options.words, strict=True)))
    scorer = Scorer(task, AutoTokenizer.from_pretrained(options.tokenizer), "words", 128)
    data, fields = load(task, options.data), {"vocab_size": len(scorer.tokenizer), "pad_token_id": scorer.pad}
    for shape in options.shapes:
        base = models.placed(options, shape, causal=True, **fields)
        head = {"shape": shape.partition(":")[0], "layers": base.config.num_hidden_layers}
        for family, batch, order in itertools.product(options.families, options.batches, options.orders):
            sizes = {"train": options.train, "dev": 1, "eval": 1, "steps": options.train // batch, "batch": batch}
            its = Protocol(**sizes, by_length=order == "by length")
            gaps = max(1, options.steps - 1)
            at = sorted({round(k * (its.steps - 1) / gaps) for k in range(options.steps)})
            found = gains(partial(Runs, scorer, base, family, data, its), at, options)
            yield {**head, "family": family, "batch": batch, "order": order, **found}


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
        yield replicas.row(its, **between)
