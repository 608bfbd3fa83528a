"""One adapter on one task, from a name to a saved folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tnpeft.studies import backbones, processes
from tnpeft.studies.data import load
from tnpeft.studies.files import StudyError, write_json
from tnpeft.studies.methods import check
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.runs import Run, perform
from tnpeft.studies.tasks import task as task_of


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
    **settings: Any,
) -> dict[str, Any]:
    """The result of adapting a model, as ``out/result.json`` has it; the adapter is saved in ``out/adapter``.

    Interrupted and called again it goes on from its last evaluation; finished and called again it returns the result.
    Under ``torchrun`` its processes share every batch, and the result is that of one process to rounding.

    Args:
        out: folder to write.
        model: hub id, folder (also one with a .gguf file), ``random:facebook/opt-125m``, or ``digits``.
        task: name of a task, or a table that describes one.
        method: ``{"family": "cp", "args": {"rank": 8}}``; also ``line`` (ranks and so on in ``args``) or ``peft``.
        data: folder with the task's files, or ``hub``.
        tokenizer: hub id or folder, if it is not the model's own.
        lr: learning rate.
        seed: of splits, order and start values.
        progress: called with step, steps, training loss and dev score at every evaluation.
        settings: of :class:`Protocol`.

    Raises:
        StudyError: data or settings are wrong (nothing has been trained then), or ``out`` holds another run.
    """
    check(method)
    if not 0 < lr < math.inf:
        raise StudyError(f"lr = {lr}", where="train", remedy="give a positive learning rate")
    out, its, protocol = Path(out), task_of(task), Protocol.of(settings)
    cache = out / "cache"
    places = {"model": model, "data": data, "tokenizer": tokenizer, "cache": str(cache)}
    examples = load(its, data).digest
    identity = backbones.identity(model, cache)
    run = Run(asdict(its), examples, method, protocol.training, lr, seed, identity, places)
    if (out / "run.json").exists() and begun(out):
        if json.loads((out / "run.json").read_text(encoding="utf-8"))["key"] != run.key:
            raise StudyError("holds another run", where=str(out), remedy="choose another folder, or remove it")
        if (out / "result.json").exists():
            found: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
            return found
    backbones.reach(model, tokenizer, cache)
    if processes.first():
        write_json(out / "run.json", {"key": run.key, "run": run.identity})

    def keep(trained: Any, words: Any) -> None:
        trained.save_pretrained(out / "adapter")
        words.save_pretrained(out / "adapter")

    result = perform(run, folder=out / "checkpoints", progress=progress, keep=keep)
    if processes.first():
        write_json(out / "result.json", result)
    return result


def begun(out: Path) -> bool:
    """Whether there is anything in a run's folder that another run would spoil."""
    return (out / "result.json").exists() or any((out / "checkpoints").glob("*"))
