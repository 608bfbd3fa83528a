"""K runs on SST-2 in one pass against K runs in turn: real sentences, in batches as a study makes them.

Steps spread over an epoch are taken in turn: by every run alone, by packs of some of them, and by every run alone
with its batches padded as they come. All of it is the code of a sweep: the scores of two label words, passes of about
equal length, clipping, AdamW. With --cores 2 the same steps are made by two processes of one thread or one of two, by
the clock on the wall. Writes ``sst2.json`` and ``sst2.md``.

    python scripts/bench_sst2.py --data DATA --tokenizer TOKENIZER --clock cpu
    python scripts/bench_sst2.py --data DATA --tokenizer TOKENIZER --cores 2 --name sst2_cores
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import torch
from _bench_models import SHAPES, opt_config
from torch import nn

import tnpeft
from tnpeft.studies import training
from tnpeft.studies.batching import batches
from tnpeft.studies.data import load
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.scoring import Scorer
from tnpeft.studies.tasks import TASKS

FAMILIES = {"lora r=8": tnpeft.families.lora(rank=8), "cp r=16": tnpeft.families.cp(rank=16)}
TARGETS = ("q_proj", "v_proj")
ORDERS = {"shuffled": False, "by length": True}


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
        steps = self.train // self.batch
        sizes = {"train": self.train, "dev": 1, "eval": 1, "steps": steps, "batch": self.batch}
        return Protocol(**sizes, by_length=ORDERS[self.order])


@lru_cache(maxsize=1)
def scorer_of(tokenizer: str, words: tuple[str, str]) -> Scorer:
    """Label words of one token each."""
    from transformers import AutoTokenizer

    task = replace(TASKS["sst2"], words=dict(zip("01", words, strict=True)))
    return Scorer(task, AutoTokenizer.from_pretrained(tokenizer), "words", 128)


@lru_cache(maxsize=1)
def backbone(shape: str, layers: int, vocabulary: int, pad: int) -> nn.Module:
    """A frozen OPT with random weights."""
    from transformers import OPTForCausalLM

    torch.manual_seed(0)
    config = opt_config(shape, layers, dropout=0.0)
    config.vocab_size, config.pad_token_id = vocabulary, pad
    return OPTForCausalLM(config).requires_grad_(False)


class Runs:
    """Some runs of a case: ``numbers`` are their seeds, and they train in one pass if they are ``packed``."""

    def __init__(self, case: Case, numbers: Sequence[int], together: bool) -> None:
        import peft

        together &= len(numbers) > 1
        self.scorer, self.together = scorer_of(case.tokenizer, case.words), together
        data, its = load(self.scorer.task, case.data), case.protocol
        self.rows = [self.scorer.encode(data.splits(k, its.train, its.dev, its.eval).train) for k in numbers]
        lengths = [[len(row["ids"]) for row in rows] for rows in self.rows]
        orders = [batches(each, its, k) for each, k in zip(lengths, numbers, strict=True)]
        self.steps = [[*islice(order, its.steps)] for order in orders]
        base = backbone(case.shape, case.layers, len(self.scorer.tokenizer), self.scorer.pad)
        config = tnpeft.TensorNetworkConfig(
            network=FAMILIES[case.family],
            target_modules=[*TARGETS],
            replicas=len(numbers) if together else 1,
            tokens=16 * case.batch,
        )
        own = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        self.model: Any = peft.get_peft_model(own, config).train()
        self.optimizer = training.optimizer(self.model, its, 1e-3)
        if together:
            tnpeft.replicas.learning_rates(self.optimizer, self.model, [1 / (k + 1) for k in range(len(numbers))])

    def step(self, at: int, cut: bool = True) -> None:
        """The step of every run at a place of the epoch; not ``cut``: padded to the longest of each batch."""
        if self.together:
            training.backward(self.scorer, self.model, self.rows, [steps[at] for steps in self.steps])
            self._moved(tnpeft.replicas.clip)
            return
        for rows, steps in zip(self.rows, self.steps, strict=True):
            if cut:
                training.backward(self.scorer, self.model, [rows], [steps[at]])
            else:
                batch = self.scorer.collate([rows[k] for k in steps[at][0]])
                self.scorer.losses(self.model, batch).mean().backward()
            self._moved(lambda model, norm: nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], norm))

    def _moved(self, clip: Callable[[nn.Module, float], Any]) -> None:
        clip(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tokens(self, at: int) -> tuple[int, int]:
        """Of all runs at a place: those of the sentences, and with what pads them as they come."""
        both = zip(self.rows, self.steps, strict=True)
        lengths = [[len(rows[k]["ids"]) for k in steps[at][0]] for rows, steps in both]
        return sum(map(sum, lengths)), sum(len(its) * max(its) for its in lengths)


def places(case: Case, options: argparse.Namespace) -> list[int]:
    """Steps spread evenly over the epoch: an order by length begins each part of it with the longest."""
    steps = case.protocol.steps
    return sorted({round(k * (steps - 1) / max(1, options.steps - 1)) for k in range(options.steps)})


def one_process(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way to take the steps of the largest number of runs, in turn; for packs of fewer, of these."""
    most = max(options.replicas)
    alone = [Runs(case, [k], together=False) for k in range(most)]
    packs = {k: Runs(case, range(k), together=True) for k in options.replicas}
    at, rounds = places(case, options), list[Counter[str]]()

    def take(spent: Counter[str], name: str, runs: Runs, *args: Any) -> None:
        start = _bench.CLOCKS[options.clock]()
        runs.step(*args)
        spent[name] += _bench.CLOCKS[options.clock]() - start  # type: ignore[assignment]

    for sample in range(-1, options.samples):
        spent: Counter[str] = Counter()
        for place in at if sample >= 0 else at[:1]:
            for k, its in enumerate(alone):
                take(spent, f"alone {k}", its, place)
                take(spent, f"as they come {k}", its, place, False)
            for k, pack in packs.items():
                take(spent, f"pack {k}", pack, place)
        rounds += [spent] if sample >= 0 else []

    def turn(spent: Mapping[str, float], what: str, k: int) -> float:
        return sum(spent[f"{what} {number}"] for number in range(k))

    counted = [its.tokens(place) for place in at for its in alone]
    return {
        "milliseconds": 1e3 * median(turn(spent, "alone", most) for spent in rounds) / most / len(at),
        "tokens": round(sum(own for own, _ in counted) / len(counted)),
        "padded": round(sum(own for _, own in counted) / len(counted)),
        "cut": median(turn(spent, "as they come", most) / turn(spent, "alone", most) for spent in rounds),
        "gain": {k: median(turn(spent, "alone", k) / spent[f"pack {k}"] for spent in rounds) for k in packs},
    }


