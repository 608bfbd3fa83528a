"""One run shared by several processes: the result of one process, written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tnpeft.studies import processes
from tnpeft.studies.files import StudyError
from tnpeft.studies.study import Study
from tnpeft.studies.sweeping import sweep

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def train(out: Path, tiny: Path, *launcher: str, method: str, settings: str) -> dict[str, Any]:
    arguments = ["train", method, "--args", "rank=2", "--model", str(tiny), "--task", "digits_upright"]
    arguments += ["--targets", "q_proj,v_proj", "--lr", "0.05", "--steps", "6", "--batch", "8", "--json"]
    arguments += ["--settings", f"dev=32; eval=64; evaluate_every=3; {settings}", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "tnpeft", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == 1  # one process speaks
    result = json.loads((out / "result.json").read_text())
    assert json.loads(said[0]) == result
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("cp", "train=17"),  # the third batch has one example: one process has none of it
        ("lorta", "train=21; accumulate=2; by_length=true"),
    ],
)
def test_two_processes_give_the_result_of_one(tiny: Path, tmp_path: Path, method: str, settings: str) -> None:
    alone = train(tmp_path / "alone", tiny, method=method, settings=settings)
    shared = train(tmp_path / "shared", tiny, *TORCHRUN, method=method, settings=settings)
    assert shared["run"] == alone["run"]
    for name in ("key", "parameters", "examples", "dev", "eval", "best_step", "steps"):
        assert shared[name] == alone[name], name
    for mine, theirs in zip(shared["curve"], alone["curve"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    one, two = (load_file(tmp_path / part / "adapter" / "adapter_model.safetensors") for part in ("alone", "shared"))
    assert one.keys() == two.keys()
    assert all(
        (one[name] - two[name]).abs().max() < 1e-4 for name in one
    )  # Adam's first steps divide by the gradient


def test_a_share_is_weighed_by_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [1.0, 2.0, 4.0]
    total = 0.0
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "4")
        mine, factor = processes.share(rows)
        total += factor * sum(mine) / len(mine) / 4
    assert total == pytest.approx(sum(rows) / 3)


def test_a_sweep_is_not_for_torchrun(table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StudyError, match="torchrun is for one run"):
        sweep(Study.of(table, Path(".")), tmp_path)
