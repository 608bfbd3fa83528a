"""One training: Hugging Face's Trainer inside, evaluation on dev every so often, the best checkpoint kept."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from tnpeft.studies import methods, processes
from tnpeft.studies.data import Splits
from tnpeft.studies.files import StudyError, whole, write_json
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.scoring import Scorer, evaluate

Progress = Callable[[int, int, float, float | None], None]  # step, steps, training loss, dev metric


@dataclass
class Best:
    """The checkpoint that is best on dev, and the course of the run.

    ``curve`` has a row (step, training loss since the last, dev metric, dev loss) for each evaluation.
    """

    step: int = -1
    dev: float = 0.0
    loss: float = float("inf")
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def offer(self, step: int, dev: float, loss: float, by: str) -> bool:
        """True if this evaluation is the one to report so far (``by`` last, metric or loss); it is then taken."""
        better = (dev, -loss) > (self.dev, -self.loss) if by == "metric" else loss < self.loss
        if self.step < 0 or by == "last" or (better and math.isfinite(loss)):
            self.step, self.dev, self.loss = step, dev, loss
            return True
        return False

    def hopeless(self, patience: int, by: str = "metric") -> bool:
        """True if no evaluation was better at the last ``patience`` ones (0: never), or the losses are not finite."""
        _, trained, _, loss = self.curve[-1]
        if not (math.isfinite(trained) and math.isfinite(loss)):
            return True
        merits = [(dev, -loss) if by == "metric" else (-loss,) for _, _, dev, loss in self.curve]
        return bool(patience) and len(merits) - 1 - merits.index(max(merits)) >= patience


class _Judge(TrainerCallback):
    """Evaluates on dev, keeps the best weights, stops a run that is hopeless."""

    def __init__(
        self, scorer: Scorer, dev: list[dict[str, Any]], protocol: Protocol, progress: Progress | None
    ) -> None:
        self.scorer, self.dev, self.protocol, self.progress = scorer, dev, protocol, progress
        self.best = Best()
        self.losses: list[torch.Tensor] = []
        self.folder: Path | None = None
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, protocol = state.global_step, self.protocol
        if step % protocol.evaluate_every and step < protocol.steps:
            return
        start = time.perf_counter()
        self.judge(kwargs["model"], step)
        self.seconds += time.perf_counter() - start
        control.should_training_stop |= self.best.hopeless(protocol.patience, protocol.best_by)

    def judge(self, model: torch.nn.Module, step: int) -> None:
        dev, loss = evaluate(self.scorer, model, self.dev)
        trained = processes.mean(torch.stack(self.losses).mean()) if self.losses else 0.0
        self.losses.clear()
        self.best.curve.append((step, trained, dev, loss))
        if self.best.offer(step, dev, loss, self.protocol.reported):
            self.best.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            if self.folder and processes.first():
                with whole(self.folder / "best.pt") as part:
                    torch.save(self.best.weights, part)
        if self.folder and processes.first():
            best = {"step": self.best.step, "dev": self.best.dev, "loss": self.best.loss, "curve": self.best.curve}
            write_json(self.folder / "best.json", best)
        if self.progress:
            self.progress(step, self.protocol.steps, trained, dev)

    def resume(self, folder: Path, step: int) -> None:
        """Take up the course of an interrupted run; evaluations after ``step`` are made again.

        A best checkpoint from after ``step`` beat all before it, so it is enough that it will be made again.
        """
        saved = json.loads((folder / "best.json").read_text())
        curve = [(row[0], row[1], row[2], row[3]) for row in saved.pop("curve") if row[0] <= step]
        if saved["step"] <= step:
            self.best = Best(**saved, weights=torch.load(folder / "best.pt", weights_only=True))
        self.best.curve = curve


class Ordered(Trainer):
    """A Trainer that takes encoded examples in the order that the protocol says."""

    def __init__(self, *, protocol: Protocol, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.protocol = protocol
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> Any:
        """Every process is given the whole batches of a run alone, and takes its share of each."""
        loader = super().get_train_dataloader()
        if processes.count() > 1:
            shard = loader.batch_sampler
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.protocol.by_length:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        return _ByLength([len(row["ids"]) for row in rows], self.args.train_batch_size, self.args.data_seed)


class _Scored(Ordered):
    """A Trainer whose loss is the cross-entropy over the scorer's class scores."""

    def __init__(self, *, scorer: Scorer, judge: _Judge, **kwargs: Any) -> None:
        super().__init__(protocol=judge.protocol, data_collator=self._collate, callbacks=[judge], **kwargs)
        self.scorer, self.judge = scorer, judge

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        mine, factor = processes.share(rows)
        return {**self.scorer.collate(mine), "factor": torch.tensor(factor)}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        whole = processes.count() > 1  # DDP expects one forward for each backward
        parts = [inputs] if whole else [part for _, part in self.scorer.cut(inputs)]
        loss = sum(self.scorer.losses(model, part).sum() for part in parts) / len(inputs["labels"]) * inputs["factor"]
        self.judge.losses.append(loss.detach())
        return (loss, {}) if return_outputs else loss


