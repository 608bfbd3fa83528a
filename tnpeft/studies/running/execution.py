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
        status = {run.key: cached_status(run, store, claimed, retry) for run in job}
        fresh = [run for run in job if not status[run.key]]
        if fresh:
            status |= zip((run.key for run in fresh), run_and_store(fresh, store), strict=True)
        return [status[run.key] for run in job]


def cached_status(run: Run, store: Store, claimed: bool, retry: bool) -> str:
    """Return the status of a run that is not to be made now; nothing if it is."""
    if store.result(run.key):
        return "kept"
    if not claimed:
        return "busy"
    return "failed" if store.failure(run.key) and not retry else ""


def run_and_store(job: Job, store: Store, **note: Any) -> list[str]:
    """Make claimed runs in one pass and write their results, with the ``note`` in them, or a failure.

    If a pass of several fails, they are made one by one, and their files say why under ``unpacked``.
    """
    cause = trace = ""
    try:
        store.keep(job, [{**record, **note} for record in train_and_evaluate(job)])
    except Exception as error:
        cause, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    if not cause:
        return ["done"] * len(job)
    if len(job) > 1:
        return [status for run in job for status in run_and_store([run], store, unpacked=cause)]
    store.fail(job[0], cause, trace)
    return ["failed"]


def train_and_evaluate(
    job: Job, *, folder: Path | None = None, progress: Any = None, say: Any = None, keep: Any = None
) -> list[dict[str, Any]]:
    """Train the runs of a job side by side, evaluate them, and return their records.

    Args:
        job: one run, or several that :func:`packs` put together.
        folder: of checkpoints, from which an interrupted job goes on.
        progress, say: see :func:`tnpeft.studies.running.training.fit`.
        keep: called with the trained model and the tokenizer.

    Raises:
        StudyError: the runs cannot share a pass, or data, tokenizer and model do not fit each other.
    """
    import torch

    import tnpeft
    from tnpeft.studies.running import training
    from tnpeft.studies.tasks.scoring import Scorer, judge

    quiet()
    first, several = job[0], len(job) > 1
    task, protocol = terms(first)
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
    if several:
        _refuse_dropout(model.config.to_dict())
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
    if say:
        say(f"evaluating on {len(held[0])} held-out examples")
    reached = judge(scorer, model, held)
    if keep:
        keep(model, tokenizer)
    also = {"pack": len(job)} if several else {}
    parts = zip(job, sizes, splits, courses, reached, strict=True)
    return [{**described(*part, seconds / len(job), str(model.device)), **also} for part in parts]


def _refuse_dropout(config: dict[str, Any]) -> None:
    """Refuse dropout in a pass of several runs: their masks would come out of one stream of random numbers."""
    found = [name for name, value in config.items() if "drop" in name and isinstance(value, float) and value > 0]
    if found:
        raise StudyError(f"the backbone trains with {found[0]} = {config[found[0]]}", remedy="make such runs alone")


def terms(run: Run) -> tuple[Task, Protocol]:
    """Return the task and the protocol of a run."""
    task = task_of(dict(run.task))
    return task, Protocol.of({**run.protocol, "targets": list(run.protocol.get("targets", ()))})


def described(
    run: Run,
    parameters: tuple[int, int],
    splits: Splits,
    course: Course,
    judged: Judged,
    seconds: float,
    device: str,
) -> dict[str, Any]:
    """Return the record of a run, the content of its file; ``parameters`` of adapter and head, ``judged`` on eval."""
    import torch

    steps, task = course.curve[-1][0], terms(run)[0]
    scores = judged.scores(len(task.labels))
    return {
        "key": run.key,
        "run": run.identity,
        "model": Path(run.places.get("model", run.backbone)).name,
        "parameters": parameters[0],
        "head_parameters": parameters[1],
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
        "versions": versions(),
        "machine": {"device": device, "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
