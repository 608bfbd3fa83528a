"""K runs on SST-2 in one pass against K runs in turn: real sentences, in batches as a study makes them.

Steps spread over an epoch are taken in turn: by every run alone, by packs of some of them, and by every run alone
with its batches padded as they come. All of it is the code of a sweep: the scores of two label words, passes of about
equal length, clipping, AdamW. With --cores 2 the same steps are made by two processes of one thread or one of two, by
the clock on the wall.

    python scripts/bench.py sst2 --data DATA --tokenizer TOKENIZER --clock cpu
    python scripts/bench.py sst2 --data DATA --tokenizer TOKENIZER --cores 2 --name sst2_cores
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from torch import nn

import tnpeft
from bench import driver, models
from tnpeft.studies import training
from tnpeft.studies.batching import batches
from tnpeft.studies.data import load
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.scoring import Scorer
from tnpeft.studies.tasks import TASKS

TITLE = "Runs on SST-2 in one pass"
FAMILIES = {"lora r=8": tnpeft.families.lora(rank=8), "cp r=16": tnpeft.families.cp(rank=16)}
TARGETS = ("q_proj", "v_proj")
ORDERS = {"shuffled": False, "by length": True}
WAYS = {"alone": True, "as they come": False}  # whether batches are cut by length
OPTIONS = {
    "data": {"default": "", "help": "folder with sst2/train.jsonl.gz and sst2/dev.jsonl.gz, or the hub"},
    "tokenizer": {"default": "facebook/opt-125m", "help": "folder or name (default: %(default)s)"},
    "words": {"nargs": 2, "default": [" bad", " good"], "help": "of the labels, a token each"},
    "shapes": {
        "nargs": "+",
        "type": models.with_layers,
        "default": [("tiny", 4), ("opt-125m", 2)],
        "help": "name:layers",
    },
    "families": {"nargs": "+", "choices": FAMILIES, "default": ["lora r=8"]},
    "batches": (8, 16),
    "orders": {"nargs": "+", "choices": ORDERS, "default": [*ORDERS]},
    "replicas": (2, 4, 8),
    "train": {"type": int, "default": 1000, "help": "sentences of an epoch"},
    "steps": 9,
    "samples": 3,
    "cores": {"type": int, "default": 0, "help": "make the steps on so many cores in four ways"},
}


@dataclass(frozen=True)
class Case:
    """What is trained, on how many examples a step, in which order, with whose tokens."""

    shape: str
    layers: int
    family: str
    batch: int
    order: str
    data: str
    tokenizer: str
    words: tuple[str, str]
    train: int

    @property
    def protocol(self) -> Protocol:
        """One epoch of it."""
        sizes = {"train": self.train, "dev": 1, "eval": 1, "steps": self.train // self.batch, "batch": self.batch}
        return Protocol(**sizes, by_length=ORDERS[self.order])


@lru_cache(maxsize=1)
def scorer_of(tokenizer: str, words: tuple[str, str]) -> Scorer:
    """Return the scorer of label words of one token each."""
    from transformers import AutoTokenizer

    task = replace(TASKS["sst2"], words=dict(zip("01", words, strict=True)))
    return Scorer(task, AutoTokenizer.from_pretrained(tokenizer), "words", 128)


backbone = lru_cache(maxsize=1)(partial(models.backbone, causal=True))


class Runs:
    """Some runs of a case: ``numbers`` are their seeds, and they train in one pass if they are ``together``."""

    def __init__(self, case: Case, numbers: Sequence[int], together: bool) -> None:
        together &= len(numbers) > 1
        self.scorer, self.together = scorer_of(case.tokenizer, case.words), together
        data, its = load(self.scorer.task, case.data), case.protocol
        self.rows = [self.scorer.encode(data.splits(k, its.train, its.dev, its.eval).train) for k in numbers]
        lengths = [[len(row["ids"]) for row in rows] for rows in self.rows]
        orders = [batches(each, its, k) for each, k in zip(lengths, numbers, strict=True)]
        self.steps = [[*itertools.islice(order, its.steps)] for order in orders]
        words = len(self.scorer.tokenizer)
        base = backbone(case.shape, case.layers, vocab_size=words, pad_token_id=self.scorer.pad)
        replicas = len(numbers) if together else 1
        config = models.network(FAMILIES[case.family], 16 * case.batch, TARGETS, replicas=replicas)
        self.model = models.adapted(base, config).train()
        self.optimizer = training.optimizer(self.model, its, 1e-3)
        if together:
            tnpeft.replicas.learning_rates(self.optimizer, self.model, [1 / (k + 1) for k in range(replicas)])

    def step(self, at: int, cut: bool = True) -> None:
        """Take the step of every run at a place of the epoch; not ``cut``: padded to the longest of each batch."""
        if self.together:
            training.backward(self.scorer, self.model, self.rows, [steps[at] for steps in self.steps])
            return self._moved(tnpeft.replicas.clip)
        for rows, steps in zip(self.rows, self.steps, strict=True):
            if cut:
                training.backward(self.scorer, self.model, [rows], [steps[at]])
            else:
                batch = self.scorer.collate([rows[k] for k in steps[at][0]])
                self.scorer.losses(self.model, batch).mean().backward()
            self._moved(lambda model, norm: nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], norm))
        return None

    def _moved(self, clip: Callable[[nn.Module, float], Any]) -> None:
        clip(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tokens(self, at: int) -> tuple[int, int]:
        """Return the tokens of all runs at a place: those of the sentences, and with what pads them as they come."""
        both = zip(self.rows, self.steps, strict=True)
        lengths = [[len(rows[k]["ids"]) for k in steps[at][0]] for rows, steps in both]
        return sum(map(sum, lengths)), sum(len(its) * max(its) for its in lengths)


def places(case: Case, options: argparse.Namespace) -> list[int]:
    """Return steps spread evenly over the epoch: an order by length begins each part of it with the longest."""
    steps = case.protocol.steps
    return sorted({round(k * (steps - 1) / max(1, options.steps - 1)) for k in range(options.steps)})


def one_process(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return the gain of each way to take the steps of the largest number of runs, in turn; for fewer, of these."""
    most, at = max(options.replicas), places(case, options)
    alone = [Runs(case, [k], together=False) for k in range(most)]
    packs = {k: Runs(case, range(k), together=True) for k in options.replicas}

    def turn(places: Sequence[int]) -> Counter[str]:
        spent: Counter[str] = Counter()
        for place in places:
            ways = {f"{what} {k}": (its, cut) for k, its in enumerate(alone) for what, cut in WAYS.items()}
            for name, (runs, cut) in {**ways, **{f"pack {k}": (pack, True) for k, pack in packs.items()}}.items():
                spent[name] += driver.stopwatch(partial(runs.step, place, cut), options.clock)()  # type: ignore
        return spent

    turn(at[:1])
    rounds = [turn(at) for _ in range(options.samples)]

    def total(spent: Mapping[str, float], what: str, k: int) -> float:
        return sum(spent[f"{what} {number}"] for number in range(k))

    counted = [its.tokens(place) for place in at for its in alone]
    return {
        "milliseconds": 1e3 * median(total(spent, "alone", most) for spent in rounds) / most / len(at),
        "tokens": round(sum(own for own, _ in counted) / len(counted)),
        "padded": round(sum(own for _, own in counted) / len(counted)),
        "cut": median(total(spent, "as they come", most) / total(spent, "alone", most) for spent in rounds),
        "gain": {k: median(total(spent, "alone", k) / spent[f"pack {k}"] for spent in rounds) for k in packs},
    }


