"""Fetch what the live page runs on, compare it with its hashes, and pack it beside the page: Pyodide, sympy, tnpeft.

Nothing of it is committed. Needs npm and node; asks no network where everything is there already.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENDOR = ROOT / "docs" / "live" / "vendor"
KEPT = ("pyodide.mjs", "pyodide.asm.js", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
PYODIDE = "pyodide@0.29.5", "6749b10ee515a1458ecea36d860c8ce2a48366e85b3f92d749ad1840e4aff181"
WHEELS = """
sympy==1.14.0 --hash=sha256:e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5
mpmath==1.3.0 --hash=sha256:a0b2b9fe80bbcd81a6647ff13108738cfb482d481d826cc0e02f5b35e5c88d2c
"""
LAYERS = ("networks", "families", "models", "counting", "scaling", "planning", "comparison", "drawing")
MODULES = ("__init__", "_text", "_files", "_extras", "registration", "layout")


def main() -> None:
    """Fetch what is missing and pack tnpeft as it is now."""
    for tool in ("npm", "node"):
        if shutil.which(tool) is None:
            sys.exit(f"the live page needs {tool} when it is built; install Node.js")
    stamp = VENDOR / "versions.txt"
    versions = "\n".join([*PYODIDE, WHEELS])
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if not stamp.exists() or stamp.read_text() != versions:
            shutil.rmtree(VENDOR, ignore_errors=True)
            VENDOR.mkdir()
            fetch_pyodide(folder)
            compiled(wheels(folder), "sympy.zip", folder)
            stamp.write_text(versions)
        compiled(package(), "tnpeft.zip", folder)


def fetch_pyodide(folder: Path) -> None:
    """The runtime, from the npm registry."""
    name, digest = PYODIDE
    subprocess.run(["npm", "pack", "--silent", name, "--pack-destination", folder], check=True, cwd=folder)
    [path] = folder.glob("pyodide-*.tgz")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        sys.exit(f"{path.name} has the hash {found}, expected {digest}")
    with tarfile.open(path) as archive:
        archive.extractall(folder, [f"package/{member}" for member in KEPT], filter="data")
    for member in KEPT:
        shutil.copyfile(folder / "package" / member, VENDOR / member)


def wheels(folder: Path) -> dict[str, Path]:
    """The pure Python packages, from PyPI, which pip compares with their hashes, without their tests."""
    where, listed = folder / "wheels", folder / "requirements.txt"
    listed.write_text(WHEELS)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run(
        [*pip, "--only-binary=:all:", "--no-compile", "--target", where, "--requirement", listed], check=True
    )
    found = {path.relative_to(where).as_posix(): path for path in sorted(where.rglob("*.py"))}
    return {name: path for name, path in found.items() if "tests/" not in name and "benchmarks/" not in name}


def package() -> dict[str, Path]:
    """The layers of tnpeft that need no torch, and the page's answers."""
    root = ROOT / "tnpeft"
    paths = [root / f"{name}.py" for name in MODULES]
    paths += [path for layer in LAYERS for path in (root / layer).rglob("*") if path.suffix in (".py", ".toml")]
    page = {"page.py": ROOT / "docs" / "live" / "page.py"}
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(paths)} | page


def compiled(sources: Mapping[str, Path], name: str, folder: Path) -> None:
    """Pack sources as byte code, made by the page's own Python: nothing is compiled when the page is read."""
    source = folder / name
    with zipfile.ZipFile(source, "w") as archive:
        for inside, path in sources.items():
            archive.write(path, inside)
    script = Path(__file__).with_name("compile.mjs")
    subprocess.run(["node", script, VENDOR / "pyodide.mjs", source, VENDOR / name], check=True)


if __name__ == "__main__":
    main()
