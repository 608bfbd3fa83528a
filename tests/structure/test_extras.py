"""Counting, planning and pictures need sympy alone; what needs a library that is not installed names its extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Stands for an environment where these are not installed: any import of them fails as it would there.
HIDDEN = """
import sys
for name in ("torch", "peft", "transformers", "datasets", "tensorly", "scipy", "numpy", "matplotlib", "networkx",
             "cotengra", "opt_einsum", "typer", "rich", "hypothesis"):
    sys.modules[name] = None
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDDEN + code], capture_output=True, text=True)


def test_counting_planning_and_drawing_need_sympy_alone(tmp_path: Path) -> None:
    code = f"""
import tnpeft
net = tnpeft.network("B[layer proj out r] A[layer proj r inp] -> layer proj out inp")
sizes = dict(layer=24, proj=2, out=2048, inp=2048, r=1)
print(tnpeft.parameters(net, sizes), tnpeft.rank_bound(net, sizes), tnpeft.plan(net, sizes, tokens=8).macs)
print(tnpeft.parameters(net), tnpeft.gain("lora"), tnpeft.dof(net, sizes))
tnpeft.mermaid(net)
tnpeft.draw(net, {str(tmp_path / "net.svg")!r})
for name in tnpeft.families.names():
    f = tnpeft.families.get(name)()
    table = tnpeft.compare([f], model="facebook/opt-1.3b", targets=["q_proj"])
    tnpeft.drawing.compose(f) if len(f.network.factors) < 4 else None
print(tnpeft.budget(["lora", "cp"], parameters=196608, model="facebook/opt-1.3b"))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("196608 1 ")
    assert "</svg>" in (tmp_path / "net.svg").read_text()


@pytest.mark.parametrize("count", [13, 40])
def test_long_lines_are_planned_by_a_greedy_search(count: int) -> None:
    done = run(f"""
import tnpeft
chain = " ".join(f"G{{k}}[a{{k}} a{{k + 1}}]" for k in range({count}))
net = tnpeft.network(chain + " -> a0 a{count}")
print(tnpeft.plan(net, dict.fromkeys(net.indices, 3), tokens=7).macs)
print(tnpeft.plan(net, dict.fromkeys(net.indices, 3), tokens=7))
""")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) == 27 * (count - 1)  # one core after the other
    assert "greedy search: too many operands" in done.stdout


def test_the_command_line_names_its_extra() -> None:
    done = run("sys.argv = ['tnpeft', 'count', 'lora']\nfrom tnpeft.__main__ import main\nmain()")
    assert done.returncode == 1
    assert done.stderr == "tnpeft: the command line needs typer; pip install 'tnpeft[cli]'\n"


QUESTIONS = [
    (
        "tnpeft.draw('A[out inp] -> out inp', 'a.png')",
        "a picture as .png needs matplotlib; pip install 'tnpeft[plots]'",
    ),
    (
        "tnpeft.compare('lora', model='facebook/opt-1.3b').plot('a.svg')",
        "the picture of a comparison needs matplotlib; pip install 'tnpeft[plots]'",
    ),
    (
        "tnpeft.plan(tnpeft.network('A[out inp] -> out inp'), out=4, inp=4, tokens=2, optimize='greedy')",
        "optimize='greedy' needs opt_einsum; pip install 'tnpeft[planning]'",
    ),
    ("tnpeft.testing.networks()", "tnpeft.testing needs numpy; pip install 'tnpeft[testing]'"),
    *(
        (f"tnpeft.{name}", f"tnpeft.{name} needs {library}; pip install 'tnpeft[{extra}]'")
        for name, library, extra in (
            ("fit", "numpy", "torch"),
            ("TensorNetworkConfig", "peft", "peft"),
            ("factors", "peft", "peft"),
        )
    ),
]


def test_questions_name_their_extras() -> None:
    code = f"""
import tnpeft
for call in {[call for call, _ in QUESTIONS]!r}:
    try:
        exec(call)
    except ModuleNotFoundError as error:
        print(error)
"""
    done = run(code)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [message for _, message in QUESTIONS]
