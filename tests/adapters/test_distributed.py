"""Two gloo processes on the CPU: gradients equal a single process's, or the run is refused with the remedy."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "support" / "distributed_worker.py"


@pytest.mark.slow
def test_two_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs[0][1][-3000:] + outputs[1][1][-3000:]
    verdicts = {tuple(line.split()[:3]): line.split()[3] for line in outputs[0][0].splitlines()}
    families = ("lora", "cp", "lorta", "tenslora")
    kinds = ("none", "nonreentrant", "reentrant")
    assert set(verdicts) == {
        (w, f, k) for w in ("DDP", "FSDP1", "FSDP2", "FSDP2-each") for f in families for k in kinds
    } | {("DDP-static", f, "reentrant") for f in families}
    refused = {case for case, verdict in verdicts.items() if verdict == "refused"}
    assert refused == {(w, f, "reentrant") for w in ("DDP", "FSDP1") for f in ("lorta", "tenslora")}
