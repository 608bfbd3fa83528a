"""The notation: what a line means, that it prints back, and that a bad one is answered with its place."""

from __future__ import annotations

import time

import pytest
from hypothesis import given

from tnpeft import NetworkError, network
from tnpeft.networks import Network
from tnpeft.testing import networks

LINES = [
    "B[layer proj out r] A[layer proj r inp] -> layer proj out inp",
    "w[layer proj r] A[layer proj o1 r] B[layer proj o2 r] C[layer proj i1 r] -> layer proj (o1 o2) i1",
    "b[layer out] ~B[out r] d[layer r] ~A[r inp] -> layer out inp",
    "^W0[layer out inp] v[layer inp] - ^W0[layer out inp] -> layer out inp",
    "- U[out a] U[inp a] + s[] ^C[out inp] -> out inp",
    "A[out inp] -> (out) inp",
    "A[layer proj out inp] -> (layer proj) out inp",
    "s[] -> () ()",
    "größe[zeile spalte] -> zeile spalte",
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_prints_back_and_parses_to_the_same_network(line: str) -> None:
    net = network(line)
    assert network(str(net)) == net
    assert str(network(str(net))) == str(net)


@given(networks(tied=True, twins=True))
def test_round_trip_of_drawn_networks(net: Network) -> None:
    assert network(str(net)) == net
    assert network(str(net).replace(" ", "  ").replace("[", " [ ").replace("->", "\n->\t")) == net
    assert eval(repr(net), {"network": network}) == net


def test_blanks_are_needed_only_between_names() -> None:
    assert network("B[out r]A[r inp]->out inp") == network(" B [ out r ] A[r inp]  ->  out inp ")


def test_the_parts_of_a_line() -> None:
    net = network("~B[out r] A[r inp] - ^C[out inp] -> out inp")
    assert [term.sign for term in net.terms] == [1, -1]
    assert [(f.name, f.indices, f.kind) for f in net.factors] == [
        ("B", ("out", "r"), "frozen"),
        ("A", ("r", "inp"), "trainable"),
        ("C", ("out", "inp"), "constant"),
    ]


# ---- errors: the problem, the caret's place, the remedy

# fmt: off
BAD = [  # the line, a caret under the place, the problem, and what else the message says
    ("",
     "^",
     "expected a factor", "the end of the line"),
    ("A[out inp]",
     "          ^",
     "expected '->'", "the end of the line"),
    ("A[out, inp] -> out inp",
     "     ^",
     "found ','", "separated by blanks"),
    ("A out inp -> out inp",
     "  ^",
     "expected '['", "in brackets, such as A[out r]"),
    ("A[out inp -> out inp",
     "          ^",
     "expected an index, or ] to end factor 'A'", "found '->'"),
    ("A[out (i1 i2)] -> out (i1 i2)",
     "      ^",
     "expected an index, or ]", "found '('"),
    ("A[out i1 i2] -> out (i1 (i2))",
     "                        ^",
     "groups do not nest", "found '('"),
    ("A[out inp] -> out (inp",
     "                      ^",
     "or ) to end the group", "the end of the line"),
    ("A[out inp] -> out inp)",
     "                     ^",
     "an output index or a group", "found ')'"),
    ("A[out inp] -> -> out inp",
     "              ^",
     "an output index or a group", "found '->'"),
    ("A[out inp] * B[r] -> out inp",
     "           ^",
     "expected a factor", "found '*'"),
    ("A[out inp] + -> out inp",
     "             ^",
     "expected a factor", "found '->'"),
    ("A[out inp] ++ B[out inp] -> out inp",
     "            ^",
     "expected a factor", "found '+'"),
    ("~^A[out inp] -> out inp",
     " ^",
     "expected a factor", "found '^'"),
    ("2A[out inp] -> out inp",
     "^",
     "expected a factor", "found '2A'"),
    ("A[out 2r] -> out 2r",
     "      ^",
     "expected an index", "found '2r'"),
    ("A[out inp r] -> out inp",
     "          ^",
     "index 'r' stands in one factor only and not in the output", "or drop it"),
    ("A[out out inp] -> out inp",
     "      ^",
     "index 'out' is repeated in factor 'A'", "another name"),
    ("A[out] -> out inp",
     "              ^",
     "no factor carries the output index 'inp'", "add it to a factor"),
    ("A[out inp] -> out inp out",
     "                      ^",
     "index 'out' stands twice in the output", 'leave one out, or join two names with a constant: ^I[out out2]'),
    ("B[out r] relu(A[r inp]) -> out inp",
     "             ^",
     "expected '['", "an adapter is multilinear"),
    ("0.5 A[out inp] -> out inp",
     "^",
     "expected a factor", "put a factor into scale="),
    ("B[out r] * A[r inp] -> out inp",
     "         ^",
     "found '*'", "leave * out"),
    ("B[out 1] A[1 inp] -> out inp",
     "      ^",
     "found '1'", "leave an index of size 1 out"),
    ("A[out inp] + B[out] -> out inp",
     "                           ^",
     "index 'inp' of the matrix is missing in term 2", "every term"),
    ("A[out r] A[r inp s] B[s] -> out inp",
     "         ^",
     "stands here with 3 indices and before with 2", "one factor"),
    ("A[out r] ~A[inp r] -> out inp",
     "         ^",
     "factor 'A' is frozen here and trainable before", "another name"),
    ("A[out r] + ^A[out r] -> out r",
     "           ^",
     "factor 'A' is constant here and trainable before", "another name"),
    ("A[out tokens] -> out tokens",
     "      ^",
     "'tokens' is a reserved word", "another name"),
    ("A[out frozen] B[frozen inp] -> out inp",
     "      ^",
     "'frozen' is a reserved word", "another name"),
    ("A[model inp] -> model inp",
     "  ^",
     "'model' is a reserved word", "another name"),
    ("A[targets inp] -> targets inp",
     "  ^",
     "'targets' is a reserved word", "another name"),
]
# fmt: on


@pytest.mark.parametrize(("line", "caret", "problem", "text"), BAD)
def test_a_bad_line_is_answered_with_its_place(line: str, caret: str, problem: str, text: str) -> None:
    with pytest.raises(NetworkError) as caught:
        network(line)
    error = caught.value
    assert problem in error.problem
    assert text in str(error)
    assert error.line == line
    assert error.position == len(caret) - 1
    if line:
        rows = str(error).splitlines()
        assert rows[rows.index("  " + line) + 1] == "  " + caret


def test_a_control_character_is_shown_as_a_blank() -> None:
    with pytest.raises(NetworkError) as caught:
        network("A[out inp]\x00 -> out inp")
    assert "  A[out inp]  -> out inp\n            ^" in str(caught.value)


# ---- size and depth: an error, never a hang or a recursion error


@pytest.mark.parametrize(
    "garbage",
    [
        "(" * 1_000_000,
        "[" * 1_000_000,
        "A[" * 500_000,
        "\x00\ud800" * 500_000,
        "-" * 1_000_000,
        "A[a b] " * 150_000 + "-> a b",
        "A[" + "a" * 1_000_000 + "] -> a",
        "a " * 500_000,
    ],
    ids=["parentheses", "brackets", "openings", "no text", "signs", "factors", "one name", "names"],
)
def test_a_megabyte_of_garbage_is_refused_in_under_a_second(garbage: str) -> None:
    started = time.process_time()
    with pytest.raises(NetworkError) as caught:
        network(garbage)
    assert time.process_time() - started < 1
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("part", ["(", "[", "A[", "A[a b] ", "+", "A[x x] ", "A[a b] + ", "~"])
def test_the_longest_line_that_is_read_is_answered_in_under_a_second(part: str) -> None:
    line = part * (19_000 // len(part))
    started = time.process_time()
    with pytest.raises(NetworkError):
        network(line)
    assert time.process_time() - started < 1


def test_many_terms_and_many_indices_are_no_problem() -> None:
    terms = 400
    net = network(" + ".join(f"A{k}[out r{k}] B{k}[r{k} inp]" for k in range(terms)) + " -> out inp")
    assert len(net.terms) == terms
    assert len(net.bonds) == terms
    assert network(str(net)) == net


def test_an_error_quotes_a_window_of_a_long_line() -> None:
    line = " ".join(f"A{k}[out inp]" for k in range(200)) + " ? -> out inp"
    with pytest.raises(NetworkError) as caught:
        network(line)
    rows = str(caught.value).splitlines()
    caret = next(k for k, row in enumerate(rows) if row.strip() == "^")
    assert rows[caret - 1][len(rows[caret]) - 1] == "?"
    assert len(rows[caret - 1]) < 100


@pytest.mark.parametrize("wrong", [None, 3, b"A[out inp] -> out inp", ["A"]])
def test_only_text_is_parsed(wrong: object) -> None:
    with pytest.raises(NetworkError, match="written as text"):
        network(wrong)  # type: ignore[arg-type]