def several_processes(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds on the wall of the same steps of as many runs, made on so many cores in four ways."""
    most, cores, at = max(options.replicas), options.cores, places(case, options)
    shares = [list(range(k, most, cores)) for k in range(cores)]
    ways = {
        "alone, a thread each": [(share, False, 1) for share in shares],
        "packs, a thread each": [(share, True, 1) for share in shares],
        "alone, all threads": [(list(range(most)), False, cores)],
        "one pack, all threads": [(list(range(most)), True, cores)],
    }
    spawn, pipes = get_context("spawn"), dict[str, list[Any]]()
    for name, workers in ways.items():
        both = [spawn.Pipe() for _ in workers]
        for (_, theirs), its in zip(both, workers, strict=True):
            spawn.Process(target=worker, args=(theirs, case, *its), daemon=True).start()
        pipes[name] = [mine for mine, _ in both]
    for its in pipes.values():
        for pipe in its:
            pipe.recv()  # it is there
        asked(its, at[0])
    rounds = [Counter[str]() for _ in range(options.samples)]
    for spent, place, name in itertools.product(rounds, at, ways):
        spent[name] += asked(pipes[name], place)  # type: ignore[assignment]
    for pipe in itertools.chain(*pipes.values()):
        pipe.send(None)
    first = "alone, a thread each"
    return {
        "milliseconds": 1e3 * median(spent[first] for spent in rounds) / most / len(at),
        "ways": {name: median(spent[first] / spent[name] for spent in rounds) for name in ways},
    }


def asked(pipes: Sequence[Any], place: int) -> float:
    """Return the seconds until all workers have taken a step."""
    start = time.perf_counter()
    for pipe in pipes:
        pipe.send(place)
    for pipe in pipes:
        pipe.recv()
    return time.perf_counter() - start


def worker(pipe: Any, case: Case, numbers: Sequence[int], together: bool, threads: int) -> None:
    """Take the steps that are asked for."""
    torch.set_num_threads(threads)
    runs = Runs(case, numbers, together)
    pipe.send(None)
    while (place := pipe.recv()) is not None:
        runs.step(place)
        pipe.send(None)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return every case."""
    rows, kinds = [], (options.shapes, options.families, options.batches, options.orders)
    for (name, layers), family, batch, order in itertools.product(*kinds):
        own = {"shape": name, "layers": layers, "family": family, "batch": batch, "order": order}
        case = Case(
            **own, data=options.data, tokenizer=options.tokenizer, words=(*options.words,), train=options.train
        )
        rows.append(own | (several_processes if options.cores else one_process)(case, options))
        driver.progress(rows[-1])
    return {"cases": rows}


def about(data: Mapping[str, Any]) -> str:
    """Return what was measured."""
    s = data["settings"]
    return (
        "Steps in the same time over those of the runs in turn, each alone: above 1 is faster. A step is the scores "
        f"of two label words, forward, backward, clipping and AdamW of an adapter on {', '.join(TARGETS)}; sentences "
        "are SST-2's, in a study's order, and go through the model in lots of about equal length, those of a run "
        "alone as those of a pack. *As they come* is a run alone whose batches are padded to their longest sentence "
        f"instead. {s['steps']} steps spread over an epoch of {s['train']} sentences."
    )


def tables(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for each case."""
    rows = []
    for row in data["cases"]:
        cells: dict[str, Any] = {
            "backbone": f"{row['shape']}, {row['layers']} layers",
            "adapter": row["family"],
            "examples": f"{row['batch']} {row['order']}",
        }
        if "gain" in row:
            cells |= {"tokens": row["tokens"], "padded as they come": row["padded"]}
            cells |= {"ms alone": row["milliseconds"], "as they come": f"{1 / row['cut']:.2f}"}
            cells |= {f"K={k}": f"{gain:.2f}" for k, gain in row["gain"].items()}
        else:
            cells |= {"ms alone": row["milliseconds"]}
            cells |= {name: f"{gain:.2f}" for name, gain in row["ways"].items()}
        rows.append(cells)
    return {"": rows}
