"""A LoRA's fused step can be followed by a reader."""

from __future__ import annotations

import pytest
import trace_functions


def test_a_fused_step_visits_few_functions(capsys: pytest.CaptureFixture[str]) -> None:
    trace_functions.main()
    *rows, total = capsys.readouterr().out.splitlines()
    files = {row.partition(":")[0] for row in rows}
    assert total == f"{len(rows)} functions in {len(files)} files"
    assert len(rows) <= 12
    assert len(files) <= 4
    assert "tnpeft/nn/executor/program.py: ProgramFunction.backward" in rows
