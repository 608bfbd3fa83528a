"""Registration in fresh processes: both orders of import, other ways in, and no torch for tnpeft alone."""

from __future__ import annotations

import subprocess
import sys

CHECK = "import peft.mapping as m; assert m.PEFT_TYPE_TO_TUNER_MAPPING['TENSOR_NETWORK'].prefix == 'tnpeft_'"
WAYS_IN = [
    f"import tnpeft, peft; {CHECK}",
    f"import peft, tnpeft; {CHECK}",
    f"import tnpeft, importlib.util; importlib.util.find_spec('peft'); import peft; {CHECK}",
    f"from tnpeft.adapters.state import factors; {CHECK}",
]
# What peft imports is there already, what that brings too; each way in is a process that has neither peft nor tnpeft.
APART = """
import os, sys, torch, transformers, accelerate
import transformers.modeling_utils, transformers.generation
ways = {ways!r}
assert not {{"peft", "tnpeft"}} & {{*sys.modules}}
for way in ways:
    if not (child := os.fork()):
        exec(way, {{}})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, way
print(len(ways))
"""


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_way_in_registers() -> None:
    assert fresh(APART.format(ways=WAYS_IN)) == f"{len(WAYS_IN)}\n"


def test_a_way_in_that_fails_would_be_seen() -> None:
    code = APART.format(ways=["import os; os._exit(1)"]).replace(
        ", torch, transformers, accelerate\nimport transformers.modeling_utils, transformers.generation", ""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1


def test_counting_alone_imports_no_torch() -> None:
    fresh("import tnpeft, sys; tnpeft.parameters; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)")
