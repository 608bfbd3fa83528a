"""The command that puts families and lines side by side."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tnpeft.cli.app import app
from tnpeft.cli.parse import RatioOption, SizeOption, TargetsOption, read_named, read_number, read_ratios, read_sizes


class Form(StrEnum):
    """The forms that a table is printed in."""

    text = "text"
    md = "md"
    csv = "csv"
    json = "json"


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
    targets: TargetsOption = None,
    size: SizeOption = None,
    ratio: RatioOption = None,
    tokens: Annotated[int, typer.Option(help="Rows of activations that the plans are for.", min=1)] = 2048,
    sort: Annotated[
        str, typer.Option(help="Column: name, parameters, dof, rank_bound, gain, macs, saved_bytes, plan_seconds.")
    ] = "parameters",
    by: Annotated[str, typer.Option(help="The quantity that the budget limits: parameters or dof.")] = "parameters",
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
        [read_named(text) for text in nets],
        model=model,
        parameters=None if parameters is None else read_number(parameters),
        targets=targets,
        tokens=tokens,
        sort=sort,
        by=by,
        ratios=read_ratios(ratio),
        **read_sizes(size),
    )
    if plot is not None:
        found.plot(plot)
    texts = {Form.text: found.__str__, Form.md: found.to_markdown, Form.csv: found.to_csv, Form.json: found.to_json}
    typer.echo(texts[form]().rstrip("\n"))
