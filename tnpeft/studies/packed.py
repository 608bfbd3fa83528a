"""The training of runs side by side: every run sees its own examples in its own order at its own learning rate.

Examples of about equal length share a pass, equally many of each run: several runs have enough of them at each step,
and little of a pass is padding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, TrainerCallback

import tnpeft
from tnpeft.studies.data import Splits
from tnpeft.studies.files import StudyError
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.scoring import Scorer, judge, metric
from tnpeft.studies.training import Best, Ordered, arguments, optimizer

Rows = Sequence[dict[str, Any]]


@dataclass
class Step:
    """One optimizer step: the examples of its batches, by place, and the learning rate."""

    batches: list[list[int]] = field(default_factory=list)
    lr: float = 0.0


class _Rehearsal(TrainerCallback):
    def __init__(self) -> None:
        self.steps = [Step()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(Step())


class _Rehearsing(Ordered):
    """A Trainer that trains nothing and notes what it is given."""

    def __init__(self, noted: _Rehearsal, **kwargs: Any) -> None:
        super().__init__(callbacks=[noted], **kwargs)
        self.noted = noted

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        step = self.noted.steps[-1]
        step.batches.append(inputs["rows"].tolist())
        step.lr = self.optimizer.param_groups[0]["lr"]
        loss = 0.0 * model.weight.sum()
        return (loss, {}) if return_outputs else loss


def rehearse(rows: Rows, protocol: Protocol, lr: float, seed: int) -> list[Step]:
    """What the Trainer of a run alone trains on at every step: asked of itself, so that a pack trains alike.

    >>> rows = [{"ids": [1, 2]}] * 5
    >>> steps = rehearse(rows, Protocol(steps=3, batch=2, warmup=0.0, schedule="constant"), 0.1, seed=0)
    >>> [len(batch) for step in steps for batch in step.batches], steps[0].lr
    ([2, 2, 1], 0.1)
    """
    steps = _rehearsed(tuple(len(row["ids"]) for row in rows), protocol, seed)
    return [Step(step.batches, lr * step.lr) for step in steps]


@lru_cache(maxsize=64)
def _rehearsed(lengths: tuple[int, ...], protocol: Protocol, seed: int) -> list[Step]:
    """The steps at the learning rate 1; the runs of a sweep ask for the same ones again and again."""
    noted = _Rehearsal()
    with tempfile.TemporaryDirectory() as folder:
        transformers.set_seed(seed)
        model = torch.nn.Linear(1, 1)
        trainer = _Rehearsing(
            noted,
            protocol=protocol,
            model=model,
            args=arguments(Path(folder), protocol, 1.0, seed, keep=False),
            train_dataset=[{"row": k, "ids": range(length)} for k, length in enumerate(lengths)],
            data_collator=lambda rows: {"rows": torch.tensor([row["row"] for row in rows])},
            optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return noted.steps[:-1]


def fit(
    model: torch.nn.Module,
    scorer: Scorer,
    splits: Sequence[Splits],
    protocol: Protocol,
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
) -> tuple[list[Best], float]:
    """Train the replicas of a model, one on each of ``splits``, and leave each at its best checkpoint on dev.

    Returns:
        Each replica's best checkpoint with its course, and the seconds spent in training them all.

    Raises:
        StudyError: the runs' data differ in size, so that their batches cannot stand side by side.
    """
    top = max(lrs)
    train, dev = [scorer.encode(its.train) for its in splits], [scorer.encode(its.dev) for its in splits]
    orders = [rehearse(rows, protocol, top, seed) for rows, seed in zip(train, seeds, strict=True)]
    chosen = optimizer(model, protocol, top)
    tnpeft.replicas.learning_rates(chosen, model, [lr / top for lr in lrs])
    bases = [group["lr"] / top for group in chosen.param_groups]
    course = _Course(model, protocol, len(lrs))
    start, judging = time.perf_counter(), 0.0
    model.train()
    for number, steps in enumerate(zip(*orders, strict=True), start=1):
        for group, base in zip(chosen.param_groups, bases, strict=True):
            group["lr"] = base * steps[0].lr
        course.losses += backward(scorer, model, train, [step.batches for step in steps])
        if protocol.clip:
            tnpeft.replicas.clip(model, protocol.clip)
        chosen.step()
        chosen.zero_grad()
        if number % protocol.evaluate_every == 0 or number == protocol.steps:
            begun = time.perf_counter()
            found = judge(scorer, model, dev)
            by = scorer.task.metric
            course.judge(number, [(metric(by, its.guesses, its.labels), its.loss) for its in found])
            judging += time.perf_counter() - begun
            if not course.running:
                break
    seconds = time.perf_counter() - start - judging
    course.restore()
    return course.best, seconds


def backward(
    scorer: Scorer, model: torch.nn.Module, rows: Sequence[Rows], batches: Sequence[Sequence[Sequence[int]]]
) -> list[torch.Tensor]:
    """Add up the gradients of a step: for each run of the mean, over its batches, of their mean losses.

    Args:
        scorer: what makes losses of examples.
        model: a model with a replica for each run.
        rows: the examples of each run.
        batches: places among these, batch by batch, for each run.

    Returns:
        The loss of every batch, ``[runs]``.

    Raises:
        StudyError: the runs' batches differ in size.
    """
    sizes = [len(batch) for batch in batches[0]]
    if any([len(batch) for batch in its] != sizes for its in batches):
        raise StudyError("the runs' batches differ in size", remedy="make these runs alone")
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    device, losses = next(model.parameters()).device, torch.zeros(len(rows), len(sizes))
    whole = scorer.collate([its[k] for its, own in zip(rows, batches, strict=True) for batch in own for k in batch])
    for lot, part in scorer.cut({name: tensor.to(device) for name, tensor in whole.items()}, len(rows)):
        owners = owner[torch.tensor(lot)]
        each = scorer.losses(model, part).view(len(rows), -1) / torch.tensor(sizes)[owners].to(device)
        (each.sum() / len(sizes)).backward()
        losses.scatter_add_(1, owners, each.detach().cpu())
    return [*losses.T]


class _Course:
    """Each replica's best checkpoint so far, and which of them its protocol lets go on."""

    def __init__(self, model: torch.nn.Module, protocol: Protocol, count: int) -> None:
        self.model, self.protocol = model, protocol
        self.best = [Best() for _ in range(count)]
        self.losses: list[torch.Tensor] = []
        self.running = set(range(count))

    def judge(self, step: int, found: Sequence[tuple[float, float]]) -> None:
        trained = torch.stack(self.losses).mean(0).tolist()
        self.losses.clear()
        for k in sorted(self.running):
            (dev, loss), best = found[k], self.best[k]
            best.curve.append((step, trained[k], dev, loss))
            if best.offer(step, dev, loss, self.protocol.reported):
                best.weights = {n: p.detach()[k].clone() for n, p in self._trained()}
            if best.hopeless(self.protocol.patience, self.protocol.best_by):
                self.running.discard(k)

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self._trained():
            for k, best in enumerate(self.best):
                parameter[k].copy_(best.weights[name])

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
