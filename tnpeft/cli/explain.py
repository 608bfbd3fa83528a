"""The command that explains an adapter's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tnpeft.cli.app import app, show
from tnpeft.cli.parse import JsonOption, ModelOption


@app.command()
def explain(
    folder: Annotated[Path, typer.Argument(help="A folder that save_pretrained wrote.")],
    model: ModelOption = None,
    as_json: JsonOption = False,
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
