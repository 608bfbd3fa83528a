"""Commands that need no training: count, plan, draw, check, families, budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tnpeft._text import Table
from tnpeft.cli.app import app, show
from tnpeft.cli.parse import (
    JsonOption,
    ModelOption,
    NetworkArgument,
    RankOption,
    RatioOption,
    SetOption,
    SizeOption,
    TargetsOption,
    read_budget,
    read_network,
    read_ratios,
    read_sizes,
)
from tnpeft.networks import Factorization, Network, NetworkError

_UNFOLDED = 1000  # columns of a table that nobody looks at in a terminal


@app.command()
def count(
    net: NetworkArgument,
    rank: RankOption = None,
    size: SizeOption = None,
    option: SetOption = None,
    model: ModelOption = None,
    targets: TargetsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Parameters as a formula and as a number, by factor, with the step of each rank and what the update can reach.

    **Examples**

    `tnpeft count lora --rank 8 --model facebook/opt-1.3b --targets q_proj,v_proj`

    `tnpeft count "B[out r] A[r inp] -> out inp" -s out=2048 -s inp=2048 -r r=8`
    """
    from tnpeft.cli.format import counted

    line = read_network(net, rank, option)
    data = counted(line, read_sizes(size, rank, line), model, targets)
    show(data, as_json, lambda: _facts(data))


@app.command()
def plan(
    net: NetworkArgument,
    rank: RankOption = None,
    size: SizeOption = None,
    option: SetOption = None,
    model: ModelOption = None,
    targets: TargetsOption = None,
    tokens: Annotated[int, typer.Option(help="Rows of activations.", min=1)] = 2048,
    minimize: Annotated[str, typer.Option(help="time, macs, written or saved.")] = "time",
    training: Annotated[bool, typer.Option("--training/--inference", help="Whether gradients flow.")] = True,
    table: Annotated[bool, typer.Option("--table", help="The best plan for every number of tokens.")] = False,
    as_json: JsonOption = False,
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

    line = read_network(net, rank, option)
    plans = []
    for shape in site_shapes(line, model=model, targets=targets, **read_sizes(size, rank, line)):
        where, one, known = str(shape), shape.network, shape.sizes
        if table:
            ladder = plan_table(one, known, minimize=minimize, training=training)
            rungs = [
                {"from": start, **planned(each)} for start, each in zip(ladder.starts, ladder.plans, strict=True)
            ]
            plans.append(({"site": where, "plans": rungs}, str(ladder)))
        else:
            found = best(one, known, tokens=tokens, minimize=minimize, training=training)
            plans.append(({"site": where, **planned(found)}, str(found)))
    texts = [f"{data['site']}\n{text}" if data["site"] else text for data, text in plans]
    show([data for data, _ in plans], as_json, lambda: "\n\n".join(texts))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Adapter folder, or a .safetensors file.")],
    target: Annotated[Path, typer.Argument(help="Folder or file to write; it must not exist.")],
    to: Annotated[
        str, typer.Option(help="tnpeft, peft, lora, per_expert, shared_outer, kohya, lycoris or gguf.")
    ] = "tnpeft",
    model: ModelOption = None,
    as_json: JsonOption = False,
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
def draw(
    net: NetworkArgument,
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Picture to write: .svg, .png or .pdf.")] = None,
    rank: RankOption = None,
    size: SizeOption = None,
    option: SetOption = None,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a Mermaid flowchart.")] = False,
    as_json: JsonOption = False,
) -> None:
    """A picture of the network for a paper, a Mermaid flowchart, or (without a file) a table for the terminal.

    **Examples**

    `tnpeft draw tucker --out tucker.svg`

    `tnpeft draw "B[out r] A[r inp] -> out inp" -r r=8 --mermaid`
    """
    from tnpeft import drawing

    line = read_network(net, rank, option)
    known = read_sizes(size, rank, line)
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
    net: NetworkArgument,
    rank: RankOption = None,
    size: SizeOption = None,
    option: SetOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the random factors.", min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Try every property of a network: contraction, gradient, count, rank, start. Exit code 1 if one fails.

    A line is tried at the sizes given (small ones are chosen for the rest), a family at small sites.

    **Example**

    `tnpeft check "w[r] U[out r] V[inp r] -> out inp"`
    """
    from tnpeft.testing import examine

    written = "[" in net  # a line is a network even where it has no rank to give
    line = read_network(net, None if written else rank, option)
    line = line.network if written and isinstance(line, Factorization) else line
    known = read_sizes(size, rank, line)
    if isinstance(line, Factorization) and known:
        raise NetworkError("a family is tried at small sites of its own", remedy="leave --size out, or write a line")
    report = examine(line, known, seed=seed)
    show(report.as_dict(), as_json, lambda: str(report))
    if not report:
        raise typer.Exit(1)


@app.command()
def families(
    name: Annotated[str | None, typer.Argument(help="One family, for all about it.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """All named factorizations: parameter formula, options with their defaults, and how sure the source is.

    **Examples**

    `tnpeft families`

    `tnpeft families vera`
    """
    from tnpeft.cli.format import described
    from tnpeft.families import get, names

    rows = [described(each) for each in ([name] if name else names())]
    if name:
        from inspect import getdoc

        text = "\n".join([*rows[0]["lines"], "", f"{name}({rows[0]['options']})", "", getdoc(get(name)) or ""])
        show(rows[0], as_json, lambda: text)
    else:
        show(rows, as_json, lambda: _table(rows))


@app.command()
def budget(
    nets: Annotated[
        list[str], typer.Argument(metavar="NETWORK...", help="Families, or lines of einsum.", show_default=False)
    ],
    parameters: Annotated[
        str, typer.Option("--parameters", "-p", help="A number, or a family or line whose count it is.")
    ],
    rank: RankOption = None,
    size: SizeOption = None,
    ratio: RatioOption = None,
    model: ModelOption = None,
    targets: TargetsOption = None,
    by: Annotated[str, typer.Option(help="The quantity that the budget limits: parameters or dof.")] = "parameters",
    as_json: JsonOption = False,
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

    goal = read_budget(parameters, rank)
    held = read_sizes(size) | ({} if isinstance(goal, Factorization) else read_sizes(rank))
    if isinstance(goal, Network):
        raise NetworkError(
            "the budget's line has a bond without a rank", line=parameters, remedy="pass --rank NAME=NUMBER"
        )
    where: dict[str, Any] = {"model": model, "targets": targets, "ratios": read_ratios(ratio), "by": by}
    found = rungs(nets, held, parameters=goal, **where)
    show(asdict(found), as_json, lambda: str(found))


def _facts(data: dict[str, Any]) -> str:
    """One fact a line; the factors and steps in one line each."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "  ".join(f"{key} {text(each)}" for key, each in value.items())
        if isinstance(value, list):
            return "; ".join(map(text, value))
        return f"{value:,}" if isinstance(value, int | float) else str(value)

    rows = [
        ({"mebibytes": "MiB"}.get(key, key.replace("_", " ")), text(value))
        for key, value in data.items()
        if value not in (None, {}, [], "")
    ]
    return Table((), tuple(rows)).text()


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
def models(as_json: JsonOption = False) -> None:
    """The models whose sizes are known by name; any other one is read from its configuration.

    **Example**

    `tnpeft models`
    """
    from tnpeft.counting import names

    show([*names()], as_json, lambda: "\n".join(names()))