def several_processes(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds on the wall of the same steps of as many runs, made side by side on so many cores in four ways."""
    most, cores = max(options.replicas), options.cores
    shares = [list(range(k, most, cores)) for k in range(cores)]
    ways = {
        "alone, a thread each": [(share, False, 1) for share in shares],
        "packs, a thread each": [(share, True, 1) for share in shares],
        "alone, all threads": [(list(range(most)), False, cores)],
        "one pack, all threads": [(list(range(most)), True, cores)],
    }
    spawn, spent = get_context("spawn"), {name: [0.0] * options.samples for name in ways}
    pipes: dict[str, list[Any]] = {}
    for name, workers in ways.items():
        pipes[name] = []
        for numbers, together, threads in workers:
            mine, theirs = spawn.Pipe()
            spawn.Process(target=worker, args=(theirs, case, numbers, together, threads), daemon=True).start()
            pipes[name].append(mine)
    for its in pipes.values():
        for pipe in its:
            pipe.recv()  # it is there
        asked(its, places(case, options)[0])
    for sample in range(options.samples):
        for place in places(case, options):
            for name, its in pipes.items():
                spent[name][sample] += asked(its, place)
    for pipe in (pipe for its in pipes.values() for pipe in its):
        pipe.send(None)
    first = spent["alone, a thread each"]
    return {
        "milliseconds": 1e3 * median(first) / most / len(places(case, options)),
        "ways": {name: median(a / b for a, b in zip(first, own, strict=True)) for name, own in spent.items()},
    }


def asked(pipes: Sequence[Any], place: int) -> float:
    """Seconds until all workers have taken a step."""
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


def report(data: Mapping[str, Any]) -> str:
    """The measurement as a page."""
    s, m = data["settings"], data["machine"]
    rows = []
    for row in data["cases"]:
        cells = {
            "backbone": f"{row['shape']}, {row['layers']} layers",
            "adapter": row["family"],
            "examples": f"{row['batch']} {row['order']}",
        }
        if "gain" in row:
            cells |= {"tokens": row["tokens"], "padded as they come": row["padded"]}
        cells |= {"ms alone": row["milliseconds"]}
        if "gain" in row:
            cells |= {"as they come": f"{1 / row['cut']:.2f}"}
            cells |= {f"K={k}": f"{gain:.2f}" for k, gain in row["gain"].items()}
        else:
            cells |= {name: f"{gain:.2f}" for name, gain in row["ways"].items()}
        rows.append(cells)
    return (
        "# Runs on SST-2 in one pass\n\n"
        "Steps in the same time over those of the runs in turn, each alone: above 1 is faster. A step is the scores "
        f"of two label words, forward, backward, clipping and AdamW of an adapter on {', '.join(TARGETS)}; sentences "
        "are SST-2's, in a study's order, and go through the model in lots of about equal length, those of a run "
        "alone as those of a pack. *As they come* is a run alone whose batches are padded to their longest sentence "
        f"instead. {s['steps']} steps spread over an epoch of {s['train']} sentences, {s['samples']} rounds by the "
        f"{s['clock']} clock, {s['threads']} threads, load {m['load']} on {m['cores']} cores ({m['processor']}; "
        f"torch {m['torch']}).\n\n" + _bench.markdown(rows)
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="", help="folder with sst2/train.jsonl.gz and sst2/dev.jsonl.gz, or the hub"
    )
    parser.add_argument("--tokenizer", default="facebook/opt-125m", help="folder or name (default: %(default)s)")
    parser.add_argument("--words", nargs=2, default=[" bad", " good"], help="of the labels, a token each")
    parser.add_argument("--shapes", nargs="+", default=["tiny:4", "opt-125m:2"], help="shape:layers")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["lora r=8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16], help="examples of a step")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=[*ORDERS])
    parser.add_argument("--replicas", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--train", type=int, default=1000, help="sentences of an epoch")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cores", type=int, default=0, help="make the steps on so many cores in four ways")
    parser.add_argument("--clock", choices=_bench.CLOCKS, default="wall")
    parser.add_argument("--name", default="sst2", help="name of the files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_bench.TABLES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = []
    for name, _, layers in (text.partition(":") for text in options.shapes):
        for family in options.families:
            for batch in options.batches:
                for order in options.orders:
                    its = (name, int(layers or SHAPES[name][2]), family, batch, order)
                    case = Case(*its, options.data, options.tokenizer, tuple(options.words), options.train)
                    found = several_processes(case, options) if options.cores else one_process(case, options)
                    names = ("shape", "layers", "family", "batch", "order")
                    cases.append({**{key: getattr(case, key) for key in names}, **found})
                    print(cases[-1], file=sys.stderr, flush=True)
    names = ("steps", "train", "samples", "clock", "threads", "cores")
    settings = {name: getattr(options, name) for name in names}
    data = {"settings": settings, "machine": _bench.machine(options.threads), "cases": cases}
    _bench.write(options.out, options.name, data, report(data))
    print(report(data))


if __name__ == "__main__":
    main()
