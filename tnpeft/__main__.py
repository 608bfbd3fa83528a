"""``python -m tnpeft``: the command line, also for ``torchrun -m tnpeft train ...``."""

from __future__ import annotations

import sys

from tnpeft._extras import needed


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        needed("typer", "cli", "the command line")
    except ModuleNotFoundError as error:
        sys.exit(f"tnpeft: {error}")
    from tnpeft.cli import main as run

    run()


if __name__ == "__main__":
    main()
