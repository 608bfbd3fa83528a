"""The table of a comparison: frozen rows, and the forms that it is written in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tnpeft._text import Printed, Table

if TYPE_CHECKING:
    from pandas import DataFrame  # type: ignore[import-untyped]

MEASURES = {
    "parameters": "parameters",
    "dof": "dof",
    "rank_bound": "rank bound",
    "gain": "gain",
    "macs": "macs / token / site",
    "saved_bytes": "saved bytes / token / site",
    "plan_seconds": "plan s",
}  # the numbers of a row, with their headings


@dataclass(frozen=True)
class ComparisonRow:
    """One family or line at the budget.

    Attributes:
        name: the family's, or the given one.
        line: the line of einsum (of several, the first that is used).
        ranks: the free ranks at the budget, or all given ones.
        parameters: trained parameters over all sites.
        dof: degrees of freedom over all sites, None where no formula gives them.
        rank_bound: the largest rank that the update of a site can have.
        gain: root mean square over the sites of :func:`tnpeft.gain`, None where the start has none.
        macs: multiply-adds that the update adds to the forward pass, per token and site (the mean over the sites).
        saved_bytes: bytes kept for the backward pass, per token and site, an element in fp32.
        plan_seconds: time of the search for plans in this call; plans are kept, so a second call takes none.
        problem: the reason where the row has no numbers, or lacks one.

    >>> import tnpeft
    >>> row = tnpeft.compare(["cp"], parameters="lora:1", model="facebook/opt-1.3b")[0]
    >>> row.name, row.ranks, row.parameters, row.rank_bound, row.fits
    ('cp', {'r': 21}, 194544, 21, True)
    """

    name: str
    line: str
    ranks: Mapping[str, int | str] = field(default_factory=dict)
    parameters: int | None = None
    dof: int | None = None
    rank_bound: int | None = None
    gain: float | None = None
    macs: float | None = None
    saved_bytes: float | None = None
    plan_seconds: float | None = field(default=None, compare=False)
    problem: str = ""

    @property
    def fits(self) -> bool:
        """True if the family fits the sites at all."""
        return self.parameters is not None


@dataclass(frozen=True)
class Comparison(Printed):
    """Rows by family at one budget; prints as a table.

    Attributes:
        rows: the rows as sorted.
        model: the name of the model.
        targets: the projections.
        sites: the number of adapted sites.
        tokens: rows of activations that the plans are for.
        budget: the number that the ranks are matched to, None for ranks as given.
        by: the quantity that the budget limits.
        sort: the column that the rows are sorted by.

    >>> from tnpeft.comparison import compare
    >>> table = compare(["lora", "cp"], parameters="lora:1", model="facebook/opt-1.3b")
    >>> [(row.name, row.ranks, row.parameters, row.rank_bound) for row in table]
    [('cp', {'r': 21}, 194544, 21), ('lora', {'r': 1}, 196608, 1)]
    """

    rows: tuple[ComparisonRow, ...]
    model: str
    targets: tuple[str, ...]
    sites: int
    tokens: int
    budget: int | None
    by: str
    sort: str

    def __iter__(self) -> Iterator[ComparisonRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> ComparisonRow:
        return self.rows[place]

    def _parts(self) -> tuple[str, Table]:
        return self._title(), self._table()

    def to_markdown(self) -> str:
        """Return the table in Markdown; lines stand as code."""
        return self._table(code=True).markdown()

    def to_csv(self) -> str:
        """Return CSV with a header and the numbers as they are; ranks as ``r=8 s=4``.

        >>> from tnpeft.comparison import compare
        >>> compare(["lora:2"], model="roberta-base").to_csv().splitlines()[1].split(",")[2:5]
        ['r=2', '73728', '73632']
        """
        names = ("name", "line", "ranks", *MEASURES, "problem")
        rows = (asdict(row) | {"ranks": _ranks(row)} for row in self.rows)
        return Table(names, tuple(tuple(row[name] for name in names) for row in rows)).csv()

    def to_json(self) -> str:
        """Return JSON: the budget, the model and the rows."""
        return json.dumps(asdict(self))

    def to_dataframe(self) -> DataFrame:
        """Return a pandas DataFrame, one row for each family, its index the names.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_dataframe needs pandas; pip install pandas", name="pandas") from error
        return DataFrame([asdict(row) for row in self.rows]).set_index("name")

    def plot(self, path: str | Path) -> Path:
        """Write a picture of the table, a panel for each measure, and return its path.

        Raises:
            NetworkError: the ending is none of .svg, .png and .pdf, or no family fits.
        """
        from tnpeft.comparison.plot import plot

        return plot(self.rows, self._title(), MEASURES, path)

    def _title(self) -> str:
        unit = {"parameters": "parameters", "dof": "degrees of freedom"}[self.by]
        goal = "ranks as given" if self.budget is None else f"nearest to {self.budget:,} {unit}"
        return f"{self.model}, {', '.join(self.targets)}: {self.sites} sites, {self.tokens:,} tokens, {goal}"

    def _table(self, code: bool = False) -> Table:
        noted = any(row.problem for row in self.rows)
        head = ("family", "ranks", *MEASURES.values(), *(["problem"] if noted else []))
        rows = []
        for row in self.rows:
            name = f"`{row.name}`" if code and "[" in row.name else row.name
            numbers = (_shown(measure, getattr(row, measure)) for measure in MEASURES)
            rows.append((name, _ranks(row) or "-", *numbers, *([row.problem] if noted else [])))
        return Table(head, tuple(rows), "<<" + ">" * len(MEASURES) + "<", rule=True)


def _ranks(row: ComparisonRow) -> str:
    return " ".join(f"{rank}={size}" for rank, size in row.ranks.items())


def _shown(measure: str, value: float | None) -> int | str:
    """A measure as tables show it: whole numbers whole, others to three digits."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return value
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
