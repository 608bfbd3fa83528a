"""The training loop: one run, or several side by side as replicas of one adapter over one frozen backbone.

Each run sees its examples in its order at its learning rate. With a folder, a checkpoint is written at each
evaluation, and an interrupted training goes on from the newest whole one, to the same bits.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer_pt_utils import get_length_grouped_indices

import tnpeft
from tnpeft.studies import methods
from tnpeft.studies.files import StudyError, whole
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.tasks.data import Splits
from tnpeft.studies.tasks.scoring import Rows, Scorer, inner, judge, metric

Progress = Callable[[int, int, float, float], None]  # step, steps, training loss, dev metric
Say = Callable[[str], None]
_KEPT = 2  # checkpoints in a folder: the newest, and the one to fall back to if that is damaged


@dataclass
class Course:
    """The course of one run: a row (step, training loss since the last, dev metric, dev loss) for each evaluation.

    The row to report is the ``last``, or the best ``by`` ``metric`` (ties: the smaller loss) or ``loss``; ``weights``
    are what was trained, as it was there.
    """

    by: str = "last"
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def best(self, by: str) -> int:
        """The place of the last row, or of the first best one; a loss that is not finite is the worst.

        >>> Course(curve=[(1, 0.7, 0.5, 1.0), (2, 0.6, 0.5, 0.9), (3, 0.5, 0.9, math.nan)]).best("metric")
        1
        """
        if by == "last":
            return len(self.curve) - 1
        merits = [
            (dev if by == "metric" else 0, -loss) if math.isfinite(loss) else () for *_, dev, loss in self.curve
        ]
        return merits.index(max(merits))

    @property
    def reported(self) -> tuple[int, float, float, float]:
        """The row to report."""
        return self.curve[self.best(self.by)]

    def should_stop(self, patience: int, by: str = "metric") -> bool:
        """True if no evaluation was better at the last ``patience`` ones (0: never), or the losses are not finite."""
        if not self.curve:
            return False
        _, trained, _, loss = self.curve[-1]
        late = patience and len(self.curve) - 1 - self.best(by) >= patience
        return bool(late) or not (math.isfinite(trained) and math.isfinite(loss))


def fit(
    model: torch.nn.Module,
    scorer: Scorer,
    splits: Sequence[Splits],
    protocol: Protocol,
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    folder: Path | None = None,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> tuple[list[Course], float]:
    """Train everything that requires a gradient, and leave the model at the checkpoint to report.

    Args:
        model: a model; for several runs its adapter has a replica for each.
        scorer: encodes examples and computes losses.
        splits: the examples of each run.
        protocol: the settings that the runs share.
        lrs: learning rate of each run.
        seeds: of the order of each run's examples.
        folder: where checkpoints are written and looked for.
        progress: called for the first run at each evaluation.
        say: called with what is done now, in words.

    Returns:
        The course of each run, and the seconds spent in training (without evaluation).

    Raises:
        StudyError: the runs' data differ in size, or the examples do not fit the model.
    """
    train, dev = [scorer.encode(s.train) for s in splits], [scorer.encode(s.dev) for s in splits]
    for rows in (*train, *dev):
        check_rows(model, scorer, rows)
    transformers.set_seed(seeds[0])  # dropout of a run alone
    top, runs = max(lrs), len(splits)
    first = scorer.collate(train[0][: protocol.batch])
    chosen = optimizer(model, protocol, top, lambda its: scorer.losses(its, first).mean())
    rates = [group["lr"] for group in chosen.param_groups]
    if runs > 1:
        tnpeft.replicas.learning_rates(chosen, model, [lr / top for lr in lrs])
    state = _State(model, chosen, [Course(protocol.reported) for _ in range(runs)])
    start = state.resume(folder) if folder else 0
    if start:
        say(f"going on from step {start}")
    seconds, begun, losses = 0.0, time.perf_counter(), list[torch.Tensor]()

    def evaluate(step: int) -> None:
        say(f"evaluating on {len(dev[0])} examples")
        trained = torch.stack(losses).mean(0).tolist() if losses else [0.0] * runs
        losses.clear()
        results = [(metric(scorer.task.metric, j.guesses, j.labels), j.loss) for j in judge(scorer, model, dev)]
        for k in state.running(protocol):
            course, (score, loss) = state.courses[k], results[k]
            course.curve.append((step, trained[k], score, loss))
            if course.reported is course.curve[-1]:
                course.weights = {name: p.detach().clone() for name, p in state.weights(k)}
        if folder:
            state.save(folder, step)
        if progress:
            progress(step, protocol.steps, *state.courses[0].curve[-1][1:3])

    if protocol.steps == 0:
        evaluate(0)
    model.train()
    lengths = [[len(row["ids"]) for row in rows] for rows in train]
    orders = [batches(each, protocol, seed, start) for each, seed in zip(lengths, seeds, strict=True)]
    for step, places in enumerate(itertools.islice(zip(*orders, strict=True), protocol.steps - start), start + 1):
        if not state.running(protocol):
            break
        for group, rate in zip(chosen.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(protocol, step - 1)
        losses += backward(scorer, model, train, places)
        if protocol.clip and runs > 1:
            tnpeft.replicas.clip(model, protocol.clip)
        elif protocol.clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], protocol.clip)
        chosen.step()
        chosen.zero_grad()
        if step % protocol.evaluate_every == 0 or step == protocol.steps:
            seconds += time.perf_counter() - begun
            evaluate(step)
            begun = time.perf_counter()
    with torch.no_grad():
        for k, course in enumerate(state.courses):
            for name, parameter in state.weights(k):
                parameter.copy_(course.weights[name])
    return state.courses, seconds


def check_rows(model: torch.nn.Module, scorer: Scorer, rows: Rows) -> None:
    """Refuse token ids without an embedding, and rows that are longer than the model's learned positions."""
    transformer = inner(model)
    words = transformer.get_input_embeddings().weight.shape[0]
    largest = max((max(ids, default=0) for ids in ([row["ids"] for row in rows] + scorer.words)), default=0)
    if largest >= words:
        raise StudyError(
            f"the tokenizer gives the token {largest}, the model has {words}",
            remedy="name the model's own tokenizer with --tokenizer",
        )
    config = transformer.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not limit or any("rope" in name or "rotary" in name for name in config.to_dict()):
        return
    if "roberta" in config.model_type:  # positions start after the padding's
        limit -= config.pad_token_id + 1
    longest = max(len(row["ids"]) for row in rows) + scorer.width - 1
    if longest > limit:
        raise StudyError(
            f"an example has {longest} tokens, the model {limit} positions", remedy=f"set max_length = {limit}"
        )


