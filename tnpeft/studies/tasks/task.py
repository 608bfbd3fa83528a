"""Tasks as data: which fields are read, how an example is put into words, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from string import Formatter
from typing import Any

from tnpeft.studies.files import StudyError
from tnpeft.studies.schema import build

METRICS = ("accuracy", "matthews", "f1")
_LIKE = "write it like 'Text: {text} It was', and {{ or }} for a brace"


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: what it is called.
        prompt: the example in words, ``{field}`` where a field of the row goes; the label word follows it.
        words: the word (with its leading blank) that stands for each label, by the label as text.
        text: the example for a classification head, without the question to which the word is the answer.
        train: file of the training part, below the data folder; ``digits:...`` for the embedded digits.
        eval: file of the part that results are reported on.
        hub: path, configuration, training split and evaluation split on the hub.
        label: field of the label.
        metric: accuracy, matthews (correlation) or f1 (of the second label).
        also: further metrics that a report shows.

    >>> SST2.fields, SST2.labels
    (('sentence',), ('0', '1'))
    """

    name: str
    prompt: str
    words: Mapping[str, str]
    text: str = ""
    train: str = ""
    eval: str = ""
    hub: tuple[str, ...] = ()
    label: str = "label"
    metric: str = "accuracy"
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        for name in (self.metric, *self.also):
            if name not in METRICS:
                raise StudyError(f"unknown metric {name!r}", where=where, remedy=f"use one of {', '.join(METRICS)}")
            if name != "accuracy" and len(self.words) > 2:
                raise StudyError(f"{name} is for two labels", where=where, remedy="use accuracy")
        if len(self.words) < 2:
            raise StudyError("needs a word for each of at least two labels", where=where, remedy="complete words")
        try:
            fields = self.fields
        except ValueError as error:
            raise StudyError(f"invalid format string in the prompt: {error}", where=where, remedy=_LIKE) from None
        if not fields or "" in fields:
            raise StudyError("the prompt names no field", where=where, remedy=_LIKE)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels as text; an example's class is its label's place here."""
        return tuple(self.words)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the prompt and the text name."""
        parts = (part for text in (self.prompt, self.text) for part in Formatter().parse(text))
        return tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))


_GLUE = "nyu-mll/glue"  # columns sentence, or sentence1 and sentence2, and label


def _known(name: str, prompt: str, no: str, yes: str, text: str, hub: str = _GLUE, **more: Any) -> Task:
    """A task of two labels with a data set of its name on the hub, or files in a folder of its name."""
    files = {"train": f"{name}/train.jsonl.gz", "eval": f"{name}/dev.jsonl.gz"}
    return Task(name, prompt, {"0": no, "1": yes}, text, **files, hub=(hub, name, "train", "validation"), **more)


def _digits(shift: str) -> Task:
    words = {str(digit): f" digit{digit}" for digit in range(10)}
    parts = {"train": f"digits:{shift}/train", "eval": f"digits:{shift}/eval"}
    return Task(f"digits_{shift}", "{image}", words, text="{image}", **parts)


# Prompts and words of SST-2, RTE and BoolQ: the public MeZO code, the CP paper's own are unknown.
_PAIR = '{sentence1}\nDoes this mean %s "{sentence2}"%s? Yes or No?\n'
_BOTH = "{sentence1}\n{sentence2}"
SST2 = _known("sst2", "{sentence} It was", " terrible", " great", "{sentence}")
RTE = _known("rte", _PAIR % ("that", " is true"), "Yes", "No", _BOTH)
BOOLQ = _known("boolq", "{passage} {question}?", " No", " Yes", "{passage}\n{question}?", "aps/super_glue")
BOOLQ_GOOGLE = replace(BOOLQ, name="boolq_google", hub=("google/boolq", "", "train", "validation"), label="answer")
MRPC = _known("mrpc", _PAIR % ("the same as", ""), "No", "Yes", _BOTH, also=("f1", "matthews"))
COLA = _known("cola", "{sentence} This is", " wrong", " correct", "{sentence}", metric="matthews", also=("accuracy",))

TASKS: dict[str, Task] = {task.name: task for task in (SST2, RTE, BOOLQ, BOOLQ_GOOGLE, MRPC, COLA)}
TASKS |= {task.name: task for task in map(_digits, ("upright", "inverted", "transposed", "shifted"))}


def task(given: str | Mapping[str, Any]) -> Task:
    """A task by its name, or one of your own from a table with the attributes of :class:`Task`.

    A table with the name of a known task changes that one, such as the words that stand for its labels.

    Raises:
        StudyError: the name or a key is unknown, or something is missing.

    >>> mine = task({"name": "mine", "train": "a.csv", "eval": "b.csv",
    ...              "prompt": "{text} It was", "words": {"neg": " bad", "pos": " good"}})
    >>> mine.labels
    ('neg', 'pos')
    >>> task({"name": "sst2", "words": {"0": " bad", "1": " good"}}).prompt
    '{sentence} It was'
    """
    name = given if isinstance(given, str) else given.get("name")
    known = TASKS.get(str(name))
    if known is None and (isinstance(given, str) or set(given) == {"name"}):
        raise StudyError(f"no task is called {name!r}", remedy=f"the tasks are {', '.join(TASKS)}")
    table = {**(asdict(known) if known else {}), **({} if isinstance(given, str) else given)}
    if isinstance(words := table.get("words"), Mapping):
        table["words"] = {str(label): str(word) for label, word in words.items()}
    return build(Task, table, f"task {name!r}")
