"""Engines: processes and Ray give the results of one process, whatever becomes of their workers."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Executor, Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sweep_results import quietly, results, study_of, written

from tnpeft.studies.files import StudyError
from tnpeft.studies.reports.reporting import report
from tnpeft.studies.running import pool
from tnpeft.studies.running.pool import Engine, Outcome, Workers, work
from tnpeft.studies.running.sweeping import sweep
from tnpeft.studies.runs import Job, Store


@pytest.fixture(params=["processes", pytest.param("ray", marks=pytest.mark.ray)])
def kind(request: pytest.FixtureRequest) -> str:
    """Every engine beyond this process."""
    if request.param == "ray":
        request.getfixturevalue("ray")
    return str(request.param)


def deadly(job: Job, folder: str, threads: int, retry: bool) -> list[Outcome]:
    """Work, but for CP's runs, which take their process along."""
    if any(run.method.get("family") == "cp" for run in job):
        os.kill(os.getpid(), signal.SIGKILL)
    return work(job, folder, threads, retry)


def test_the_engines_agree_to_the_last_bit_and_make_nothing_twice(
    table: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    table["methods"].append({"label": "bad", "peft": "lora", "args": {"r": -1}})
    study = study_of(table)
    one = sweep(study, tmp_path / "one", Engine("serial"), quietly)
    report(study, tmp_path / "one", tmp_path / "one-report")
    said: list[str] = []
    other = sweep(study, tmp_path / "other", Engine(kind, workers=2), said.append)
    report(study, tmp_path / "other", tmp_path / "other-report")
    assert one == other
    assert (one.done, one.failed) == (9, 2)
    kept = {name for name in results(tmp_path / "one") if "failed" not in name}
    mine, theirs = results(tmp_path / "one"), results(tmp_path / "other")
    assert {name: mine[name] for name in kept} == {name: theirs[name] for name in kept}
    assert written(tmp_path / "one-report") == written(tmp_path / "other-report")
    assert sum("left" in line for line in said) == 11
    again = sweep(study, tmp_path / "other", Engine(kind, workers=2), quietly)
    assert (again.done, again.kept, again.failed) == (0, 9, 2)


def test_a_run_that_takes_its_process_along_fails_alone(
    table: dict[str, Any], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "work", deadly)
    table["methods"] = [*table["methods"][1:2], *table["methods"][:1]]  # CP first, LoRA's two sizes beside it
    tally = sweep(study_of(table), tmp_path, Engine(kind, workers=2, pack=2), quietly)
    assert (tally.done, tally.failed) == (4, 2)
    causes = {record["cause"] for name, record in results(tmp_path).items() if "failed" in name}
    assert causes == {"its process died (killed, or out of memory)"}


class _Flaky(Executor):
    """A pool whose workers die the first time they get a job, and every time they get one of seed 1."""

    died = (ConnectionError,)
    tasks: list[Job] = []  # noqa: RUF012
    made: list[Job] = []  # noqa: RUF012

    def submit(self, fn: Any, job: Job, /, *_: Any) -> Future[list[Outcome]]:  # type: ignore[override]
        task: Future[list[Outcome]] = Future()
        if job not in self.tasks or any(run.seed == 1 for run in job):
            task.set_exception(ConnectionError())
        else:
            self.made.append(job)
            task.set_result([(run, "done", 0.0) for run in job])
        self.tasks.append(job)
        return task


def test_what_was_under_way_is_made_again_as_it_was_then_run_by_run(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pool._POOLS, "processes", lambda _: _Flaky())
    study = study_of(table, seeds=[0, 2, 1])
    runs = study.search()
    outcomes = list(Workers(Engine("processes", workers=3, pack=2), tmp_path).map(runs))
    assert sorted(run.key for run, _, _ in outcomes) == sorted(run.key for run in runs)
    failed = [run for run, status, _ in outcomes if status == "failed"]
    assert failed == [run for run in runs if run.seed == 1]
    assert {run.key for run in failed} == {path.name.split(".")[0] for path in tmp_path.glob("*.failed.json")}
    assert max(map(len, _Flaky.made)) == 2  # a pack that dies once is made again as a pack


def test_a_worker_that_dies_between_two_phases_is_replaced(table: dict[str, Any], tmp_path: Path) -> None:
    runs = study_of(table).search()
    with closing(Workers(Engine("processes", workers=1), tmp_path)) as workers:
        first = list(workers.map(runs[:1]))
        for process in workers.pool._processes.values():
            process.kill()
            process.join()
        second = list(workers.map(runs[1:2]))
    assert [status for _, status, _ in (*first, *second)] == ["done", "done"]


def test_a_run_that_is_under_way_elsewhere_is_waited_for(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table["methods"] = [{"label": "LoRA", "family": "lora", "args": {"rank": 1}}]
    study, store, said = study_of(table), Store(tmp_path), list[str]()
    run = study.search()[0]
    with (tmp_path / f".{run.key}.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        timer = threading.Timer(4, lambda: fcntl.flock(other, fcntl.LOCK_UN))
        timer.start()
        tally = sweep(study, tmp_path, Engine("serial"), said.append)
        timer.join()
    assert tally.done == 2
    assert store.result(run.key)
    assert any("waiting for 1 run" in line for line in said)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "slurm"}, "unknown engine 'slurm'; use one of serial, processes, ray"),
        ({"pack": 0}, "pack = 0; give at least 1"),
        ({"threads": 0}, "threads = 0"),
        ({"workers": -1}, "workers = -1"),
    ],
)
def test_wrong_engines_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Engine(**settings)


def test_without_ray_the_remedy_is_named(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(StudyError, match=r"pip install 'tnpeft\[ray\]'"):
        sweep(study_of(table), tmp_path, Engine("ray"), quietly)


def test_places_are_found_from_anywhere(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = study_of(table).search()[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    places = {"model": "model", "data": "hub", "cache": "cache", "tokenizer": "facebook/opt-125m"}
    found = pool._anywhere(type(run)(**{**run.__dict__, "places": places}))
    assert found.places == {**places, "model": str(tmp_path / "model"), "cache": str(tmp_path / "cache")}
    assert found.key == run.key


def test_a_sweep_is_not_for_torchrun(table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StudyError, match="started by torchrun"):
        sweep(study_of(table), tmp_path)


def test_sweeps_need_no_module_that_windows_lacks() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'pwd', 'grp')))"
    code = blocked + "".join(
        f"; import tnpeft.studies.running.{name}" for name in ("sweeping", "dry_run", "execution")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