def backward(scorer: Scorer, model: torch.nn.Module, rows: Sequence[Rows], places: Any) -> list[torch.Tensor]:
    """Add up the gradients of a step: for each run of the mean, over its batches, of their mean losses.

    ``rows`` are the encoded examples of each run, ``places`` positions in them, batch by batch, for each run. Returns
    the loss of each batch, ``[runs]``.
    """
    sizes = [len(batch) for batch in places[0]]
    if any([len(batch) for batch in each] != sizes for each in places):
        raise StudyError("the runs' batches differ in size", remedy="make these runs alone")
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    device, losses = next(model.parameters()).device, torch.zeros(len(rows), len(sizes))
    chosen = [[run[k] for batch in own for k in batch] for run, own in zip(rows, places, strict=True)]
    for lot, part in scorer.cut(chosen, device):
        owners = owner[torch.tensor(lot)]
        each = scorer.losses(model, part).view(len(rows), -1) / torch.tensor(sizes)[owners].to(device)
        (each.sum() / len(sizes)).backward()
        losses.scatter_add_(1, owners, each.detach().float().cpu())
    return [*losses.T]


def batches(lengths: Sequence[int], protocol: Protocol, seed: int, start: int = 0) -> Iterator[list[list[int]]]:
    """Yield the batches of each optimizer step, as places of examples, without end.

    The order depends on the seed and the epoch alone, so that a resumed run goes on in it, at step ``start``.

    >>> steps = batches([2] * 5, Protocol(batch=2, accumulate=2), seed=0)
    >>> [[len(batch) for batch in next(steps)] for _ in range(3)]
    [[2, 2], [1], [2, 2]]
    """
    step = 0
    for epoch in itertools.count():
        draw = torch.Generator().manual_seed((seed << 20) + epoch)
        if protocol.by_length:
            order = get_length_grouped_indices(list(lengths), protocol.batch, generator=draw)
        else:
            order = torch.randperm(len(lengths), generator=draw).tolist()
        cut = [order[k : k + protocol.batch] for k in range(0, len(order), protocol.batch)]
        for k in range(0, len(cut), protocol.accumulate):
            if step >= start:
                yield cut[k : k + protocol.accumulate]
            step += 1


