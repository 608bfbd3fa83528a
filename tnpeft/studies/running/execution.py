"""Making runs: once each, several in one pass where they can share it, with a record of every outcome.

And one alone, from a name to a saved folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tnpeft.studies import backbones, methods
from tnpeft.studies.files import StudyError, read_json, write_json
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.runs import Job, Run, Store, finite, quiet, versions
from tnpeft.studies.tasks.data import load
from tnpeft.studies.tasks.task import task as task_of


def run_once(job: Job, store: Store, *, retry: bool = False) -> list[str]:
    """Make the runs of a job that have no result yet, in one pass, and return the status of each.

    ``done`` after making it, ``kept`` if its result was there, ``failed``, or ``busy`` (made elsewhere). Each run has
    its file as if it had been made alone, with their number under ``pack``. A job of which a run is under way
    elsewhere is left alone as a whole: which runs share a pass does not depend on what else is going on.
    """
    with contextlib.ExitStack() as stack:
        claimed = all(stack.enter_context(store.claim(run.key)) for run in job)
        store.recover()

        def known(run: Run) -> str:
            if store.result(run.key):
                return "kept"
            return "busy" if not claimed else "failed" if store.failure(run.key) and not retry else ""

        status = {run.key: known(run) for run in job}
        fresh = [run for run in job if not status[run.key]]
        if fresh:
            status |= zip((run.key for run in fresh), run_and_store(fresh, store), strict=True)
        return [*status.values()]


def run_and_store(job: Job, store: Store, **note: Any) -> list[str]:
    """Make claimed runs in one pass and write their results, with the ``note`` in them, or a failure.

    If a pass of several fails, they are made one by one, and their files say why under ``unpacked``.
    """
    try:
        store.keep(job, [{**record, **note} for record in train_and_evaluate(job)])
        return ["done"] * len(job)
    except Exception as error:
        cause, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    if len(job) > 1:
        return [status for run in job for status in run_and_store([run], store, unpacked=cause)]
    store.fail(job[0], cause, trace)
    return ["failed"]


def train_and_evaluate(
    job: Job, *, folder: Path | None = None, progress: Any = None, say: Any = lambda _: None, keep: Any = None
) -> list[dict[str, Any]]:
    """Train the runs of a job side by side, evaluate them, and return their records.

    ``keep`` is called with the trained model and the tokenizer; the rest is as in
    :func:`tnpeft.studies.running.training.fit`.
    """
    import torch

    import tnpeft
    from tnpeft.studies.running import training
    from tnpeft.studies.tasks.scoring import Scorer, judge

    quiet()
    first, several = job[0], len(job) > 1
    task, protocol = task_of(dict(first.task)), Protocol.of(first.protocol)
    data = load(task, first.places.get("data", ""))
    splits = [data.splits(run.seed, protocol.train, protocol.dev, protocol.eval) for run in job]
    protocol = protocol.on(len(splits[0].train))
    torch.manual_seed(first.seed)  # a new classification head draws from it
    model, tokenizer = backbones.load(
        first.places.get("model", first.backbone),
        head=protocol.head,
        classes=len(task.labels),
        dtype=protocol.dtype,
        cache=Path(first.places.get("cache", "runs/cache")),
        tokenizer=first.places.get("tokenizer", ""),
    )
    dropout = {name: p for name, p in model.config.to_dict().items() if "drop" in name and isinstance(p, float) and p}
    if several and dropout:  # the runs' masks would come out of one stream of random numbers
        name, p = next(iter(dropout.items()))
        raise StudyError(f"the backbone trains with {name} = {p}", remedy="make such runs alone")
    scorer = Scorer(task, tokenizer, protocol.head, protocol.max_length)
    held = [scorer.encode(each.eval) for each in splits]
    training.check_rows(model, scorer, held[0])
    model = methods.attach(
        model,
        first.method,
        protocol.targets,
        classifier=protocol.head == "classifier",
        seed=first.seed,
        replicas=[(run.method, run.seed) for run in job] if several else (),
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [(tnpeft.replicas.parameters(model, k), 0) for k in range(len(job))] if several else []
    sizes = sizes or [methods.trainable(model)]
    lrs, seeds = [run.lr for run in job], [run.seed for run in job]
    courses, seconds = training.fit(
        model, scorer, splits, protocol, lrs=lrs, seeds=seeds, folder=folder, progress=progress, say=say
    )
    say(f"evaluating on {len(held[0])} held-out examples")
    reached = judge(scorer, model, held)
    if keep:
        keep(model, tokenizer)
    seconds /= len(job)
    common: dict[str, Any] = {
        "metric": task.metric,
        "versions": versions(),
        "machine": {"device": str(model.device), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({"pack": len(job)} if several else {}),
    }
    records = []
    for run, (adapter, head), its, course, judged in zip(job, sizes, splits, courses, reached, strict=True):
        (best_step, _, dev, _), steps = course.reported, course.curve[-1][0]
        scores = judged.scores(len(task.labels))
        records.append(
            {
                "key": run.key,
                "run": run.identity,
                "model": Path(run.places.get("model", run.backbone)).name,
                "parameters": adapter,
                "head_parameters": head,
                "examples": [len(its.train), len(its.dev), len(its.eval)],
                "dev": dev,
                "eval": scores[task.metric],
                "eval_loss": finite(judged.loss),
                "scores": scores,
                "predictions": judged.guesses,
                "labels": judged.labels,
                "best_step": best_step,
                "steps": steps,
                "curve": [[row[0], *map(finite, row[1:])] for row in course.curve],
                "timing": {"train_seconds": round(seconds, 3), "step_ms": round(1000 * seconds / max(1, steps), 3)},
                **common,
            }
        )
    return records


def one_process() -> None:
    """Refuse to be one of several processes of ``torchrun``."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise StudyError("started by torchrun", remedy="one process makes a run; sweep --workers N makes N at once")


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
    methods.check(method)
    if not 0 < lr < math.inf:
        raise StudyError(f"lr = {lr}", where="train", remedy="give a positive learning rate")
    out, table, protocol = Path(out), task_of(task), Protocol.of(settings)
    cache, examples = out / "cache", load(table, data).digest
    places = {"model": model, "data": data, "tokenizer": tokenizer, "cache": str(cache)}
    identity = backbones.identity(model, cache, tokenizer)
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
