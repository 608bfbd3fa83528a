"""Commands that train: train, sweep, report."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from tnpeft.cli.app import app, show
from tnpeft.cli.parse import JsonOption
from tnpeft.studies.files import StudyError

Data = Annotated[str, typer.Option(help="Folder with the tasks' files, or hub.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Backbone = Annotated[str, typer.Option(help="Another backbone than the file's.")]
Tokenizer = Annotated[str, typer.Option(help="Another tokenizer than the file's; bytes needs no file.")]


def _table(text: str, option: str) -> dict[str, Any]:
    """``rank=8 alpha=16`` or any other TOML assignments, parted by ``;`` or new lines, as a table."""
    try:
        return tomllib.loads(text.replace(";", "\n"))
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"invalid TOML: {error}", where=f"{option} {text!r}", remedy="such as 'rank=8'") from None


@app.command()
def train(
    family: Annotated[
        str, typer.Argument(help="A family (tnpeft families), also with its rank (lora:8), or a line.")
    ],
    model: Annotated[str, typer.Option(help="Hub id, folder, random:facebook/opt-125m, digits, or smollm2.")],
    task: Annotated[str, typer.Option(help="sst2, rte, boolq, mrpc, cola, digits_shifted, or a .toml file.")],
    out: Out,
    data: Data = "",
    args: Annotated[str, typer.Option(help="Of the family or line: 'rank=8' or 'ranks={r=8}; scale=2.0'.")] = "",
    targets: Annotated[str, typer.Option(help="Projections, by comma.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Hub id or folder, if not the model's own.")] = "",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 500,
    batch: Annotated[int, typer.Option(help="Examples per step.")] = 16,
    seed: Annotated[int, typer.Option(help="Of splits, order and start values.")] = 0,
    head: Annotated[str, typer.Option(help="words (label words) or classifier.")] = "words",
    settings: Annotated[str, typer.Option(help="More of the protocol: 'dev=100; schedule=\"cosine\"'.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Adapt a model to a task and save the adapter; stopped and started again it goes on.

    tnpeft train cp --args rank=21 --model facebook/opt-1.3b --task sst2 --data hub --out runs/cp21
    """
    from tnpeft.families.catalogue import rank_option
    from tnpeft.studies.files import read_toml
    from tnpeft.studies.running.execution import train as make

    name, _, rank = (family, "", "") if "->" in family else family.partition(":")
    method: dict[str, Any] = {"line" if "->" in family else "family": name}
    if args or rank:
        given = f"{rank_option(name) or 'rank'}={rank}" if rank else ""
        method["args"] = _table("; ".join(filter(None, (given, args))), "--args")
    more = _table(settings, "--settings")
    result = make(
        out,
        model=model,
        task=read_toml(task) if task.endswith(".toml") else task,
        method=method,
        data=data or (str(Path(task).parent) if task.endswith(".toml") else ""),
        tokenizer=tokenizer,
        lr=lr,
        seed=seed,
        progress=None if as_json else _progress,
        say=(lambda _: None) if as_json else typer.echo,
        **{"targets": [t for t in targets.split(",") if t], "steps": steps, "batch": batch, "head": head, **more},
    )
    text = f"{result['parameters']:,} parameters, dev {result['dev']:.4f} at step {result['best_step']}, "
    text += f"eval {result['eval']:.4f} ({result['metric']}); adapter in {out / 'adapter'}"
    show(result, as_json, lambda: text)


def _progress(step: int, steps: int, loss: float, dev: float) -> None:
    filled = round(20 * step / max(1, steps))
    bar = "#" * filled + "." * (20 - filled)
    typer.echo(f"[{bar}] step {step}/{steps}, training loss {loss:.4f}, dev {dev:.4f}")


@app.command()
def sweep(
    study: Annotated[Path, typer.Argument(help="A study as TOML.")],
    out: Out = Path("runs/sweep"),
    data: Data = "",
    backbone: Backbone = "",
    engine: Annotated[str, typer.Option(help="processes, serial or ray.")] = "processes",
    workers: Annotated[int, typer.Option(help="Runs side by side; 0: one for each core.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of each run.")] = 1,
    retry: Annotated[bool, typer.Option(help="Make failed runs again.")] = False,
    pack: Annotated[int, typer.Option(help="Runs of several seeds and learning rates trained in one pass.")] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs of each run on Ray, where there are any; 0.5 shares one.")] = 1.0,
    tokenizer: Tokenizer = "",
    attempt: Annotated[int, typer.Option("--try", help="Only try each method for so many steps.")] = 0,
) -> None:
    """Make every run of a study that is not there yet; stop it and start it again at any moment.

    With --try nothing is kept: each method makes a few steps, a model of the hub with random weights in its shape.
    """
    from tnpeft.studies.running.dry_run import trial
    from tnpeft.studies.running.pool import Engine
    from tnpeft.studies.running.sweeping import sweep as make
    from tnpeft.studies.study import Study

    its = Study.read(study, data=data, backbone=backbone, tokenizer=tokenizer)
    failed = False
    if attempt:
        for row in trial(its, steps=attempt):
            told = {key: f"{value:,}" if isinstance(value, int) else value for key, value in row.items()}
            typer.echo(", ".join(f"{key} {value}" for key, value in told.items()))
            failed |= row["outcome"] != "losses finite"
    else:
        where = Engine(engine, workers, threads, retry, pack, gpus)
        failed = make(its, out, where, say=typer.echo).failed > 0
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="The study that was swept.")],
    runs: Annotated[Path, typer.Option(help="Folder of the sweep.")] = Path("runs/sweep"),
    out: Out = Path("runs/report"),
    data: Data = "",
    backbone: Backbone = "",
    tokenizer: Tokenizer = "",
    reference: Annotated[str, typer.Option(help="Label that others are compared with; default: the first.")] = "",
) -> None:
    """Make the tables and figures of a study from its results."""
    from tnpeft._text import Table
    from tnpeft.studies.reports.reporting import report as make
    from tnpeft.studies.reports.tables import results_table
    from tnpeft.studies.study import Study

    points = make(Study.read(study, data=data, backbone=backbone, tokenizer=tokenizer), runs, out, reference)
    typer.echo(f"{Table.of(results_table(points)).markdown()}\n\ntables and figures are in {out}")
