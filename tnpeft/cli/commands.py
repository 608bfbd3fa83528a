"""Commands that need no training: count, plan, convert, explain, draw, check, families, budget, compare, models."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tnpeft._text import Table
from tnpeft.cli import parse
from tnpeft.cli.app import app, show
from tnpeft.networks import Factorization, Network, NetworkError

_UNFOLDED = 1000  # columns of a table that nobody looks at in a terminal


class Form(StrEnum):
    """The forms that a table is printed in."""

    text = "text"
    md = "md"
    csv = "csv"
    json = "json"


@app.command()
def count(
    net: parse.NetworkArgument,
    rank: parse.RankOption = None,
    size: parse.SizeOption = None,
    option: parse.SetOption = None,
    model: parse.ModelOption = None,
    targets: parse.TargetsOption = None,
    as_json: parse.JsonOption = False,
) -> None:
    """Parameters as a formula and as a number, by factor, with the step of each rank and what the update can reach.

    **Examples**

    `tnpeft count lora --rank 8 --model facebook/opt-1.3b --targets q_proj,v_proj`

    `tnpeft count "B[out r] A[r inp] -> out inp" -s out=2048 -s inp=2048 -r r=8`
    """
    from tnpeft.cli.format import counted

    data = counted(*parse.read_network(net, rank, size, option), model, targets)
    facts = {{"mebibytes": "MiB"}.get(key, key.replace("_", " ")): value for key, value in data.items()}
    rows = tuple((key, _text(value)) for key, value in facts.items() if value not in (None, {}, [], ""))
    show(data, as_json, lambda: Table((), rows).text())


@app.command()
def plan(
    net: parse.NetworkArgument,
    rank: parse.RankOption = None,
    size: parse.SizeOption = None,
    option: parse.SetOption = None,
    model: parse.ModelOption = None,
    targets: parse.TargetsOption = None,
    tokens: Annotated[int, typer.Option(help="Rows of activations.", min=1)] = 2048,
    minimize: Annotated[str, typer.Option(help="time, macs, written or saved.")] = "time",
    training: Annotated[bool, typer.Option("--training/--inference", help="Whether gradients flow.")] = True,
    table: Annotated[bool, typer.Option("--table", help="The best plan for every number of tokens.")] = False,
    as_json: parse.JsonOption = False,
) -> None:
    """The best order of contraction for one site, printed as the program it is.

    **Examples**

    `tnpeft plan lora -s out=2048 -s inp=2048 --tokens 1024`

    `tnpeft plan cp --model facebook/opt-1.3b --targets q_proj --minimize macs --table`
    """
    from tnpeft.cli.format import planned
    from tnpeft.counting import site_shapes
    from tnpeft.planning import plan as best
    from tnpeft.planning import plan_table

    line, sizes = parse.read_network(net, rank, size, option)
    plans, texts = list[dict[str, Any]](), list[str]()
    for shape in site_shapes(line, model=model, targets=targets, **sizes):
        goal: dict[str, Any] = {"minimize": minimize, "training": training}
        if table:
            found: Any = plan_table(shape.network, shape.sizes, **goal)
            rungs = zip(found.starts, found.plans, strict=True)
            data: dict[str, Any] = {"plans": [{"from": start, **planned(each)} for start, each in rungs]}
        else:
            found = best(shape.network, shape.sizes, tokens=tokens, **goal)
            data = planned(found)
        plans.append({"site": str(shape), **data})
        texts.append(f"{shape}\n{found}".lstrip("\n"))
    show(plans, as_json, lambda: "\n\n".join(texts))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Adapter folder, or a .safetensors file.")],
    target: Annotated[Path, typer.Argument(help="Folder or file to write; it must not exist.")],
    to: Annotated[
        str, typer.Option(help="tnpeft, peft, lora, per_expert, shared_outer, kohya, lycoris or gguf.")
    ] = "tnpeft",
    model: parse.ModelOption = None,
    as_json: parse.JsonOption = False,
) -> None:
    """An adapter in another packing, written only if its updates stay what they were.

    **Examples**

    `tnpeft convert lora-on-experts/ experts/ --to per_expert`

    `tnpeft convert kohya.safetensors adapter/ --model runwayml/model`
    """
    from dataclasses import asdict

    from tnpeft.adapters.convert import convert as converted

    done = converted(source, target, to, model=model)
    show(asdict(done), as_json, lambda: str(done))


@app.command()
def explain(
    folder: Annotated[Path, typer.Argument(help="A folder that save_pretrained wrote.")],
    model: parse.ModelOption = None,
    as_json: parse.JsonOption = False,
) -> None:
    """The contents of an adapter's folder: its line, its sites and its costs, without loading the model.

    The files pass the checks that loading makes. `--model` names the base model where the folder does not, for shapes
    that the file alone does not tell.

    **Example**

    `tnpeft explain adapter/ --model facebook/opt-1.3b`
    """
    from tnpeft.adapters.storage.folder_report import explain_folder

    report = explain_folder(folder, model=model)
    show(report.as_dict(), as_json, lambda: str(report))


@app.command()
def draw(
    net: parse.NetworkArgument,
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Picture to write: .svg, .png or .pdf.")] = None,
    rank: parse.RankOption = None,
    size: parse.SizeOption = None,
    option: parse.SetOption = None,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a Mermaid flowchart.")] = False,
    as_json: parse.JsonOption = False,
) -> None:
    """A picture of the network for a paper, a Mermaid flowchart, or (without a file) a table for the terminal.

    **Examples**

    `tnpeft draw tucker --out tucker.svg`

    `tnpeft draw "B[out r] A[r inp] -> out inp" -r r=8 --mermaid`
    """
    from tnpeft import drawing

    line, known = parse.read_network(net, rank, size, option)
    data: dict[str, Any] = {}
    if file is not None:
        data["file"] = str(drawing.draw(line, file, known))
    if mermaid:
        data["mermaid"] = drawing.mermaid(line, known)
    if not data:
        data["text"] = drawing.text(line, known)
    show(data, as_json, lambda: "\n".join(data.values()))


@app.command()
def check(
    net: parse.NetworkArgument,
    rank: parse.RankOption = None,
    size: parse.SizeOption = None,
    option: parse.SetOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the random factors.", min=0)] = 0,
    as_json: parse.JsonOption = False,
) -> None:
    """Try every property of a network: contraction, gradient, count, rank, start. Exit code 1 if one fails.

    A line is tried at the sizes given (small ones are chosen for the rest), a family at small sites.

    **Example**

    `tnpeft check "w[r] U[out r] V[inp r] -> out inp"`
    """
    from tnpeft.testing import examine

    line, known = parse.read_network(net, rank, size, option)
    if "[" in net and isinstance(line, Factorization):  # a line is a network even where it has all its ranks
        line, known = line.network, {**known, **line.ranks}
    if isinstance(line, Factorization) and known:
        raise NetworkError("a family is tried at small sites of its own", remedy="leave --size out, or write a line")
    report = examine(line, known, seed=seed)
    show(report.as_dict(), as_json, lambda: str(report))
    if not report:
        raise typer.Exit(1)


@app.command()
def families(
    name: Annotated[str | None, typer.Argument(help="One family, for all about it.", show_default=False)] = None,
    as_json: parse.JsonOption = False,
) -> None:
    """All named factorizations: parameter formula, options with their defaults, and how sure the source is.

    **Examples**

    `tnpeft families`

    `tnpeft families vera`
    """
    from tnpeft.cli.format import described
    from tnpeft.families import get, names

    rows = [described(each) for each in ([name] if name else names())]
    if not name:
        show(rows, as_json, lambda: _table(rows))
        return
    from inspect import getdoc

    text = "\n".join([*rows[0]["lines"], "", f"{name}({rows[0]['options']})", "", getdoc(get(name)) or ""])
    show(rows[0], as_json, lambda: text)


@app.command()
def budget(
    nets: Annotated[
        list[str], typer.Argument(metavar="NETWORK...", help="Families, or lines of einsum.", show_default=False)
    ],
    parameters: Annotated[
        str, typer.Option("--parameters", "-p", help="A number, or a family or line whose count it is.")
    ],
    rank: parse.RankOption = None,
    size: parse.SizeOption = None,
    ratio: parse.RatioOption = None,
    model: parse.ModelOption = None,
    targets: parse.TargetsOption = None,
    by: parse.ByOption = "parameters",
    as_json: parse.JsonOption = False,
) -> None:
    """For each family the ranks nearest to, and the largest within, a parameter budget, and the budgets it can meet.

    With a family or a line as the budget, `--rank` sets its ranks. Those of the networks are free: they share one
    number, times their `--ratio`; a bond whose size is given (`-s group=4`) is held there.

    **Examples**

    `tnpeft budget lora cp tucker -p 196608 --model facebook/opt-1.3b --targets q_proj,v_proj`

    `tnpeft budget "G[layer proj a b] U[out a] V[inp b] -> layer proj out inp" -p 50000 -m roberta-base --ratio a=2`

    `tnpeft budget cp lokr -p lora --rank 2 --model roberta-base`
    """
    from dataclasses import asdict

    from tnpeft.counting import budget as rungs

    number = parse.read_number(parameters)
    goal = parse.read_network(number, rank)[0] if isinstance(number, str) else number
    held = parse.read_sizes(size) | ({} if isinstance(goal, Factorization) else parse.read_sizes(rank))
    if isinstance(goal, Network):
        raise NetworkError(
            "the budget's line has a bond without a rank", line=parameters, remedy="pass --rank NAME=NUMBER"
        )
    where: dict[str, Any] = {"model": model, "targets": targets, "ratios": parse.read_ratios(ratio), "by": by}
    found = rungs(nets, held, parameters=goal, **where)
    show(asdict(found), as_json, lambda: str(found))


@app.command()
def compare(
    nets: Annotated[
        list[str],
        typer.Argument(
            metavar="NETWORK...",
            help="Families (`lora`, or `lora:4` at that rank), lines of einsum, or `name=` before either.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="A model's name, folder or config.json; else -s out=, inp=, layer=, proj="
        ),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option("--parameters", "-p", help="A number, or a family whose count it is, such as lora:1."),
    ] = None,
    targets: parse.TargetsOption = None,
    size: parse.SizeOption = None,
    ratio: parse.RatioOption = None,
    tokens: Annotated[int, typer.Option(help="Rows of activations that the plans are for.", min=1)] = 2048,
    sort: Annotated[
        str, typer.Option(help="Column: name, parameters, dof, rank_bound, gain, macs, saved_bytes, plan_seconds.")
    ] = "parameters",
    by: parse.ByOption = "parameters",
    form: Annotated[Form, typer.Option("--format", help="The form of the table.")] = Form.text,
    plot: Annotated[Path | None, typer.Option(help="Picture to write: .svg, .png or .pdf.")] = None,
) -> None:
    """One table of families and lines at a budget: count, degrees of freedom, rank bound, gain, costs.

    Without `--parameters` every rank is as it is given. `--sort=-gain` sorts from the largest on.

    **Examples**

    `tnpeft compare lora cp tucker -p lora:1 -m facebook/opt-1.3b -t q_proj,v_proj --sort gain`

    `tnpeft compare lora cp -p lora:1 -s out=2048 -s inp=2048 -s layer=24 -s proj=2`

    `tnpeft compare lora "mine=A[layer proj out k] B[k inp] -> layer proj out inp" -p 200000 -m roberta-base`
    """
    from tnpeft.comparison import compare as compared

    found = compared(
        [parse.read_named(text) for text in nets],
        model=model,
        parameters=None if parameters is None else parse.read_number(parameters),
        targets=targets,
        tokens=tokens,
        sort=sort,
        by=by,
        ratios=parse.read_ratios(ratio),
        **parse.read_sizes(size),
    )
    if plot is not None:
        found.plot(plot)
    texts = {Form.text: found.__str__, Form.md: found.to_markdown, Form.csv: found.to_csv, Form.json: found.to_json}
    typer.echo(texts[form]().rstrip("\n"))


def _text(value: Any) -> str:
    """A fact in one line."""
    if isinstance(value, dict):
        return "  ".join(f"{key} {_text(each)}" for key, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _table(rows: list[dict[str, Any]]) -> str:
    """The families as a table as wide as the terminal; into a pipe, as wide as it needs, so that rows stay whole."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("family", "parameters", "options", "source"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row["name"], "\n".join(row["formulas"]), row["options"], row["source"])
    console = Console() if sys.stdout.isatty() else Console(width=_UNFOLDED)
    with console.capture() as captured:
        console.print(table, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


@app.command()
def models(as_json: parse.JsonOption = False) -> None:
    """The models whose sizes are known by name; any other one is read from its configuration.

    **Example**

    `tnpeft models`
    """
    from tnpeft.counting import names

    show([*names()], as_json, lambda: "\n".join(names()))
