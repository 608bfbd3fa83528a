"""HTML for notebooks: a line in colours, the table of its factors, and a picture where drawing offers one."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable
from contextlib import suppress
from html import escape
from typing import Any, Protocol

from tnpeft._text import Table
from tnpeft.networks.errors import NetworkError
from tnpeft.networks.factor import Factor
from tnpeft.networks.formatting import Output, Terms, tokens_of

_COLOURS = {"trainable": "#0072B2", "frozen": "#7B868E", "constant": "#8A6200"}  # as in pictures
_MOST = 40  # factors of a picture
_offered: list[Callable[[Any], str]] = []


class Shown(Protocol):
    """A network, as far as it is displayed."""

    @property
    def terms(self) -> Terms: ...
    @property
    def output(self) -> Output: ...
    @property
    def factors(self) -> tuple[Factor, ...]: ...
    def label(self, factor: Factor) -> str: ...


def offer(svg: Callable[[Any], str]) -> None:
    """Take the function that draws a network as SVG, for every display from here on; the first one stays."""
    if not _offered:
        _offered.append(svg)


def svg(subject: Any) -> str | None:
    """Return the picture of a network or a factorization, None where drawing is not there or it is too large."""
    nets = [rule.network for rule in getattr(subject, "lines", ())] or [subject]
    if not _offered or sum(len(term.factors) for net in nets for term in net.terms) > _MOST:
        return None
    with suppress(NetworkError):  # the text serves
        return _offered[0](subject)
    return None


def network_html(net: Shown) -> str:
    """Return the line in colours, the table of its factors and its picture.

    >>> from tnpeft.networks import network
    >>> "B" in network_html(network("B[out r] A[r inp] -> out inp"))
    True
    """
    return f"<div>{_line(net)}{_factors([net])}{_picture(net)}</div>"


def factorization_html(f: Any) -> str:
    """Return the name, the lines in colours, the table of factors, ranks, scale and source, and the picture."""
    nets = [rule.network for rule in f.lines]
    lines = "".join(_line(rule.network, "" if rule.sites == "*" else rule.sites) for rule in f.lines)
    ranks = ", ".join(f"{rank}={size}" for rank, size in f.ranks.items()) or "none"
    splits = "; ".join(f"{side} {tuple(parts)}" for side, parts in f.splits.items())
    facts = {"ranks": ranks, "splits": splits, "scale": f"{f.scale:g}", "source": f.source}
    table = Table((), tuple((name, value) for name, value in facts.items() if value)).html()
    starts = {label: start if isinstance(start, str) else "array" for label, start in f.init.items()}
    return f"<div><b>{escape(f.name)}</b>{lines}{_factors(nets, starts)}{table}{_picture(f)}</div>"


def _line(net: Shown, sites: str = "") -> str:
    shown = []
    for text, (what, term, factor, _) in tokens_of(net.terms, net.output):
        inner = escape(text)
        if what == "factor":
            colour = _COLOURS[net.terms[term].factors[factor].kind]
            inner = f'<b style="color:{colour}">{inner}</b>'
        shown.append(inner)
    comment = f"  # {escape(sites)}" if sites else ""
    return f'<pre style="white-space:pre-wrap">{"".join(shown)}{comment}</pre>'


def _factors(nets: Iterable[Shown], starts: dict[str, str] | None = None) -> str:
    rows = {
        net.label(factor): (net.label(factor), factor.kind, " ".join(factor.indices))
        for net in nets
        for factor in net.factors
    }
    head = ("factor", "kind", "indices", *(["start"] if starts else []))
    return Table(
        head, tuple((*row, *([starts.get(name, "")] if starts else [])) for name, row in rows.items())
    ).html()


def _picture(subject: Any) -> str:
    drawn = svg(subject)
    data = b64encode(drawn.encode()).decode() if drawn else ""
    return f'<img src="data:image/svg+xml;base64,{data}" alt="the network">' if data else ""
