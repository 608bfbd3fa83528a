"""Derive parameter counts of papers from their lines of einsum, and through their families where there are any.

Reads ``paper/published/counts.toml``, writes ``paper/tables/counts.md`` and ``counts.csv``, and exits with 1 if a
count differs from its recorded value. Values that a paper prints, that a secondary source gives, and that are worked
out from these by hand are told apart.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tnpeft import families
from tnpeft._text import Table, cell
from tnpeft.layout import layout
from tnpeft.networks import Network, NetworkError, Site, network
from tnpeft.networks.sizes import bind, complete
from tnpeft.studies.files import canonical, read_toml, write_text

EVIDENCE = {
    "printed": "in the paper, its abstract or its code",
    "secondary": "in somebody else's note, table or slides",
    "derived": "published by nobody as far as known: worked out by hand from the paper's formula",
}
SHOWN = ("id", "method", "model", "value", "evidence", "from the line", "from the family", "match", "convention")
PAPER = Path(__file__).resolve().parent.parent / "paper"


@dataclass(frozen=True)
class Group:
    """Sites of equal sizes: their line, all sizes of its indices, the options of their family, their projections."""

    name: str
    network: Network
    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    projections: tuple[str, ...]

    def sites(self) -> Iterator[Site]:
        """The sites; a size that the entry leaves open enters frozen factors only, so any number serves."""
        net, sizes = self.network, self.sizes
        out, inp = (prod(sizes.get(index, 1) for index in side) for side in (net.rows, net.cols))
        for layer in range(sizes["layer"]):
            for projection in self.projections:
                yield Site(layer, projection, out, inp, heads=sizes.get("head", 0), experts=sizes.get("expert", 0))


@dataclass(frozen=True)
class Row:
    """A recorded count and what it was derived to be: by its line, and by its family (None without one)."""

    entry: Mapping[str, Any]
    by_line: int
    by_family: int | None

    @property
    def match(self) -> bool:
        """True if every derivation gives the recorded value."""
        return self.by_line == self.entry["value"] and self.by_family in (None, self.entry["value"])

    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        entry = self.entry
        options = ", ".join(f"{name}={value!r}" for name, value in entry.get("options", {}).items())
        return {
            **{key: cell(entry[key]) for key in ("id", "method", "model", "value", "evidence")},
            "printed as": entry.get("printed_as", ""),
            "from the line": cell(self.by_line),
            "from the family": cell(self.by_family),
            "match": "yes" if self.match else "NO",
            "convention": entry["convention"],
            "extra": f"{entry['extra']:,} ({entry['extra_what']})" if "extra" in entry else "",
            "source": entry["source"],
            "line": entry["line"],
            "family": f"{entry['family']}({options})" if "family" in entry else "",
        }


def groups_of(entry: Mapping[str, Any]) -> Iterator[Group]:
    """The groups of an entry, each with its sizes filled in; an entry without groups is one group.

    Raises:
        NetworkError: a line is not a network, or a size is not a positive integer.
    """
    taken = 0
    for group in entry.get("groups", ({"name": "all", "sizes": {}},)):
        net = network(group.get("line", entry["line"]))
        sizes = bind(net, {**entry["sizes"], **entry["ranks"], **group["sizes"]}, {})
        count = sizes.get("proj", 1)
        projections = tuple(group.get("projections", (f"p{taken + k}" for k in range(count))))
        taken += count
        options = {**entry.get("options", {}), **group.get("options", {})}
        yield Group(group["name"], net, sizes, options, projections)


def count_by_line(groups: Iterable[Group]) -> int:
    """Elements of all trainable factors, by the structure of the lines alone.

    A factor that carries ``proj`` belongs to its group; any other is shared by all groups that have its shape.

    Raises:
        NetworkError: a trainable factor has an index without a size.
    """
    stored: dict[tuple[str, tuple[int, ...], str], int] = {}
    for group in groups:
        for factor in group.network.factors:
            if factor.kind == "trainable":
                complete(group.network, group.sizes, factor.indices)
                shape = tuple(group.sizes[index] for index in factor.indices)
                stored[factor.name, shape, group.name if "proj" in factor.indices else ""] = prod(shape)
    return sum(stored.values())


def count_by_family(name: str, groups: Iterable[Group]) -> int:
    """Trainable elements of a family over the sites of the groups; groups of equal options share a layout."""
    alike: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        alike[canonical(group.options)].append(group)
    declare = families.get(name)
    return sum(
        layout(declare(**same[0].options), [site for group in same for site in group.sites()]).count()
        for same in alike.values()
    )


def derive(entry: Mapping[str, Any]) -> Row:
    """Return the recorded count with its derivations.

    Raises:
        NetworkError: the entry cannot be derived; the message names it.
    """
    try:
        groups, extra = [*groups_of(entry)], entry.get("extra", 0)
        by_family = count_by_family(entry["family"], groups) + extra if "family" in entry else None
        return Row(entry, count_by_line(groups) + extra, by_family)
    except NetworkError as error:
        problem = f"{entry['id']}: {error.problem}"
        raise NetworkError(problem, line=error.line, position=error.position, remedy=error.remedy) from None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the recorded counts of a file."""
    entries: list[dict[str, Any]] = read_toml(path)["count"]
    return entries


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, under a line that says how many match."""
    shown = ({column: row.cells()[column] for column in SHOWN} for row in rows)
    marks = "\n".join(f"- {line}" for line in summary(rows))
    return f"""# Parameter counts from lines of einsum

{sum(row.match for row in rows)} of {len(rows)} recorded values follow exactly from their lines of einsum, \
{sum(row.by_family is not None for row in rows)} of them through a family as well. By evidence:

{marks}

Lines, sizes, extras and sources: `counts.csv` and `paper/published/counts.toml`.

{Table.of(shown, "<<<><>><").markdown()}
"""


def summary(rows: Sequence[Row]) -> list[str]:
    """Return one line for each mark of evidence: how many values match, and where they stand."""
    marked = {mark: [row.match for row in rows if row.entry["evidence"] == mark] for mark in EVIDENCE}
    return [f"{mark}: {sum(its)} of {len(its)} ({EVIDENCE[mark]})" for mark, its in marked.items()]


def main(published: Path = PAPER / "published" / "counts.toml", tables: Path = PAPER / "tables") -> int:
    """Write the tables of the published counts; 0 if every count matches, else 1."""
    rows = [derive(entry) for entry in read(published)]
    write_text(tables / "counts.md", markdown(rows))
    write_text(tables / "counts.csv", Table.of(row.cells() for row in rows).csv())
    wrong = [row.cells() for row in rows if not row.match]
    for its in wrong:
        found = f"from the line {its['from the line']}, from the family {its['from the family'] or 'None'}"
        print(f"{its['id']}: {its['evidence']} {its['value']}, {found}", file=sys.stderr)
    print("parameter counts that follow exactly from their lines", *summary(rows), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
