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
    command = [sys.executable, str(SUPPORT / worker)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, str(rank), port], **pipes) for rank in range(2)]
    outputs = [its.communicate(timeout=300) for its in workers]
    assert all(its.returncode == 0 for its in workers), outputs[0][1][-3000:] + outputs[1][1][-3000:]
    lines = [line.split() for line in outputs[0][0].splitlines()]
    return {tuple(line[:-1]): line[-1] for line in lines if line[-1] in ("equal", "refused")}


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
