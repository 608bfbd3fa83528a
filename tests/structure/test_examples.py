"""The notebooks of examples/ run from top to bottom, and hold no outputs that could be out of date."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def cells(name: str, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads((EXAMPLES / name).read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3
    for name in NOTEBOOKS:
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(name))
        assert len(cells(name, "markdown")) >= 3


@pytest.mark.docs
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_cells_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(name):
        exec(compile("".join(cell["source"]), name, "exec"), scope)


@pytest.mark.docs
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_kernel_runs_them_and_shows_html(name: str, tmp_path: Path) -> None:
    missing = [package for package in ("nbformat", "nbclient", "ipykernel") if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'tnpeft[docs]'")
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(book)
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [out.data for cell in book.cells for out in cell.get("outputs", []) if "data" in out]
    assert any("text/html" in data for data in shown)
