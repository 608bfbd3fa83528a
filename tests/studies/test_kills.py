"""Kill -9 at random moments of a sweep: started again it ends with the results of one that ran through."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sweep_results import quietly, results, study_of, written

from tnpeft.studies.files import digest, write_json
from tnpeft.studies.reports.reporting import report
from tnpeft.studies.running.pool import Engine
from tnpeft.studies.running.sweeping import sweep
from tnpeft.studies.runs import Store

KILLS = int(os.environ.get("TNPEFT_KILLS", "3"))
SCRIPT = """
import json, sys
from pathlib import Path
from tnpeft.studies.running.pool import Engine
from tnpeft.studies.study import Study
from tnpeft.studies.running.sweeping import sweep

if __name__ == "__main__":
    study = Study.of(json.loads(sys.argv[1]), Path("."))
    sweep(study, sys.argv[2], Engine(**json.loads(sys.argv[3])), say=lambda line: print(line, flush=True))
"""
KINDS: dict[str, list[dict[str, Any]]] = {
    "alone": [{"kind": "processes", "workers": 2}, {"kind": "serial"}],
    "packs": [{"kind": "processes", "workers": 2, "pack": 2}, {"kind": "serial", "pack": 2}],
    "ray": [{"kind": "ray", "workers": 2}],
}


def start(table: dict[str, Any], runs: Path, script: Path, engine: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), json.dumps(table), str(runs), json.dumps(engine)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "packs", pytest.param("ray", marks=pytest.mark.ray)])
def test_killed_at_random_moments_the_results_are_the_same(
    table: dict[str, Any], tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """TNPEFT_KILLS=20 kills twenty times, by default three: while it starts, or soon after a run or two came in."""
    if kind == "ray":
        request.getfixturevalue("ray")
    engines, script, runs, draw = KINDS[kind], tmp_path / "go.py", tmp_path / "runs", random.Random(5)
    table["seeds"] = list(range(2 + KILLS))  # enough that a fast machine is not done before it is killed
    study = study_of(table)
    whole = Engine("serial", pack=engines[0].get("pack", 1))
    sweep(study, tmp_path / "whole", whole, quietly)
    report(study, tmp_path / "whole", tmp_path / "whole-report")
    script.write_text(SCRIPT)
    kills, there = 0, list[int]()
    for attempt in range(KILLS):
        process = start(table, runs, script, engines[attempt // 2 % len(engines)])
        assert process.stdout is not None
        line, wanted = process.stdout.readline(), draw.randint(1, 2) if attempt % 2 == 0 else 0
        while wanted and line:
            line = process.stdout.readline()
            wanted -= " left" in line
        time.sleep(draw.uniform(0, 4 if attempt % 2 else 0.3))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        there.append(len(list(runs.glob("*.json"))))
    print(f"{kills} kills, results after each: {there}")
    assert kills > KILLS // 2
    assert there[-1] > 0
    process = start(table, runs, script, engines[-1])
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    report(study, runs, tmp_path / "pieces-report")
    assert written(tmp_path / "pieces-report") == written(tmp_path / "whole-report")
    assert results(runs) == results(tmp_path / "whole")
    assert not [path for path in runs.iterdir() if path.name.endswith((".pack.json", ".failed.json"))]


def test_a_pack_is_written_whole_or_not_at_all(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off between two files of a pack: the rest comes from what was written first, not from a smaller pack."""
    table["methods"] = [{"label": "LoRA", "family": "lora", "args": {"rank": 1}}]
    study = study_of(table)
    sweep(study, tmp_path / "whole", Engine("serial", pack=2), quietly)
    runs, store = study.search(), Store(tmp_path / "cut")
    records = [Store(tmp_path / "whole").result(run.key) or {} for run in runs]

    def cut(path: Path, value: Any) -> Path:
        if path.name == f"{runs[1].key}.json":
            raise KeyboardInterrupt
        return write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr("tnpeft.studies.runs.write_json", cut)
        with pytest.raises(KeyboardInterrupt):
            store.keep(runs, records)
    journal = store.folder / f".{digest(sorted(run.key for run in runs))}.pack.json"
    assert journal.exists()
    assert [bool(store.result(run.key)) for run in runs] == [True, False]
    assert sweep(study, store.folder, Engine("serial", pack=2), quietly).kept == 2
    assert [store.result(run.key) for run in runs] == records
    assert not journal.exists()
