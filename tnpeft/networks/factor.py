"""Factors and their products: the parts that a network is made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

Kind = Literal["trainable", "frozen", "constant"]
Group = tuple[str, ...]

PREFIX: dict[Kind, str] = {"trainable": "", "frozen": "~", "constant": "^"}
RESERVED = frozenset({"tokens", "frozen", "model", "targets"})


@dataclass(frozen=True)
class Factor:
    """A small array of a factorization: a name, one index per axis, and what trains it.

    ``kind`` is ``"trainable"``, ``"frozen"`` (random, regenerated from a seed) or ``"constant"`` (data).

    >>> print(Factor("A", ("r", "inp"), "frozen"))
    ~A[r inp]
    """

    name: str
    indices: Group
    kind: Kind = "trainable"

    def __str__(self) -> str:
        return f"{PREFIX[self.kind]}{self.name}[{' '.join(self.indices)}]"


@dataclass(frozen=True)
class Term:
    """One product of factors, with its sign (+1 or -1) in the sum.

    >>> print(Term((Factor("B", ("out", "r")), Factor("A", ("r", "inp")))))
    B[out r] A[r inp]
    """

    factors: tuple[Factor, ...]
    sign: int = 1

    def places(self) -> Counter[str]:
        """In how many factors each index stands (a factor used twice is two places)."""
        return Counter(index for factor in self.factors for index in factor.indices)

    def __str__(self) -> str:
        return " ".join(map(str, self.factors))
