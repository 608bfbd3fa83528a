"""Derive parameter counts of papers from their lines of einsum, and through their families where there are any.

Reads ``paper/published/counts.toml``, writes ``paper/tables/counts.md`` and ``counts.csv``, and exits with 1 if a
count differs from its recorded value. Values that a paper prints, that a secondary source gives, and that are worked
out from these by hand are told apart.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
    """The groups of an entry, each with its sizes filled in; an entry without groups is one group."""
    taken = 0
    for group in entry.get("groups", ({"name": "all", "sizes": {}},)):
        net = network(group.get("line", entry["line"]))
        sizes = bind(net, {**entry["sizes"], **entry["ranks"], **group["sizes"]}, {})
        count = sizes.get("proj", 1)
        projections = tuple(group.get("projections", (f"p{taken + k}" for k in range(count))))
        taken += count
        yield Group(group["name"], net, sizes, entry.get("options", {}) | group.get("options", {}), projections)


def count_by_line(groups: Sequence[Group]) -> int:
    """Elements of all trainable factors, by the structure of the lines alone.

    A factor that carries ``proj`` belongs to its group; any other is shared by all groups that have its shape.
    """
    stored: dict[tuple[str, tuple[int, ...], str], int] = {}
    for group in groups:
        for factor in group.network.factors:
            if factor.kind == "trainable":
                complete(group.network, group.sizes, factor.indices)
                shape = tuple(group.sizes[index] for index in factor.indices)
                stored[factor.name, shape, group.name if "proj" in factor.indices else ""] = prod(shape)
    return sum(stored.values())


def count_by_family(name: str, groups: Sequence[Group]) -> int:
    """Trainable elements of a family over the sites of the groups; groups of equal options share a layout.

    A size that the entry leaves open enters frozen factors only, so any number serves.
    """
    alike: dict[str, list[Site]] = defaultdict(list)
    for group in groups:
        net, sizes = group.network, group.sizes
        out, inp = (prod(sizes.get(index, 1) for index in side) for side in (net.rows, net.cols))
        more = {"heads": sizes.get("head", 0), "experts": sizes.get("expert", 0)}
        places = [(layer, projection) for layer in range(sizes["layer"]) for projection in group.projections]
        alike[canonical(group.options)] += [Site(*place, out, inp, **more) for place in places]
    declare = families.get(name)
    return sum(layout(declare(**json.loads(options)), sites).count() for options, sites in alike.items())


def derive(entry: Mapping[str, Any]) -> Row:
    """Return the recorded count with its derivations.

    Raises:
        NetworkError: a line is not a network, or a size that counts is missing or wrong; the message names the entry.
    """
    try:
        groups, extra = [*groups_of(entry)], entry.get("extra", 0)
        by_family = count_by_family(entry["family"], groups) + extra if "family" in entry else None
        return Row(entry, count_by_line(groups) + extra, by_family)
    except NetworkError as error:
        problem = f"{entry['id']}: {error.problem}"
        raise NetworkError(problem, line=error.line, position=error.position, remedy=error.remedy) from None


def main(published: Path = PAPER / "published" / "counts.toml", tables: Path = PAPER / "tables") -> int:
    """Write the tables of the published counts; 0 if every count matches, else 1."""
    rows = [derive(entry) for entry in read_toml(published)["count"]]
    cells = [row.cells() for row in rows]
    marks = []
    for mark, meaning in EVIDENCE.items():
        found = [row.match for row in rows if row.entry["evidence"] == mark]
        marks.append(f"{mark}: {sum(found)} of {len(found)} ({meaning})")
    listed = "\n".join(f"- {line}" for line in marks)
    text = f"""# Parameter counts from lines of einsum

{sum(row.match for row in rows)} of {len(rows)} recorded values follow exactly from their lines of einsum, \
{sum(row.by_family is not None for row in rows)} of them through a family as well. By evidence:

{listed}

Lines, sizes, extras and sources: `counts.csv` and `paper/published/counts.toml`.

{Table.of(({column: its[column] for column in SHOWN} for its in cells), "<<<><>><").markdown()}
"""
    write_text(tables / "counts.md", text)
    write_text(tables / "counts.csv", Table.of(cells).csv())
    wrong = [its for its in cells if its["match"] == "NO"]
    for its in wrong:
        text = f"from the line {its['from the line']}, from the family {its['from the family'] or 'None'}"
        print(f"{its['id']}: {its['evidence']} {its['value']}, {text}", file=sys.stderr)
    print("parameter counts that follow exactly from their lines", *marks, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
