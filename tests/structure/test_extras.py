"""Counting and planning need no torch; what needs a library that is not installed names the extra that brings it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Stands for an environment where these are not installed: any import of them fails as it would there.
HIDDEN = """
import sys
for name in ("torch", "peft", "transformers", "datasets", "tensorly", "scipy"):
    sys.modules[name] = None
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDDEN + code], capture_output=True, text=True)


def test_counting_planning_drawing_and_the_command_line_need_no_torch() -> None:
    code = """
import tnpeft
net = tnpeft.network("B[layer proj out r] A[layer proj r inp] -> layer proj out inp")
sizes = dict(layer=24, proj=2, out=2048, inp=2048, r=1)
print(tnpeft.parameters(net, sizes), tnpeft.rank_bound(net, sizes), tnpeft.plan(net, sizes, tokens=8).macs)
tnpeft.mermaid(net)
sys.argv = ["tnpeft", "count", "lora", "--model", "facebook/opt-1.3b"]
tnpeft.cli.main()
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("196608 1 ")


@pytest.mark.parametrize(("name", "extra"), [("fit", "torch"), ("TensorNetworkConfig", "peft"), ("factors", "peft")])
def test_the_error_names_the_extra(name: str, extra: str) -> None:
    done = run(f"import tnpeft\ntnpeft.{name}")
    assert "ModuleNotFoundError" in done.stderr
    assert f"pip install 'tnpeft[{extra}]'" in done.stderr
    assert f"tnpeft.{name}" in done.stderr
