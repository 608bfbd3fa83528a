"""Pages made from the package itself, one for each family and each public name, and those of ``paper/``."""

from __future__ import annotations

import inspect
import pkgutil
import re
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tnpeft
from tnpeft.networks import TnpeftError

ROOT = Path(__file__).parents[2]
MODELS = {"facebook/opt-1.3b": ["q_proj", "v_proj"], "meta-llama/Llama-3.1-8B": ["q_proj", "v_proj"]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages to those of the folder."""
    made = {**family_pages(), **reference_pages()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    paper = ROOT / "paper"
    for path in [paper / "report.md", *paper.glob("tables/*.md"), *paper.glob("figures/*.png")]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links out of ``docs/``: the pages of ``paper/`` lie inside the site, a test is named by its path."""
    if page.file.src_uri == "features.md":  # long remarks, which a phone would set a word to a line
        markdown += "\n<style>.md-typeset td:nth-child(n + 3) { min-width: 16rem; }</style>\n"
    markdown = re.sub(r"\]\(((?:\.\./)*)\.\./paper/", r"](\1paper/", markdown)
    return re.sub(r"\[([^]]*)\]\((?:\.\./)+(tests/[^)]*)\)", r"\1: `\2`", markdown)


def family_pages() -> dict[str, str | bytes]:
    """A page and a picture for each family, and the table of all."""
    pages: dict[str, str | bytes] = {}
    rows: list[str] = []
    for name in tnpeft.families.names():
        declare = tnpeft.families.get(name)
        f = declare()
        lines = "\n".join(str(rule.network) for rule in f.lines)
        formulas = [str(tnpeft.parameters(rule.network)) for rule in f.lines]
        pages[f"families/{name}.svg"] = picture(f.network)
        summary, _, rest = inspect.getdoc(declare).partition("\n\n")  # type: ignore[union-attr]
        rows.append(f"- [{name}]({name}.md): {summary.replace(chr(10), ' ')} `{formulas[0]}`")
        text = rest.split(">>>")[0].strip()
        counts = "\n".join(count_row(f, model, targets) for model, targets in MODELS.items())
        pages[f"families/{name}.md"] = (
            f"# {name}\n\n{summary}\n\n```einsum\n{lines}\n```\n\n![the network of {name}]({name}.svg)\n\n{text}\n\n"
            f"[Open it in the live page](../live/index.html#line={name}).\n\n"
            f"```python\ntnpeft.families.{name}{signature(declare)}\n```\n\n"
            "| model | sites | parameters at the defaults |\n| --- | --- | ---: |\n" + counts + "\n"
        )
    head = "# Families\n\nEvery factorization that is built in, with the parameters of its first line.\n\n"
    pages["families/index.md"] = head + "\n".join(rows) + "\n"
    return pages


def signature(declare: Any) -> inspect.Signature:
    """The names of a family's arguments and their defaults."""
    given = inspect.signature(declare)
    bare = [each.replace(annotation=each.empty) for each in given.parameters.values()]
    return given.replace(parameters=bare, return_annotation=given.empty)


def picture(net: tnpeft.Network) -> bytes:
    """The drawing of a network as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.svg"
        tnpeft.draw(net, path)
        return path.read_bytes()


def count_row(f: tnpeft.Factorization, model: str, targets: list[str]) -> str:
    """One row of counts; a family that does not fit says why."""
    try:
        count = f"{tnpeft.parameters(f, model=model, targets=targets):,}"
    except TnpeftError as error:
        count = str(error).splitlines()[0]
    return f"| {model} | {', '.join(targets)} | {count} |"


def reference_pages() -> dict[str, str | bytes]:
    """A page for each public name of ``tnpeft``, one for each package with the rest of its names, and the table."""
    pages: dict[str, str | bytes] = {}
    rows: list[str] = []
    places = {
        f"tnpeft.studies.{where}": f"study_files.md#tnpeft.studies.{where}" for where in STUDY_FILES
    }  # of a path
    for name in sorted(set(tnpeft.__all__) - {"__version__"}, key=str.lower):
        found: Any = getattr(tnpeft, name)
        if inspect.ismodule(found):
            continue
        path = f"{found.__module__}.{found.__name__}"
        places[path] = f"{name}.md"
        summary = re.sub(r":[a-z]+:(`[^`]+`)", r"\1", (inspect.getdoc(found) or "").splitlines()[0])
        rows.append(f"- [`{name}`]({name}.md): {summary}")
        pages[f"reference/{name}.md"] = f"::: {path}\n"
    rows.append("\n## Packages\n")
    for module in packages():
        package = module.__name__.partition(".")[2]
        links: list[str] = []
        described: list[str] = []
        for name in module.__all__:
            found = getattr(module, name)
            if not (inspect.isclass(found) or inspect.isroutine(found)):
                links += [] if inspect.ismodule(found) else [f"`{name}`"]
                continue
            path = f"{found.__module__}.{found.__name__}"
            if path not in places:
                places[path] = f"{package}.md#{path}"
                described.append(f"::: {path}\n    options:\n      heading_level: 2\n")
            links.append(f"[`{name}`]({places[path]})")
        listed = ", ".join(links)
        head = f"# tnpeft.{package}\n\n{inspect.getdoc(module)}\n\n{listed}\n\n"
        pages[f"reference/{package}.md"] = head + "\n".join(described)
        rows.append(f"- [`tnpeft.{package}`]({package}.md): {listed}")
    pages["reference/index.md"] = "# Reference\n\nEvery public name of `tnpeft`.\n\n" + "\n".join(rows) + "\n"
    pages["reference/study_files.md"] = (
        "# Study files\n\nA study is a TOML file: the keys of the study at the top, in `[protocol]` those of the "
        "protocol, and each `[[tasks]]` table those of a task.\n\n"
        + "".join(f"::: tnpeft.studies.{where}\n    options:\n      heading_level: 2\n\n" for where in STUDY_FILES)
    )
    return pages


def packages() -> Iterator[Any]:
    """Every package below ``tnpeft`` that says what is public, but for the shell's."""
    for found in pkgutil.walk_packages(tnpeft.__path__, "tnpeft."):
        module = import_module(found.name) if found.ispkg else None
        if hasattr(module, "__all__") and found.name != "tnpeft.cli":
            yield module


STUDY_FILES = ("study.Study", "methods.Method", "protocol.Protocol", "tasks.task.Task")
