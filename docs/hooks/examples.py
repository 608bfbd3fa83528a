"""Docstrings as Markdown: examples as code, where it would take ``>>>`` for a quotation, and no roles of Sphinx."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Changes every docstring before the pages are made."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each object that is read."""
        if obj.docstring:
            obj.docstring.value = fenced(re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", obj.docstring.value))


def fenced(text: str) -> str:
    """The text with each paragraph that starts with a prompt as a block of Python."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(fence(each) if each.lstrip().startswith(">>>") else each for each in paragraphs)


def fence(example: str) -> str:
    """One example as a block of code, at its own indentation."""
    code = f"```python\n{textwrap.dedent(example)}\n```"
    return textwrap.indent(code, " " * (len(example) - len(example.lstrip())))
