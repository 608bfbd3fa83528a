"""From examples to class scores: token ids, batches, and label words or a classification head."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from tnpeft.studies.files import StudyError
from tnpeft.studies.tasks.data import Example
from tnpeft.studies.tasks.task import METRICS, Task

Batch = dict[str, torch.Tensor]
Rows = Sequence[dict[str, Any]]  # encoded examples
MicroBatch = list[list[int]]  # places of examples, equally many of each run

# Tokens that take as long as the fixed cost of a forward pass, and the most tokens of one. Measured on a CPU, where
# larger ones leave its cache; elsewhere a guess.
_COSTS = {"cpu": (50, 1024)}
_ELSEWHERE = (4096, 65536)


class Scorer:
    """Encodes a task's examples for a model and turns the model's logits into one score per class.

    With label words a class scores the mean log-probability of its word's tokens after the prompt; words of one
    token each need one row per example, longer ones a row per example and class.

    Args:
        task: the task.
        tokenizer: a Hugging Face tokenizer.
        head: ``"words"`` or ``"classifier"``.
        max_length: tokens of a prompt with its word; what is longer loses its beginning.

    >>> from tnpeft.studies.backbones import byte_tokenizer
    >>> from tnpeft.studies.tasks.task import task
    >>> scorer = Scorer(task("sst2"), byte_tokenizer())
    >>> [len(row["ids"]) for row in scorer.encode([Example("fine. It was", "fine.", 1)])]
    [12]
    """

    def __init__(self, task: Task, tokenizer: Any, head: str = "words", max_length: int = 256) -> None:
        self.task, self.tokenizer, self.head, self.max_length = task, tokenizer, head, max_length
        self.words: list[list[int]] = []
        where = f"task {task.name!r}"
        if not tokenizer("a b 1", add_special_tokens=False).input_ids:
            raise StudyError("the tokenizer knows no tokens", remedy="name the model's tokenizer with --tokenizer")
        if head == "words":
            self.words = [tokenizer(w, add_special_tokens=False).input_ids for w in task.words.values()]
            if not all(self.words) or len({tuple(ids) for ids in self.words}) < len(self.words):
                raise StudyError("two label words are the same to the tokenizer", where=where)
        self.width = max((len(ids) for ids in self.words), default=1)
        if max_length <= self.width * (head == "words"):
            problem = f"max_length = {max_length} leaves no room before the {self.width} tokens of a label word"
            raise StudyError(problem, where=where, remedy=f"set max_length to at least {self.width + 1}")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad = 0 if pad is None else pad

    def encode(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Token ids and label of each example."""
        texts = [e.prompt if self.head == "words" else e.text for e in examples]
        rows = self.tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False).input_ids
        return [{"ids": self._cut(ids), "label": e.label} for ids, e in zip(rows, examples, strict=True)]

    def _cut(self, ids: list[int]) -> list[int]:
        special = set(self.tokenizer.all_special_ids)
        if self.head == "words" and len(ids) > 1 and ids[-1] in special:
            ids = ids[:-1]
        room = self.max_length - (self.width if self.head == "words" else 0)
        if len(ids) <= room:
            return ids
        lead = ids[:1] if ids[0] in special else []
        return lead + ids[len(ids) - room + len(lead) :]

    def collate(self, rows: Rows) -> Batch:
        """A batch of encoded examples, padded on the left for words and on the right for a classifier."""
        ends = [[]] if self.width == 1 else [word[:-1] for word in self.words]
        ids = [torch.tensor(row["ids"] + end, dtype=torch.long) for row in rows for end in ends]
        side = "left" if self.head == "words" else "right"
        return {
            "labels": torch.tensor([row["label"] for row in rows]),
            "input_ids": pad_sequence(ids, True, self.pad, side),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0, side),
        }

    def cut(self, runs: Sequence[Rows], device: torch.device) -> Iterator[tuple[MicroBatch, Batch]]:
        """Yield the rows of some runs, equally many of each, in micro-batches of about equal length.

        No micro-batch has padding that it does not need. Each comes with the places of its examples in their runs.
        """
        batch = {name: its.to(device) for name, its in self.collate([row for own in runs for row in own]).items()}
        ids, mask, count = batch["input_ids"], batch["attention_mask"], len(batch["labels"])
        lengths = mask.sum(1).view(count, -1).amax(1).view(len(runs), -1)
        starts = torch.arange(0, count, count // len(runs))[:, None]
        for lot in micro_batches(lengths.tolist(), len(ids) // count, device.type):
            places = (torch.tensor(lot) + starts).flatten().to(device)
            rows = torch.arange(len(ids), device=device).view(count, -1)[places].flatten()
            longest = int(mask[rows].sum(1).max())
            columns = slice(-longest, None) if self.head == "words" else slice(longest)
            part = {"input_ids": ids[rows, columns], "attention_mask": mask[rows, columns]}
            yield lot, {"labels": batch["labels"][places], **part}

    def losses(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The cross-entropy of every example, ``[examples]``."""
        return nn.functional.cross_entropy(self.scores(model, batch), batch["labels"], reduction="none")

    def scores(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Scores ``[examples, classes]`` of a batch; a cross-entropy over them is the training loss."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if self.head == "classifier":
            return model(**inputs).logits.float()
        if _takes(model, "position_ids"):
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        if _takes(model, "logits_to_keep"):
            inputs["logits_to_keep"] = self.width
        if self.width > 1:
            return self._mean_log_probabilities(model(**inputs).logits[:, -self.width :].float())
        words = [ids[0] for ids in self.words]
        with only(model, words) as alone:
            logits = model(**inputs).logits[:, -1].float()
        return logits if alone else logits[:, words]

    def _mean_log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The rows are example by example, class by class; a word's tokens are predicted at its row's last places."""
        classes = len(self.words)
        grouped = logits.log_softmax(-1).view(-1, classes, self.width, logits.shape[-1])
        columns = [
            grouped[:, k, self.width - len(ids) :].gather(
                -1, torch.tensor(ids, device=logits.device).expand(len(grouped), -1).unsqueeze(-1)
            )
            for k, ids in enumerate(self.words)
        ]
        return torch.stack([column.squeeze(-1).mean(-1) for column in columns], dim=1)


def micro_batches(lengths: Sequence[Sequence[int]], rows: int = 1, device: str = "cpu") -> list[MicroBatch]:
    """Return the cheapest micro-batches of all examples of some runs, with equally many of each run in each.

    ``lengths`` are the tokens of each run's examples, each of which makes so many ``rows`` of that length.

    >>> micro_batches([[90, 9, 8], [7, 8, 80]])
    [[[2, 1], [0, 1]], [[0], [2]]]
    """
    fixed, most = _COSTS.get(device, _ELSEWHERE)
    costs, starts = [0], [0]  # of everything before each place, and where the last micro-batch before it starts
    for stop, top in enumerate((max(each) for each in zip(*map(sorted, lengths), strict=True)), start=1):
        tokens = len(lengths) * rows * top
        choices = range(max(0, stop - max(1, most // tokens)), stop)
        cost, start = min((costs[k] + fixed + tokens * (stop - k), k) for k in choices)
        costs.append(cost)
        starts.append(start)
    orders = [sorted(range(len(each)), key=each.__getitem__) for each in lengths]
    found, stop = list[MicroBatch](), len(starts) - 1
    while stop:
        found.append([order[starts[stop] : stop] for order in orders])
        stop = starts[stop]
    return found[::-1]


@contextmanager
def only(model: Any, tokens: Sequence[int]) -> Iterator[bool]:
    """Let a language model's head give the logits of a few tokens, of the last place alone, while this lasts.

    The product with a whole vocabulary can take longer than all else in a small model. Yields False where the head is
    more than a plain linear, and stays as it is.
    """
    head = inner(model).get_output_embeddings()
    plain = type(head) is nn.Linear and type(head.weight.detach()) is torch.Tensor
    if not plain or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        yield False
        return

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias[rows]
        return nn.functional.linear(hidden[:, -1], head.weight[rows], bias)[:, None]

    rows = torch.tensor(tokens, device=head.weight.device)
    head.forward = forward
    try:
        yield True
    finally:
        del head.forward


def inner(model: Any) -> Any:
    """Return the transformer inside PEFT's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _takes(model: Any, name: str) -> bool:
    """Return True if the transformer's forward has that argument."""
    return name in inspect.signature(inner(model).forward).parameters


@dataclass(frozen=True)
class Judged:
    """A model's guesses and the labels, in the order of the examples, and its mean cross-entropy."""

    guesses: list[int]
    labels: list[int]
    loss: float

    def scores(self, classes: int) -> dict[str, float]:
        """Every metric that so many classes have.

        >>> Judged([1, 1], [0, 1], 0.5).scores(2)
        {'accuracy': 0.5, 'matthews': 0.0, 'f1': 0.6666666666666666}
        """
        names = METRICS if classes == 2 else METRICS[:1]
        return {name: metric(name, self.guesses, self.labels) for name in names}


def evaluate(scorer: Scorer, model: torch.nn.Module, rows: Rows) -> tuple[float, float]:
    """The task's metric and the mean cross-entropy over encoded examples, in evaluation mode."""
    (found,) = judge(scorer, model, [rows])
    return metric(scorer.task.metric, found.guesses, found.labels), found.loss


@torch.no_grad()
def judge(scorer: Scorer, model: torch.nn.Module, rows: Sequence[Rows]) -> list[Judged]:
    """Return a model's predictions for encoded examples, in evaluation mode: each replica's for its own rows."""
    if len({len(its) for its in rows}) > 1:
        raise StudyError("the runs are judged on sets of different sizes", remedy="make these runs alone")
    was, device, runs = model.training, next(model.parameters()).device, len(rows)
    model.eval()
    guesses = torch.zeros(runs, len(rows[0]), dtype=torch.long)
    loss = torch.zeros(runs)
    for lot, batch in scorer.cut(rows, device):
        scores = scorer.scores(model, batch)
        each = nn.functional.cross_entropy(scores, batch["labels"], reduction="none")
        loss += each.view(runs, -1).sum(1).cpu()
        guesses.scatter_(1, torch.tensor(lot), scores.argmax(-1).view(runs, -1).cpu())
    model.train(was)
    labels = [[row["label"] for row in its] for its in rows]
    return [Judged(*its) for its in zip(guesses.tolist(), labels, (loss / len(rows[0])).tolist(), strict=True)]


def metric(name: str, guesses: Sequence[int], labels: Sequence[int]) -> float:
    """Accuracy, Matthews correlation (of two classes) or F1 of the second class."""
    pairs = list(zip(guesses, labels, strict=True))
    if name == "accuracy":
        return sum(g == y for g, y in pairs) / len(pairs)
    both, neither = pairs.count((1, 1)), pairs.count((0, 0))
    false, missed = pairs.count((1, 0)), pairs.count((0, 1))
    if name == "f1":
        return 2 * both / max(1, 2 * both + false + missed)
    spread = (both + false) * (both + missed) * (neither + false) * (neither + missed)
    return (both * neither - false * missed) / spread**0.5 if spread else 0.0
