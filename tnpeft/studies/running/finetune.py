"""One adapter on one task, from a name to a saved folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tnpeft.studies import backbones
from tnpeft.studies.files import StudyError, read_json, write_json
from tnpeft.studies.methods import check
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.running.execution import train_and_evaluate
from tnpeft.studies.running.sweeping import one_process
from tnpeft.studies.runs import Run
from tnpeft.studies.tasks.data import load
from tnpeft.studies.tasks.task import task as task_of


def train(
    out: str | Path,
    *,
    model: str,
    task: str | Mapping[str, Any],
    method: Mapping[str, Any],
    data: str = "",
    tokenizer: str = "",
    lr: float = 1e-3,
    seed: int = 0,
    progress: Any = None,
    say: Any = lambda _: None,
    **settings: Any,
) -> dict[str, Any]:
    """Adapt a model and return the result, as ``out/result.json`` has it; the adapter is saved in ``out/adapter``.

    Interrupted and called again it goes on from its last evaluation; finished and called again it returns the result.

    Args:
        out: folder to write.
        model: hub id, folder (also one with a .gguf file), ``random:facebook/opt-125m``, or ``digits``.
        task: name of a task, or a table that describes one.
        method: ``{"family": "cp", "args": {"rank": 8}}``; also ``line`` (ranks and so on in ``args``) or ``peft``.
        data: folder with the task's files, or ``hub``.
        tokenizer: hub id or folder, if it is not the model's own.
        lr: learning rate.
        seed: of splits, order and initial values.
        progress: called with step, steps, training loss and dev score at every evaluation.
        say: called with what is done now, in words.
        settings: of :class:`Protocol`.

    Raises:
        StudyError: data or settings are wrong (nothing has been trained then), or ``out`` holds another run.

    >>> import tempfile
    >>> lora = {"family": "lora", "args": {"rank": 1}}
    >>> with tempfile.TemporaryDirectory() as out:
    ...     result = train(out, model="digits:0", task="digits_upright", method=lora, steps=1, train=8, dev=8, eval=8)
    >>> result["steps"], result["parameters"] > 0
    (1, True)
    """
    one_process()
    check(method)
    if not 0 < lr < math.inf:
        raise StudyError(f"lr = {lr}", where="train", remedy="give a positive learning rate")
    out, table, protocol = Path(out), task_of(task), Protocol.of(settings)
    cache = out / "cache"
    places = {"model": model, "data": data, "tokenizer": tokenizer, "cache": str(cache)}
    examples = load(table, data).digest
    identity = backbones.identity(model, cache)
    run = Run(asdict(table), examples, method, protocol.training, lr, seed, identity, places)
    redo = "remove the folder, and the run is made again"
    result, begun = read_json(out / "result.json", redo), any((out / "checkpoints").glob("*"))
    if result or begun:
        if (read_json(out / "run.json", redo) or {}).get("key") != run.key:
            raise StudyError("holds another run", where=str(out), remedy="choose another folder, or remove it")
        if result:
            return result
    backbones.reach(model, tokenizer, cache)
    write_json(out / "run.json", {"key": run.key, "run": run.identity})

    def keep(trained: Any, words: Any) -> None:
        trained.save_pretrained(out / "adapter")
        words.save_pretrained(out / "adapter")

    (result,) = train_and_evaluate([run], folder=out / "checkpoints", progress=progress, say=say, keep=keep)
    write_json(out / "result.json", result)
    return result
