"""Commands that train: train, sweep, report."""

from __future__ import annotations

from tnpeft.cli.app import app
from tnpeft.studies.commands import add_commands

add_commands(app)
