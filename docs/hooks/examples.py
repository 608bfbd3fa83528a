"""The examples of docstrings as code: Markdown by itself takes ``>>>`` for a quotation."""

from __future__ import annotations

import textwrap
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Puts every example of a docstring into a fence before the pages are made."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each object that is read."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with each paragraph that starts with a prompt as a block of Python."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(fence(each) if each.lstrip().startswith(">>>") else each for each in paragraphs)


def fence(example: str) -> str:
    """One example as a block of code, at its own indentation."""
    code = f"```python\n{textwrap.dedent(example)}\n```"
    return textwrap.indent(code, " " * (len(example) - len(example.lstrip())))
