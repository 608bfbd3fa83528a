"""Networks: factors over named indices, multiplied and summed. Structure only, no sizes, no data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from tnpeft.networks.display import network_html, svg
from tnpeft.networks.errors import NetworkError
from tnpeft.networks.factor import Factor, Group, Kind, Term
from tnpeft.networks.formatting import position_of, tokens_of
from tnpeft.networks.validation import find_errors


@dataclass(frozen=True)
class Network:
    """A sum of products of factors, and the groups of indices that are left open.

    The last two groups of ``output`` are the matrix's rows and columns, what stands before them are stack
    indices. Build one with :func:`tnpeft.network`; building it checks it.

    Raises:
        NetworkError: the structure is not a contraction; the message quotes the line and says what to change.

    >>> net = Network((Term((Factor("B", ("layer", "out", "r")), Factor("A", ("r", "inp")))),),
    ...               (("layer",), ("out",), ("inp",)))
    >>> net.bonds, net.stack, net.rows, net.cols
    (('r',), ('layer',), ('out',), ('inp',))
    """

    terms: tuple[Term, ...]
    output: tuple[Group, ...]

    def __post_init__(self) -> None:
        for focus, problem, remedy in find_errors(self.terms, self.output):
            line, position = position_of(self.terms, self.output, focus)
            raise NetworkError(problem, line=line, position=position, remedy=remedy)

    # ---- factors and indices

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Distinct factors in order of appearance: a factor used twice stands here once."""
        seen: dict[tuple[str, Kind], Factor] = {}
        for factor in self.uses():
            seen.setdefault((factor.name, factor.kind), factor)
        return tuple(seen.values())

    def uses(self) -> Iterator[Factor]:
        """Every factor of every term, repeats included."""
        return (factor for term in self.terms for factor in term.factors)

    def label(self, factor: Factor) -> str:
        """The factor's key among arrays: its name, or ``~G`` for the frozen start value of a trainable ``G``."""
        twin = factor.kind == "frozen" and any(
            other.name == factor.name and other.kind == "trainable" for other in self.uses()
        )
        return f"~{factor.name}" if twin else factor.name

    def factor(self, label: str) -> Factor:
        """The factor with this label.

        Raises:
            NetworkError: no factor has that label.
        """
        for factor in self.factors:
            if self.label(factor) == label:
                return factor
        names = ", ".join(self.label(factor) for factor in self.factors)
        raise NetworkError(f"no factor is called {label!r}", line=str(self), remedy=f"the factors are {names}")

    @property
    def indices(self) -> Group:
        """Every index, in order of first appearance."""
        return tuple(dict.fromkeys(index for factor in self.uses() for index in factor.indices))

    @property
    def outer(self) -> Group:
        """The open indices, in output order."""
        return tuple(index for group in self.output for index in group)

    @property
    def bonds(self) -> Group:
        """Every summed index; its size is a rank."""
        outer = set(self.outer)
        return tuple(index for index in self.indices if index not in outer)

    @property
    def hyper(self) -> Group:
        """Indices in three or more places of one term; standing in the output is one place."""
        outer = set(self.outer)
        return self._where(lambda index, count: count + (index in outer) >= 3)

    @property
    def batch(self) -> Group:
        """Open indices that two or more factors of one term carry."""
        outer = set(self.outer)
        return self._where(lambda index, count: count >= 2 and index in outer)

    def _where(self, test) -> Group:  # type: ignore[no-untyped-def]
        counts = [term.places() for term in self.terms]
        return tuple(i for i in self.indices if any(test(i, count[i]) for count in counts if i in count))

    @property
    def stack(self) -> Group:
        """Open indices before the matrix: which site an entry belongs to."""
        return tuple(index for group in self.output[:-2] for index in group)

    @property
    def rows(self) -> Group:
        """Indices of the matrix's rows, the output features."""
        return self.output[-2] if len(self.output) > 1 else ()

    @property
    def cols(self) -> Group:
        """Indices of the matrix's columns, the input features."""
        return self.output[-1] if self.output else ()

    # ---- new networks from this one

    def rename(self, names: Mapping[str, str] | None = None, /, **more: str) -> Network:
        """The same network with indices renamed.

        Raises:
            NetworkError: an index is not in the line, or the new names collide.

        >>> from tnpeft.networks import network
        >>> print(network("B[out r] A[r inp] -> out inp").rename(r="k"))
        B[out k] A[k inp] -> out inp
        """
        mapping = {**(names or {}), **more}
        for old in mapping:
            self._require(old, self.indices, "indices")
        for new, count in Counter(mapping.get(index, index) for index in self.indices).items():
            if count > 1:
                raise NetworkError(
                    f"two indices would both be called {new!r}", line=str(self), remedy="choose another name"
                )
        return self._map(lambda group: tuple(mapping.get(index, index) for index in group))

    def select(self, *stack: str, **at: int) -> Network:
        """The network of one value of some stack indices, such as ``select(layer=3)`` or ``select("layer")``.

        Structure knows no values, so ``select(layer=3)`` and ``select(layer=5)`` are equal.

        Raises:
            NetworkError: an index is not a stack index, or a value is not a whole number from 0 on.

        >>> from tnpeft.networks import network
        >>> print(network("B[layer out r] A[r inp] -> layer out inp").select(layer=3))
        B[out r] A[r inp] -> out inp
        """
        for index, value in at.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise NetworkError(
                    f"cannot select {index}={value!r}", line=str(self), remedy="give a whole number from 0 on"
                )
        gone = {*stack, *at}
        for index in gone:
            self._require(index, self.stack, "stack indices")
        return self._map(lambda group: tuple(index for index in group if index not in gone))

    def apply(self, name: str = "x", batch: str = "token") -> Network:
        """This network with its activations: ``name[batch *cols]`` times every term, output ``(*stack) batch rows``.

        Raises:
            NetworkError: ``name`` or ``batch`` is taken, or the output has no rows and columns.

        >>> from tnpeft.networks import network
        >>> print(network("B[out r] A[r inp] -> out inp").apply())
        B[out r] A[r inp] ^x[token inp] -> token out
        """
        self.require_matrix()
        if batch in self.indices or any(factor.name == name for factor in self.uses()):
            raise NetworkError(
                f"the name {batch if batch in self.indices else name!r} is taken",
                line=str(self),
                remedy="pass another name= or batch=",
            )
        x = Factor(name, (batch, *self.cols), "constant")
        terms = tuple(Term((*term.factors, x), term.sign) for term in self.terms)
        return Network(terms, (*self.output[:-2], (batch,), self.rows))

    def require_matrix(self) -> None:
        """Raise a NetworkError unless the output has rows and columns."""
        if len(self.output) < 2:
            raise NetworkError(
                "the output has no rows and columns",
                line=str(self),
                position=str(self).index("->"),
                remedy="end the output with two groups: rows (output features), then columns (input features)",
            )

    def _map(self, change) -> Network:  # type: ignore[no-untyped-def]
        terms = tuple(
            Term(tuple(Factor(f.name, change(f.indices), f.kind) for f in term.factors), term.sign)
            for term in self.terms
        )
        changed = [(group, change(group)) for group in self.output]
        return Network(terms, tuple(new for old, new in changed if new or not old))

    def _require(self, index: str, known: Iterable[str], what: str) -> None:
        if index not in known:
            raise NetworkError(
                f"{index!r} is none of the {what}",
                line=str(self),
                remedy=f"the {what} are {', '.join(known) or 'none'}",
            )

    @cached_property
    def _text(self) -> str:
        return "".join(text for text, _ in tokens_of(self.terms, self.output))

    def __str__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return network_html(self)

    def _repr_svg_(self) -> str | None:
        return svg(self)

    def __repr__(self) -> str:
        return f"network({str(self)!r})"
