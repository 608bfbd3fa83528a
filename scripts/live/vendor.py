"""Fetch what the live page runs on, compare it with its hashes, and pack it beside the page: Pyodide, sympy, tnpeft.

Nothing of it is committed. Needs npm and node; asks no network where everything is there already.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENDOR = ROOT / "docs" / "live" / "vendor"
KEPT = ("pyodide.mjs", "pyodide.asm.js", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
PYODIDE = "pyodide@0.29.5", "6749b10ee515a1458ecea36d860c8ce2a48366e85b3f92d749ad1840e4aff181"
WHEELS = {
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "mpmath==1.3.0": "a0b2b9fe80bbcd81a6647ff13108738cfb482d481d826cc0e02f5b35e5c88d2c",
}
LAYERS = ("networks", "families", "models", "counting", "scaling", "planning", "comparison", "drawing")
MODULES = ("__init__", "_text", "_files", "_extras", "registration", "layout")


def main() -> None:
    """Fetch what is missing and pack tnpeft as it is now."""
    for tool in ("npm", "node"):
        if shutil.which(tool) is None:
            sys.exit(f"the live page needs {tool} when it is built; install Node.js")
    VENDOR.mkdir(exist_ok=True)
    stamp = VENDOR / "versions.txt"
    versions = "\n".join([*PYODIDE, *(f"{name} {digest}" for name, digest in WHEELS.items())])
    with tempfile.TemporaryDirectory() as folder:
        if not stamp.exists() or stamp.read_text() != versions:
            shutil.rmtree(VENDOR)
            VENDOR.mkdir()
            fetch_pyodide(Path(folder))
            compiled(fetch_wheels(Path(folder)), "sympy.zip", Path(folder))
            stamp.write_text(versions)
        compiled(package(), "tnpeft.zip", Path(folder))


def fetch_pyodide(folder: Path) -> None:
    """The runtime, from the npm registry."""
    name, digest = PYODIDE
    subprocess.run(["npm", "pack", "--silent", name, "--pack-destination", folder], check=True, cwd=folder)
    [path] = folder.glob("pyodide-*.tgz")
    with tarfile.open(path) as archive:
        verified(path, digest)
        for member in KEPT:
            content = archive.extractfile(f"package/{member}")
            assert content is not None
            (VENDOR / member).write_bytes(content.read())


def fetch_wheels(folder: Path) -> dict[str, bytes]:
    """The pure Python packages, from PyPI, without their tests."""
    sources: dict[str, bytes] = {}
    for name, digest in WHEELS.items():
        where = folder / name
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "--dest", where, name], check=True)
        [path] = where.glob("*.whl")
        verified(path, digest)
        with zipfile.ZipFile(path) as wheel:
            wanted = [
                n for n in wheel.namelist() if n.endswith(".py") and "tests/" not in n and "benchmarks/" not in n
            ]
            sources |= {each: wheel.read(each) for each in wanted}
    return sources


def verified(path: Path, digest: str) -> None:
    """Refuse a download that is not the expected one."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        sys.exit(f"{path.name} has the hash {found}, expected {digest}")


def package() -> dict[str, bytes]:
    """The layers of tnpeft that need no torch, and the page's answers."""
    root = ROOT / "tnpeft"
    paths = [root / f"{name}.py" for name in MODULES]
    paths += [path for layer in LAYERS for path in (root / layer).rglob("*") if path.suffix in (".py", ".toml")]
    return {
        **{path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted(paths)},
        "page.py": (ROOT / "docs" / "live" / "page.py").read_bytes(),
    }


def compiled(sources: dict[str, bytes], name: str, folder: Path) -> None:
    """Pack sources as byte code, made by the page's own Python: nothing is compiled when the page is read."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path, content in sources.items():
            archive.writestr(path, content)
    source = folder / name
    source.write_bytes(stream.getvalue())
    script = Path(__file__).with_name("compile.mjs")
    subprocess.run(["node", script, VENDOR / "pyodide.mjs", source, VENDOR / name], check=True)


if __name__ == "__main__":
    main()
