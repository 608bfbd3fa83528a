"""The command line itself: one group of commands whose errors are answers, not tracebacks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tnpeft.networks import TnpeftError


class _Group(TyperGroup):
    """Bad input ends with exit code 2 and the error's text, an interruption with 130; a failed check ends with 1."""

    def invoke(self, ctx: Any) -> Any:
        shown = set()

        def warn(message: Warning | str, *_: Any, **__: Any) -> None:
            if str(message) not in shown:
                typer.echo(f"warning: {message}", err=True)
            shown.add(str(message))

        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = warn
            try:
                return super().invoke(ctx)
            except (TnpeftError, ModuleNotFoundError, OSError) as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(2) from None
            except KeyboardInterrupt:  # nothing is lost
                typer.echo("stopped; start the same command to go on", err=True)
                raise typer.Exit(130) from None


app = typer.Typer(
    name="tnpeft",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Tensor-network algebra for parameter-efficient fine-tuning: an adapter is one line of named einsum.

Wherever a NETWORK is wanted, write a family's name (`tnpeft families` lists them) or a line, such as
`"B[layer proj out r] A[layer proj r inp] -> layer proj out inp"`. Exit codes: 0 fine, 1 a check failed,
2 bad input.""",
)


def _version(asked: bool) -> None:
    if asked:
        from tnpeft import __version__

        typer.echo(f"tnpeft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    asked: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the application itself."""


def show(data: Any, as_json: bool, text: Callable[[], str]) -> None:
    """Print one answer: as JSON, or as text made only then.

    >>> show({"count": 3}, True, lambda: "3")
    {"count": 3}
    """
    typer.echo(json.dumps(data, default=str) if as_json else text())


def main() -> None:
    """Run the command line."""
    app()
