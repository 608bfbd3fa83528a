"""Making runs: once each, several in one pass where they can share it, with a record of every outcome."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnpeft.studies import backbones, methods
from tnpeft.studies.files import StudyError
from tnpeft.studies.protocol import Protocol
from tnpeft.studies.runs import Job, Run, Store, finite, quiet, versions
from tnpeft.studies.tasks.data import load
from tnpeft.studies.tasks.task import Task
from tnpeft.studies.tasks.task import task as task_of

if TYPE_CHECKING:
    from tnpeft.studies.running.training import Course
    from tnpeft.studies.tasks.data import Splits
    from tnpeft.studies.tasks.scoring import Judged


def run_once(job: Job, store: Store, *, retry: bool = False) -> list[str]:
    """Make the runs of a job that have no result yet, in one pass, and return the status of each.

    ``done`` after making it, ``kept`` if its result was there, ``failed``, or ``busy`` (made elsewhere). Each run has
    its file as if it had been made alone, with their number under ``pack``. A job of which a run is under way
    elsewhere is left alone as a whole: which runs share a pass does not depend on what else is going on.
    """
    with contextlib.ExitStack() as stack:
        claimed = all(stack.enter_context(store.claim(run.key)) for run in job)
        store.recover()
        status = dict.fromkeys((run.key for run in job), "")
        for key in status:
            if store.result(key):
                status[key] = "kept"
            elif not claimed:
                status[key] = "busy"
            elif store.failure(key) and not retry:
                status[key] = "failed"
        fresh = [run for run in job if not status[run.key]]
        if fresh:
            status |= zip((run.key for run in fresh), run_and_store(fresh, store), strict=True)
        return [status[run.key] for run in job]


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
    common: dict[str, Any] = {
        "versions": versions(),
        "machine": {"device": str(model.device), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({"pack": len(job)} if several else {}),
    }
    parts = zip(job, sizes, splits, courses, reached, strict=True)
    return [{**_outcome(task, seconds / len(job), *part), **common} for part in parts]


def _outcome(
    task: Task, seconds: float, run: Run, sizes: tuple[int, int], splits: Splits, course: Course, judged: Judged
) -> dict[str, Any]:
    """Return what the record of a run says of this run: ``sizes`` of adapter and head, ``judged`` on eval."""
    steps, scores = course.curve[-1][0], judged.scores(len(task.labels))
    return {
        "key": run.key,
        "run": run.identity,
        "model": Path(run.places.get("model", run.backbone)).name,
        "parameters": sizes[0],
        "head_parameters": sizes[1],
        "examples": [len(splits.train), len(splits.dev), len(splits.eval)],
        "metric": task.metric,
        "dev": course.dev,
        "eval": scores[task.metric],
        "eval_loss": finite(judged.loss),
        "scores": scores,
        "predictions": judged.guesses,
        "labels": judged.labels,
        "best_step": course.step,
        "steps": steps,
        "curve": [[row[0], *map(finite, row[1:])] for row in course.curve],
        "timing": {"train_seconds": round(seconds, 3), "step_ms": round(1000 * seconds / max(1, steps), 3)},
    }
