"""Registration in fresh processes: both orders of import, other ways in, and no torch for tnpeft alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = "import peft.mapping as m; assert m.PEFT_TYPE_TO_TUNER_MAPPING['TENSOR_NETWORK'].prefix == 'tnpeft_'"


@pytest.mark.parametrize(
    "code",
    [
        f"import tnpeft, peft; {CHECK}",
        f"import peft, tnpeft; {CHECK}",
        f"import tnpeft, importlib.util; importlib.util.find_spec('peft'); import peft; {CHECK}",
        f"from tnpeft.adapters.state import factors; {CHECK}",
        "import tnpeft, sys; tnpeft.parameters; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)",
    ],
)
def test_fresh_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
