"""The distributions hold what the package needs, and a fresh environment counts, plans and draws with them."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST = 100  # MB that a plain installation may take
CODE = """
import sys
import tnpeft
net = tnpeft.network("U[out a] G[layer proj a b] V[inp b] -> layer proj out inp")
sizes = dict(layer=24, proj=2, out=2048, inp=2048, a=8, b=8)
print(tnpeft.parameters(net), tnpeft.parameters(net, sizes))
lora = tnpeft.parameters(tnpeft.families.lora(rank=8), model="facebook/opt-1.3b")
print(tnpeft.plan(net, sizes, tokens=64).macs, lora)
tnpeft.draw(net, sys.argv[1])
assert "site-packages" in tnpeft.__file__
"""

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(os.environ.get("TNPEFT_CI") != "1", reason="builds with packages from the index: TNPEFT_CI=1"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the distributions are built from: building writes beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tnpeft", folder / "tnpeft", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the wheel, which is built from the sdist, and the sdist."""
    target = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", target, source], check=True, capture_output=True)
    return target


def test_the_distributions_hold_every_file_of_the_package(built: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tnpeft").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"tnpeft/py.typed", "tnpeft/models/models.toml", "tnpeft/studies/weights/digits-0.safetensors"} <= expected
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        assert {name for name in wheel.namelist() if name.startswith("tnpeft/")} == expected
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        assert expected <= {name.partition("/")[2] for name in sdist.getnames()}


def test_the_first_minute(source: Path, tmp_path: Path) -> None:
    """From nothing to count, plan and picture of a line: ``pip install .`` alone, in seconds of processor and MB.

    An idle machine takes about as long as its processors work; on a busy one only the latter can be told.
    """
    wall, worked = time.perf_counter(), processor_seconds()
    venv.create(tmp_path / "fresh", with_pip=True)
    site = next((tmp_path / "fresh" / "lib").glob("python*/site-packages"))
    before = taken(site)
    python = tmp_path / "fresh" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in (["-m", "pip", "install", "--quiet", str(source)], ["-c", CODE, str(tmp_path / "net.svg")]):
        subprocess.run([python, *command], check=True, capture_output=True, cwd=tmp_path, env=environment)
    wall, worked = time.perf_counter() - wall, processor_seconds() - worked
    print(f"{wall:.0f} s, {worked:.0f} s of processor, {taken(site) - before:.0f} MB")
    assert (tmp_path / "net.svg").exists()
    assert worked < 60
    assert taken(site) - before < MOST


def processor_seconds() -> float:
    """What processes started from here, and ended, have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_fresh_environment_counts_plans_and_draws(built: Path, tmp_path: Path) -> None:
    home = tmp_path / "fresh"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    site = next((home / "lib").glob("python*/site-packages"))
    before = taken(site)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
        ).stdout

    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--constraint", ROOT / "constraints.txt", next(built.glob("*.whl")))
    lines = run(python, "-c", CODE, tmp_path / "net.svg").splitlines()
    assert lines == ["a*b*layer*proj + a*out + b*inp 35840", "2101248 1572864"]
    assert (tmp_path / "net.svg").read_text().endswith("</svg>\n")
    assert {path.name for path in site.iterdir() if path.name in ("torch", "numpy", "scipy", "matplotlib")} == set()
    assert taken(site) - before < MOST
    done = subprocess.run([home / "bin" / "tnpeft", "count", "lora"], capture_output=True, text=True, env=environment)
    assert done.stderr == "tnpeft: the command line needs typer; pip install 'tnpeft[cli]'\n"


def taken(folder: Path) -> float:
    """The size of all files in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
