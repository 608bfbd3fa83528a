"""Two processes on the CPU: gradients equal a single process's, or the run is refused with the remedy."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
FAMILIES = ("lora", "cp", "lorta", "tenslora")
KINDS = ("none", "nonreentrant", "reentrant")


def verdicts(worker: str) -> dict[tuple[str, ...], str]:
    """What two processes of a worker say of each case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(SUPPORT / worker), port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[tuple[str, ...], str] = {}
    for *case, verdict in (line.split() for line in done.stdout.splitlines() if line.strip()):
        if verdict in ("equal", "refused"):
            assert found.setdefault(tuple(case), verdict) == verdict, case
    return found


@pytest.mark.slow
def test_two_processes() -> None:
    found = verdicts("distributed_worker.py")
    assert set(found) == {
        (w, f, k) for w in ("DDP", "FSDP1", "FSDP2", "FSDP2-each") for f in FAMILIES for k in KINDS
    } | {("DDP-static", f, "reentrant") for f in FAMILIES}
    refused = {case for case, verdict in found.items() if verdict == "refused"}
    assert refused == {(w, f, "reentrant") for w in ("DDP", "FSDP1") for f in ("lorta", "tenslora")}


@pytest.mark.slow
def test_two_processes_of_deepspeed() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    found = verdicts("deepspeed_worker.py")
    assert set(found) == {("ZeRO", stage, f, k) for stage in "123" for f in FAMILIES for k in KINDS}
    refused = {case for case, verdict in found.items() if verdict == "refused"}
    assert refused == {("ZeRO", stage, f, "reentrant") for stage in "123" for f in ("lorta", "tenslora")}