class _ByLength(Sampler[int]):
    """Shuffled examples, neighbours of about equal length; the order depends on the seed and the epoch alone, so
    that a resumed run sees it again."""

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=draw))


def optimizer(model: torch.nn.Module, protocol: Protocol, lr: float) -> torch.optim.Optimizer:
    """A fused AdamW whose groups learn at the rates that the protocol asks for.

    Raises:
        StudyError: the protocol asks for rates by rule, or preconditioned steps, which this adapter does not have.
    """
    import tnpeft

    relative = protocol.relative_step or (lr if protocol.rate_rule == "relative_step" else 0.0)
    ours = any(hasattr(config, "lr_multiplier") for config in getattr(model, "peft_config", {}).values())
    groups: Any = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]
    if (relative or protocol.precondition) and not ours:
        raise StudyError("relative_step and precondition are for networks", remedy="train a family or a line")
    if relative:
        groups = _by_rule(model, relative)
    elif ours:
        groups = tnpeft.parameter_groups(model, lr=lr)
    if protocol.head_lr:
        head = {id(p): p for name, p in model.named_parameters() if p.requires_grad and methods.of_head(name)}
        groups = [{**group, "params": [p for p in group["params"] if id(p) not in head]} for group in groups]
        groups = [group for group in groups if group["params"]]
        groups += [{"params": list(head.values()), "lr": protocol.head_lr}] if head else []
    chosen = torch.optim.AdamW(groups, lr=lr, weight_decay=protocol.weight_decay, fused=True)
    if protocol.precondition:
        if not hasattr(tnpeft, "optim"):
            raise StudyError("precondition needs tnpeft.optim", remedy="leave precondition out, or update tnpeft")
        tnpeft.optim.precondition(chosen, model)
    return chosen


def _by_rule(model: torch.nn.Module, relative_step: float) -> Any:
    import tnpeft

    if "relative_step" not in inspect.signature(tnpeft.parameter_groups).parameters:
        raise StudyError("this tnpeft has no relative steps", remedy="leave relative_step and rate_rule out")
    return tnpeft.parameter_groups(model, relative_step=relative_step)


def fit(
    model: torch.nn.Module,
    scorer: Scorer,
    splits: Splits,
    protocol: Protocol,
    *,
    lr: float,
    seed: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Best, float]:
    """Train what requires a gradient and leave the model at its best checkpoint on dev.

    With a ``folder`` a checkpoint is written there at every evaluation and an interrupted run goes on from it.

    Returns:
        The best checkpoint with the run's course, and the seconds spent in training (evaluation left out).
    """
    with contextlib.ExitStack() as stack:
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        where.mkdir(parents=True, exist_ok=True)
        judge = _Judge(scorer, scorer.encode(splits.dev), protocol, progress)
        judge.folder = folder
        transformers.set_seed(seed)
        trainer = _Scored(
            scorer=scorer,
            judge=judge,
            model=model,
            args=arguments(where, protocol, lr, seed, keep=folder is not None),
            train_dataset=scorer.encode(splits.train),
            optimizers=(optimizer(model, protocol, lr), None),
        )
        trainer.remove_callback(PrinterCallback)
        last = transformers.trainer_utils.get_last_checkpoint(str(where)) if folder else None
        if last:
            judge.resume(where, int(last.rpartition("-")[2]))
        elif protocol.steps == 0:
            judge.judge(model, 0)
        start = time.perf_counter()
        if protocol.steps:
            trainer.train(resume_from_checkpoint=last)
        seconds = time.perf_counter() - start - judge.seconds
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in judge.best.weights:
                parameter.copy_(judge.best.weights[name])
    return judge.best, seconds


def arguments(where: Path, protocol: Protocol, lr: float, seed: int, *, keep: bool) -> TrainingArguments:
    """What the Trainer is told of a run; with ``keep`` it writes a checkpoint at every evaluation.

    >>> arguments(Path("runs"), Protocol(steps=50, batch=4), 0.1, seed=3, keep=False).max_steps
    50
    """
    return TrainingArguments(
        output_dir=str(where),
        max_steps=max(1, protocol.steps),
        per_device_train_batch_size=protocol.batch,
        gradient_accumulation_steps=protocol.accumulate,
        learning_rate=lr,
        lr_scheduler_type=protocol.schedule,
        warmup_steps=round(protocol.warmup * protocol.steps),
        weight_decay=protocol.weight_decay,
        max_grad_norm=protocol.clip,
        seed=seed,
        data_seed=seed,
        save_strategy="steps" if keep else "no",
        save_steps=protocol.evaluate_every,
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=processes.device() == "cpu",
    )
