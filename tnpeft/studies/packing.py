"""Runs that differ in seed, learning rate, ranks and scale alone, made in one pass over one frozen backbone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from tnpeft.networks import common
from tnpeft.studies import methods
from tnpeft.studies.backbones import RANDOM
from tnpeft.studies.files import StudyError, canonical
from tnpeft.studies.runs import Run, Store, backbone, described, execute, make, quiet, settled, terms

Job = tuple[Run, ...]  # runs that are made in one pass


def packs(runs: Sequence[Run], size: int) -> list[Job]:
    """The runs as jobs of up to ``size`` that can share a pass, in the order of their first runs.

    They can if they train a family or a line and differ in nothing but seed, learning rate, ranks and scale. A new
    head or a backbone with random weights would come out of each run's own seed, so these are made alone.

    >>> protocol = {"steps": 1, "head": "words"}
    >>> three = [Run({"name": "a"}, "d", {"family": "lora"}, protocol, 1e-3, seed, "b") for seed in (0, 1, 2)]
    >>> [len(job) for job in packs(three, 2)]
    [2, 1]
    """
    jobs: list[list[Run]] = []
    open_jobs: dict[str, list[Run]] = {}
    for run in runs:
        kind = _kind(run)
        job = open_jobs.get(kind)
        if job is None or len(job) >= size:
            job = []
            jobs.append(job)
            if kind:
                open_jobs[kind] = job
        job.append(run)
    return [tuple(job) for job in jobs]


def _kind(run: Run) -> str:
    """What runs of one pass have in common; nothing for a run that is made alone."""
    adapter = "family" in run.method or "line" in run.method
    length = run.protocol.get("epochs", 0) or run.protocol.get("steps", 0)
    words = run.protocol.get("head") == "words" and length > 0
    fixed = not run.places.get("model", run.backbone).startswith(RANDOM)
    if not (adapter and words and fixed):
        return ""
    shared = {k: v for k, v in run.identity.items() if k not in ("lr", "seed", "method")}
    if run.protocol.get("precondition"):
        return ""
    by_rule = run.protocol.get("relative_step") or run.protocol.get("rate_rule") == "relative_step"
    method = run.method if by_rule else str(common(methods.factorization(run.method)))  # a rule depends on the ranks
    return canonical([shared, dict(run.places), method])


def execute_pack(runs: Job, store: Store, *, retry: bool = False) -> list[str]:
    """What :func:`tnpeft.studies.runs.execute` says of each run; those that are still to be made share one pass.

    Each has its own file as if it had been made alone, with their number under ``pack``. If the pass fails, they are
    made one by one, and their files say why under ``unpacked``. A pack of which a run is under way elsewhere is left
    alone as a whole: which runs share a pass does not depend on what else is going on.
    """
    if len(runs) == 1:
        return [execute(runs[0], store, retry=retry)]
    with contextlib.ExitStack() as stack:
        ours = all(stack.enter_context(store.claim(run.key)) for run in runs)
        store.recover()
        found = {run.key: settled(run, store, ours, retry) for run in runs}
        fresh = tuple(run for run in runs if not found[run.key])
        note: dict[str, Any] = {}
        if len(fresh) > 1:
            try:
                store.keep_all(fresh, perform_pack(fresh))
                found |= {run.key: "done" for run in fresh}
            except Exception as error:
                note = {"unpacked": f"{type(error).__name__}: {error}"}
        for run in fresh:
            found[run.key] = found[run.key] or make(run, store, **note)
        return [found[run.key] for run in runs]


def perform_pack(runs: Job) -> list[dict[str, Any]]:
    """The records of the runs, trained in one pass.

    Raises:
        StudyError: the backbone drops out in training, which no two runs may share, or the data differ in size.
    """
    import torch

    import tnpeft
    from tnpeft.studies import packed
    from tnpeft.studies.data import load
    from tnpeft.studies.scoring import Scorer, judge

    quiet()
    first = runs[0]
    task, protocol = terms(first)
    data = load(task, first.places.get("data", ""))
    splits = [data.splits(run.seed, protocol.train, protocol.dev, protocol.eval) for run in runs]
    protocol = protocol.on(len(splits[0].train))
    model, tokenizer = backbone(first, task, protocol)
    _refuse_dropout(model.config.to_dict())
    seeds = [run.seed for run in runs]
    each = [(run.method, run.seed) for run in runs]
    model = methods.attach(model, first.method, protocol.targets, classifier=False, seed=seeds[0], replicas=each)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    scorer = Scorer(task, tokenizer, protocol.head, protocol.max_length)
    best, seconds = packed.fit(model, scorer, splits, protocol, lrs=[run.lr for run in runs], seeds=seeds)
    reached = judge(scorer, model, [scorer.encode(its.eval) for its in splits])
    records = []
    for k, (run, its, own, judged) in enumerate(zip(runs, splits, best, reached, strict=True)):
        parameters = tnpeft.replicas.parameters(model, k), 0
        record = described(run, parameters, its, own, seconds / len(runs), judged, str(model.device))
        records.append({**record, "pack": len(runs)})
    return records


def _refuse_dropout(config: dict[str, Any]) -> None:
    found = [name for name, value in config.items() if "drop" in name and isinstance(value, float) and value > 0]
    if found:
        raise StudyError(
            f"the backbone trains with {found[0]} = {config[found[0]]}",
            remedy="make such runs alone: their masks would come out of one stream of random numbers",
        )