def schedule(protocol: Protocol, step: int) -> float:
    """Return the factor of the learning rate after ``step`` steps, as transformers' schedules of these names have it.

    >>> [schedule(Protocol(steps=4, warmup=0.5), step) for step in range(4)]
    [0.0, 0.5, 1.0, 0.5]
    """
    warmup = round(protocol.warmup * protocol.steps)
    if protocol.schedule == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if protocol.schedule == "constant_with_warmup":
        return 1.0
    gone = (step - warmup) / max(1, protocol.steps - warmup)
    return 1.0 - gone if protocol.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * gone))


def optimizer(
    model: torch.nn.Module,
    protocol: Protocol,
    lr: float,
    loss: Callable[[torch.nn.Module], torch.Tensor] | None = None,
) -> torch.optim.Optimizer:
    """Return a fused AdamW whose groups learn at the rates that the protocol asks for.

    ``loss`` is that of a batch, for rates that are measured.
    """
    relative = protocol.relative_step or (lr if protocol.rate_rule != "rate" else 0.0)
    rule = protocol.rate_rule if protocol.rate_rule in ("structure", "measured") else "gain"
    ours = any(hasattr(config, "lr_multiplier") for config in getattr(model, "peft_config", {}).values())
    groups: Any = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]
    if (relative or protocol.precondition) and not ours:
        raise StudyError("relative_step and precondition are for networks", remedy="train a family or a line")
    if ours:
        groups = tnpeft.parameter_groups(model, lr=lr, relative_step=relative or None, rule=rule, batch=loss)
    if protocol.head_lr:
        head = {id(p): p for name, p in model.named_parameters() if p.requires_grad and methods.of_head(name)}
        groups = [{**group, "params": [p for p in group["params"] if id(p) not in head]} for group in groups]
        groups = [group for group in groups if group["params"]]
        groups += [{"params": list(head.values()), "lr": protocol.head_lr}] if head else []
    chosen = torch.optim.AdamW(groups, lr=lr, weight_decay=protocol.weight_decay, fused=True)
    if protocol.precondition:
        tnpeft.optim.precondition(chosen, model, invariant=True)
    return chosen


@dataclass
class _State:
    """All that a training changes: weights, optimizer, random numbers, courses."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    courses: list[Course]

    def weights(self, k: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the trained arrays of run k: its slices, if there are several runs."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter if len(self.courses) == 1 else parameter[k]

    def running(self, protocol: Protocol) -> list[int]:
        """The runs that their protocol lets go on."""
        each = enumerate(self.courses)
        return [k for k, course in each if not course.should_stop(protocol.patience, protocol.best_by)]

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint as a whole, and remove the older ones."""
        tensors = {f"model/{name}": p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        for k, course in enumerate(self.courses):
            tensors |= {f"weights/{k}/{name}": value for name, value in course.weights.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in values.items()}
        tensors["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        courses = json.dumps([{"curve": course.curve} for course in self.courses])
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / f"checkpoint-{step}.safetensors") as part:
            its = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            save_file(its, part, metadata={"step": str(step), "courses": courses})
        for old in _checkpoints(folder)[:-_KEPT]:
            old.unlink(missing_ok=True)

    def resume(self, folder: Path) -> int:
        """Take up the newest whole checkpoint and return its step, 0 without one; damaged ones are removed."""
        for path in reversed(_checkpoints(folder)):
            try:
                with safe_open(path, "pt") as file:
                    saved = file.metadata()
                    tensors = {name.partition("/")[::2]: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError):
                path.unlink(missing_ok=True)
                continue
            for course, its in zip(self.courses, json.loads(saved["courses"]), strict=True):
                course.curve = [tuple(row) for row in its["curve"]]
            state: dict[int, dict[str, torch.Tensor]] = {}
            with torch.no_grad():
                for (kind, rest), tensor in tensors.items():
                    key, _, name = rest.partition("/")
                    if kind == "model":
                        self.model.get_parameter(rest).copy_(tensor)
                    elif kind == "optimizer":
                        state.setdefault(int(key), {})[name] = tensor
                    elif kind == "weights":
                        self.courses[int(key)].weights[name] = tensor.to(next(self.model.parameters()).device)
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            torch.set_rng_state(tensors["random", ""])
            if ("cuda", "") in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["cuda", ""])
            return int(saved["step"])
        return 0


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("checkpoint-*.safetensors"), key=lambda path: int(path.stem.partition("-")[2]))
