"""``python -m tnpeft``: the command line, also for ``torchrun -m tnpeft train ...``."""

from __future__ import annotations

from tnpeft.cli import main

if __name__ == "__main__":
    main()
