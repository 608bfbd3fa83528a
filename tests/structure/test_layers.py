"""An import only ever points left, and what must start fast never loads torch. Each test has a twin that fails."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx as nx
import pytest

import tnpeft

ROOT = Path(tnpeft.__file__).parent
ORDER = (
    {"_text", "_files", "_lazy"},
    {"networks"},
    {"families"},
    {"layout", "models"},
    {"counting"},
    {"scaling"},
    {"planning"},
    {"comparison"},
    {"nn"},
    {"drawing", "testing"},
    {"adapters"},
    {"optim"},
    {"studies"},
    {"cli"},
)
RANK = {name: place for place, layer in enumerate(ORDER) for name in layer}
WITHOUT_TORCH = ["networks", "families", "models", "layout", "counting", "scaling", "planning", "comparison"]
WITHOUT_TORCH += ["drawing", "testing", "cli"]


def imports(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names that a module imports, names of the top package resolved to the layer they come from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name != "tnpeft")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (resolved(alias.name) for alias in node.names) if name == "tnpeft" else [name]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tnpeft":
            yield resolved(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )


def resolved(name: str) -> str:
    """Where a name of the top package lives."""
    layer = tnpeft._HOME.get(name, name)
    return f"tnpeft.{layer}" if layer in RANK else "tnpeft"


def pointing_right(source: str, path: Path) -> list[str]:
    """The layers to the right of, or beside, its own that a module imports."""
    package = ("tnpeft", *path.parent.parts)
    own = path.parts[0].removesuffix(".py")
    layers = [name.split(".")[1] for name in imports(source, package) if name.startswith("tnpeft.")]
    return [layer for layer in layers if layer != own and RANK.get(layer, RANK["networks"]) >= RANK[own]]


def modules() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or path.stem in RANK]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_left(path: Path) -> None:
    assert pointing_right(path.read_text(), path.relative_to(ROOT)) == []


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("import tnpeft.nn.executor.program", "planning/search.py", ["nn"]),
        ("from tnpeft.adapters import config", "nn/init.py", ["adapters"]),
        ("from tnpeft import dense", "counting/rank.py", ["nn"]),
        ("from tnpeft import nn", "families/lora.py", ["nn"]),
        ("from ..planning import plan", "counting/rank.py", ["planning"]),
        ("from . import notation", "networks/network.py", []),
        ("import tnpeft\ntnpeft.plan(1)", "networks/network.py", ["planning"]),
        ("def f():\n    from tnpeft.studies import sweep", "adapters/model.py", ["studies"]),
        ("import importlib\nimportlib.import_module('tnpeft.cli')", "studies/sweep.py", ["cli"]),
        ("from tnpeft.drawing import draw", "testing/check.py", ["drawing"]),
        ("from tnpeft import __version__\nfrom tnpeft.networks import Network", "counting/rank.py", []),
    ],
)
def test_an_import_that_points_right_is_found(source: str, module: str, found: list[str]) -> None:
    assert pointing_right(source, Path(module)) == found


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules of the package that each module imports, wherever in it the import stands."""
    found: dict[str, set[str]] = {}
    for name, source in sources.items():
        found[name] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= whole & set(sources) or {node.module}
        found[name] &= set(sources) - {name}
    return found


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Groups of modules that import each other in a circle."""
    edges = [(tail, head) for tail, heads in graph(sources).items() for head in heads]
    return sorted(sorted(part) for part in nx.strongly_connected_components(nx.DiGraph(edges)) if len(part) > 1)


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {path: ".".join(("tnpeft", *path.relative_to(ROOT).with_suffix("").parts)) for path in ROOT.rglob("*.py")}
    assert circles({name.removesuffix(".__init__"): path.read_text() for path, name in names.items()}) == []


def test_a_circle_is_found_also_where_it_is_for_types_or_inside_a_function() -> None:
    one, two = "from tnpeft.a import two", "if TYPE_CHECKING:\n    from tnpeft.a.one import One"
    assert circles({"tnpeft.a.one": one, "tnpeft.a.two": two}) == [["tnpeft.a.one", "tnpeft.a.two"]]
    assert circles({"tnpeft.a.one": one, "tnpeft.a.two": "def f():\n    import tnpeft.a.one"}) != []
    assert circles({"tnpeft.a.one": one, "tnpeft.a.two": "import os"}) == []


def foreign(source: str) -> set[str]:
    """Top-level packages outside the standard library and this package that a module imports."""
    tops = {name.split(".")[0] for name in imports(source, ("tnpeft", "networks"))}
    return tops - sys.stdlib_module_names - {"tnpeft", ""}


def test_networks_import_the_standard_library_only() -> None:
    assert {
        path.name: found for path in (ROOT / "networks").glob("*.py") if (found := foreign(path.read_text()))
    } == {}
    assert foreign("import os, numpy.linalg\nfrom sympy import Symbol") == {"numpy", "sympy"}


def test_one_module_talks_to_the_path_optimisers() -> None:
    optimisers = {"cotengra", "opt_einsum"}
    users = {p.relative_to(ROOT).as_posix() for p in modules() if foreign(p.read_text()) & optimisers}
    assert users <= {"planning/search.py"}


def test_no_module_is_long() -> None:
    long = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


# ---- what loads torch, seen from fresh processes


def loaded(code: str, *heavy: str) -> set[str]:
    """Which of the heavy modules a fresh process has loaded after running the code."""
    script = f"{code}\nimport sys; print(*sorted({set(heavy)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


COUNT = """
import tnpeft
net = tnpeft.network("B[layer proj out r] A[layer proj r inp] -> layer proj out inp")
assert tnpeft.parameters(net, layer=24, proj=2, out=2048, inp=2048, r=1) == 196608
assert tnpeft.rank_bound(net, layer=24, proj=2, out=2048, inp=2048, r=3) == 3
for name in tnpeft.families.names():
    tnpeft.families.get(name)
f = tnpeft.families.cp(rank=21, out=(32, 64), inp=(32, 64))
assert tnpeft.parameters(f, model="facebook/opt-1.3b", targets=["q_proj", "v_proj"]) == 194544
"""


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("import tnpeft", "torch", "sympy", "networkx", "numpy", "matplotlib", "peft", "typer") == set()


def test_counting_loads_no_torch() -> None:
    assert loaded(COUNT, "torch", "transformers", "matplotlib") == set()


@pytest.mark.parametrize("layer", WITHOUT_TORCH)
def test_layers_that_need_no_torch_load_none(layer: str) -> None:
    assert loaded(f"import tnpeft.{layer}", "torch", "transformers", "peft") == set()


def test_loading_torch_would_be_found() -> None:
    assert loaded("import tnpeft\ntnpeft.networks\nimport torch", "torch", "sympy") >= {"torch"}


def test_public_names_are_typed_and_listed() -> None:
    """Type checkers see what the lazy look-up hands out, name by name, and ``dir`` of a package lists its names."""
    import tnpeft.adapters
    import tnpeft.nn
    import tnpeft.studies

    source = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (checking,) = (node for node in source.body if isinstance(node, ast.If))
    typed = {
        alias.name: str(node.module).partition(".")[2]
        for node in checking.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {**tnpeft._HOME, "families": "", "optim": "", "testing": ""}
    for package in (tnpeft, tnpeft.nn, tnpeft.adapters, tnpeft.studies):
        assert set(package.__all__) <= set(dir(package))
