"""Tables: one printer for terminals, Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_TEX = {character: f"\\{character}" for character in "%_&#${}"}
_TEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
_TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "±": r"\textpm{}", "×": r"\texttimes{}", "−": "-", "\n": " "}
_SIDE = {"<": "left", ">": "right", "^": "center"}


@dataclass(frozen=True)
class Table:
    """Rows of values under headings.

    ``align`` has a character for each column, ``<`` left, ``>`` right or ``^`` centred, the last of which goes on for
    further columns; an empty ``head`` prints no headings. Text has a ``rule`` under the headings and an ``indent``.

    >>> print(Table(("step", "macs"), (("t1", 1200), ("t2", None)), "<>", rule=True).text())
    step   macs
    -----------
    t1    1,200
    t2
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    align: str = "<"
    rule: bool = False
    indent: str = ""

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], align: str = "<") -> Table:
        """Return the table of rows that all have the keys of the first.

        >>> Table.of([{"a": 1, "b": "x"}]).head
        ('a', 'b')
        """
        listed = [*rows]
        return cls(tuple(map(str, listed[0])) if listed else (), tuple(tuple(row.values()) for row in listed), align)

    def text(self) -> str:
        """Return aligned text."""
        cells = [[cell(value) for value in row] for row in ((self.head,) if self.head else ()) + self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        sides = self._sides(len(widths))
        lines = []
        for row in cells:
            padded = (f"{c:{side}{width}}" for c, side, width in zip(row, sides, widths, strict=True))
            lines.append(f"{self.indent}{'  '.join(padded)}".rstrip())
        if self.rule and self.head:
            lines.insert(1, self.indent + "-" * (sum(widths) + 2 * len(widths) - 2))
        return "\n".join(lines)

    def markdown(self) -> str:
        """Return a Markdown table; empty text for no columns.

        >>> print(Table(("a", "b"), ((1, "x|y"),), "<>").markdown())
        | a | b |
        | --- | ---: |
        | 1 | x\\|y |
        """
        if not self.head:
            return ""
        rules = [{"<": "---", ">": "---:", "^": ":---:"}[side] for side in self._sides(len(self.head))]
        body = [[cell(v).replace("|", "\\|").replace("\n", " ") for v in row] for row in (self.head, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (body[0], rules, *body[1:]))

    def csv(self) -> str:
        """Return CSV with a header; numbers as they are, None as an empty field.

        >>> Table(("a", "b"), ((1000, "x, y"),)).csv()
        'a,b\\n1000,"x, y"\\n'
        """
        if not self.head:
            return ""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows((self.head, *self.rows))
        return stream.getvalue()

    def latex(self) -> str:
        r"""Return a LaTeX ``tabular`` with the rules of booktabs; columns of whole numbers stand to the right.

        >>> print(Table(("a", "b"), ((1, "5 %"),)).latex())
        \begin{tabular}{rl}
        \toprule
        a & b \\
        \midrule
        1 & 5 \% \\
        \bottomrule
        \end{tabular}
        """
        if not self.rows:
            return ""

        def line(values: Sequence[Any]) -> str:
            return " & ".join("".join(_TEX.get(c, c) for c in cell(v)) for v in values) + r" \\"

        kinds = "".join("r" if isinstance(v, int) else "l" for v in self.rows[0])
        top = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", line(self.head), r"\midrule"]
        return "\n".join([*top, *map(line, self.rows), r"\bottomrule", r"\end{tabular}"])

    def html(self) -> str:
        """Return an HTML table for a notebook, every cell escaped.

        >>> Table((), (("<b>",),)).html()
        '<table><tbody><tr><td style="text-align:left;padding:0 .5em">&lt;b&gt;</td></tr></tbody></table>'
        """
        sides = [
            f"text-align:{_SIDE[side]};padding:0 .5em" for side in self._sides(max(map(len, (self.head, *self.rows))))
        ]

        def row(values: Sequence[Any], tag: str) -> str:
            cells = zip(values, sides, strict=True)
            inner = "".join(f'<{tag} style="{side}">{escape(cell(v))}</{tag}>' for v, side in cells)
            return f"<tr>{inner}</tr>"

        head = f"<thead>{row(self.head, 'th')}</thead>" if self.head else ""
        return f"<table>{head}<tbody>{''.join(row(each, 'td') for each in self.rows)}</tbody></table>"

    def _sides(self, columns: int) -> str:
        return self.align[:columns] + self.align[-1] * (columns - len(self.align))


def cell(value: Any) -> str:
    """Return a value as a table shows it: whole numbers with commas, None as nothing.

    >>> cell(196608), cell(None), cell(0.5)
    ('196,608', '', '0.5')
    """
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Printed:
    """What prints as its parts, texts and tables, one below the other; in a notebook as HTML.

    >>> class Note(Printed):
    ...     def _parts(self):
    ...         return "a < b", Table((), ((1, 2),))
    >>> print(Note())
    a < b
    1  2
    >>> Note()._repr_html_()[:32]
    '<div><pre>a &lt; b</pre><table><'
    """

    def _parts(self) -> Iterable[str | Table]:
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(part if isinstance(part, str) else part.text() for part in self._parts())

    def _repr_html_(self) -> str:
        shown = (p.html() if isinstance(p, Table) else f"<pre>{escape(p)}</pre>" for p in self._parts() if p)
        return f"<div>{''.join(shown)}</div>"
