"""Data: what is read, what a seed draws, and one clear error naming file and line for everything that is wrong."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tnpeft.cli import app
from tnpeft.studies.digits import patches, rows
from tnpeft.studies.files import StudyError
from tnpeft.studies.study import Study
from tnpeft.studies.tasks.data import load
from tnpeft.studies.tasks.task import TASKS, task

MINE = {
    "name": "mine",
    "train": "train.jsonl",
    "eval": "eval.jsonl",
    "prompt": "{text} It was",
    "words": {"0": " bad", "1": " good"},
}


def write(folder: Path, name: str, lines: list[object]) -> None:
    text = "".join(f"{json.dumps(line) if not isinstance(line, str) else line}\n" for line in lines)
    (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "train.jsonl", [{"text": f"film {k}", "label": k % 2} for k in range(40)])
    write(tmp_path, "eval.jsonl", [{"text": f"play {k}", "label": k % 2} for k in range(10)])
    return tmp_path


def test_a_seed_draws_disjoint_reproducible_splits(folder: Path) -> None:
    data = load(task(MINE), folder)
    first, again, other = data.splits(0, 20, 8, 5), data.splits(0, 20, 8, 5), data.splits(1, 20, 8, 5)
    assert first == again != other
    assert (len(first.train), len(first.dev), len(first.eval)) == (20, 8, 5)
    assert not set(first.train) & set(first.dev)
    assert set(first.train) | set(first.dev) <= set(data.train)


def test_less_than_asked_for_is_taken_and_dev_comes_first(folder: Path) -> None:
    found = load(task(MINE), folder).splits(0, 1000, 30, 1000)
    assert (len(found.train), len(found.dev), len(found.eval)) == (10, 30, 10)
    with pytest.raises(StudyError, match="leave none beside 40 for dev"):
        load(task(MINE), folder).splits(0, 1, 40, 1)


def test_the_digest_follows_the_content(folder: Path) -> None:
    before = load(task(MINE), folder).digest
    write(folder, "eval.jsonl", [{"text": "another", "label": 1}])
    os.utime(folder / "eval.jsonl", ns=(1, 1))
    assert load(task(MINE), folder).digest != before


GOOD = b"".join(b'{"text": "film %d", "label": %d}\n' % (k, k % 2) for k in range(3))
CELLS = b"text,label\nfine,1\n"
PACKED = bytearray(gzip.compress(GOOD * 500, mtime=0))
WRONG: dict[str, tuple[str, bytes, str]] = {
    "missing column": ("a.jsonl", GOOD + b'{"label": 1}\n', r"a\.jsonl:4: no column 'text'; the columns are label"),
    "missing label": ("a.jsonl", GOOD + b'{"text": "x"}\n', r"a\.jsonl:4: no column 'label'"),
    "missing column of a table": (
        "a.csv",
        b"words,label\nx,1\n",
        r"a\.csv:2: no column 'text'; the columns are words, ",
    ),
    "two columns of one name": ("a.csv", b"text,label,text\na,1,b\n", r"a\.csv:1: two columns are called 'text'"),
    "two keys inside a value": ("a.jsonl", b'{"text": {"b": 1, "b": 2}}', r"a\.jsonl:1: two columns are called 'b'"),
    "two keys of one name": ("a.jsonl", GOOD + b'{"text": "a", "text": "b", "label": 1}', r"a\.jsonl:4: two columns"),
    "unknown label": ("a.jsonl", GOOD + b'{"text": "a", "label": 7}', r"a\.jsonl:4: unknown label '7'; .* are 0, 1"),
    "label left out": ("a.jsonl", GOOD + b'{"text": "a", "label": null}', r"a\.jsonl:4: 'label' is empty"),
    "empty label": ("a.csv", CELLS + b"a,\n", r"a\.csv:3: 'label' is empty"),
    "blank text": ("a.jsonl", GOOD + b'{"text": "  ", "label": 0}', r"a\.jsonl:4: 'text' holds no text"),
    "a number for text": ("a.jsonl", GOOD + b'{"text": 5, "label": 0}', r"a\.jsonl:4: 'text' holds no text"),
    "no JSON": ("a.jsonl", GOOD + b"{'text'", r"a\.jsonl:4: invalid JSON: Expecting property name"),
    "half a line": ("a.jsonl", GOOD + b'{"text": "a", "la', r"a\.jsonl:4: invalid JSON: Unterminated string"),
    "endless nesting": ("a.jsonl", GOOD + b"[" * 100_000, r"a\.jsonl:4: invalid JSON: maximum recursion depth"),
    "no object": ("a.jsonl", b"[1, 2]\n", r"a\.jsonl:1: expected a JSON object"),
    "one object over lines": (
        "a.jsonl",
        b'{\n"text": "a"}\n',
        r"a\.jsonl:1: invalid JSON: .* one whole object",
    ),
    "empty file": ("a.jsonl", b"", r"a\.jsonl: the file holds no example"),
    "empty packed file": ("a.jsonl.gz", b"", r"a\.jsonl\.gz: the file holds no example"),
    "blank lines alone": ("a.jsonl", b"\n \n", r"a\.jsonl: the file holds no example"),
    "a header alone": ("a.csv", b"text,label\n", r"a\.csv: the file holds no example"),
    "Latin-1": ("a.jsonl", GOOD + b'{"text": "caf\xe9", "label": 0}\n', r"a\.jsonl:4: is not in UTF-8"),
    "Latin-1 in a table": ("a.csv", CELLS + b"caf\xe9,1\n", r"a\.csv:3: is not in UTF-8"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), r"a\.jsonl:1: holds a NUL byte; save the file as UTF-8"),
    "NUL": ("a.csv", CELLS + b"a\0b,1\n", r"a\.csv:3: holds a NUL byte"),
    "lines that end in CR": ("a.csv", b"text,label\ra,1\r", r"a\.csv:1: invalid CSV: new-line character"),
    "an open quote": ("a.csv", CELLS + b'"a,1\nb,0\n', r"a\.csv:4: invalid CSV: unexpected end of data"),
    "too many cells": ("a.csv", CELLS + b"one, two,1\n", r"a\.csv:3: has 3 cells, the header 2; quote cells"),
    "too few tabs": ("a.tsv", b"text\tlabel\na\n", r"a\.tsv:2: has 1 cells, the header 2; each line needs"),
    "cut off": ("a.jsonl.gz", bytes(PACKED[: len(PACKED) // 2]), r"a\.jsonl\.gz.*cannot be read.*cut off or damaged"),
    "damaged": ("a.jsonl.gz", bytes(PACKED[:-8]) + b"\0" * 8, r"a\.jsonl\.gz:1501: cannot be read \(CRC check"),
    "damaged inside": ("a.jsonl.gz", bytes(PACKED[:12]) + b"\xff" * 40, r"a\.jsonl\.gz.*cannot be read"),
    "not packed": ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz: cannot be read \(Not a gzipped file"),
    "another kind": ("a.txt", GOOD, r"a\.txt: is none of \.jsonl, \.csv, \.tsv \(\.gz\)"),
}


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_told_with_file_and_line(folder: Path, kind: str, part: str) -> None:
    name, content, message = WRONG[kind]
    (folder / name).write_bytes(content)
    with pytest.raises(StudyError, match=message) as error:
        load(task({**MINE, part: name}), folder)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_names_the_remedy(folder: Path) -> None:
    with pytest.raises(StudyError, match=r"absent\.csv: cannot be read \(No such file.*--data names the folder"):
        load(task({**MINE, "train": "absent.csv"}), folder)
    (folder / "folder.csv").mkdir()
    with pytest.raises(StudyError, match=r"folder\.csv: cannot be read \(Is a directory\)"):
        load(task({**MINE, "train": "folder.csv"}), folder)


def test_harmless_differences_change_nothing(folder: Path) -> None:
    """A packed file, cells, a byte order mark, lines that end as on Windows, blank lines, tabs for commas."""
    rows = [(f"film {k}", k % 2) for k in range(40)]
    table = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    lines = (folder / "train.jsonl").read_text()
    files = {
        "packed.jsonl.gz": gzip.compress(lines.encode()),
        "quoted.csv": ("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows)).encode(),
        "mark.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "windows.jsonl": lines.replace("\n", "\r\n").encode(),
        "blank.jsonl": lines.replace("\n", "\n\n").encode(),
        "mark.csv": b"\xef\xbb\xbf" + table.encode(),
        "windows.csv": table.replace("\n", "\r\n").encode(),
        "tabs.tsv": table.replace(",", "\t").encode(),
        "tabs.tsv.gz": gzip.compress(table.replace(",", "\t").encode()),
    }
    plain = load(task(MINE), folder)
    assert (plain.train[3].prompt, plain.train[3].label) == ("film 3 It was", 1)
    for name, content in files.items():
        (folder / name).write_bytes(content)
        assert load(task({**MINE, "train": name}), folder).digest == plain.digest, name


def test_quotes_in_tabs_are_text_and_booleans_are_labels(folder: Path) -> None:
    (folder / "a.tsv").write_text('text\tlabel\nhe said "so\t1\n')
    write(folder, "b.jsonl", [{"text": "a", "label": True}, {"text": "b", "label": False}])
    found = load(task({**MINE, "train": "a.tsv", "eval": "b.jsonl"}), folder)
    assert found.train[0].prompt == 'he said "so It was'
    assert [example.label for example in found.eval] == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"words": {"0": "x"}}, "at least two labels"),
        ({"prompt": "no field"}, "names no field"),
        ({"metric": "bleu"}, "unknown metric 'bleu'"),
        ({"also": ["bleu"]}, "unknown metric 'bleu'"),
        ({"also": "f1"}, "also = 'f1' is not a list of strings"),
        ({"words": {"0": "a", "1": "b", "2": "c"}, "metric": "f1"}, "f1 is for two labels"),
        ({"words": ["a", "b"]}, r"words = \['a', 'b'\] is not a table"),
        ({"prompt": 5}, "prompt = 5 is not a string"),
        ({"prompt": "{text"}, "invalid format string in the prompt"),
        ({"prompt": "{} It was"}, "names no field"),
    ],
)
def test_wrong_tasks_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        task({**MINE, **change})
    with pytest.raises(StudyError, match="no task is called 'sst3'"):
        task("sst3")


def test_patches_are_the_pixels() -> None:
    images = np.arange(64).reshape(1, 8, 8) % 17
    levels = np.minimum(images * 3 // 17, 2)
    for row in range(4):
        for column in range(4):
            cell = levels[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel()
            assert patches(images)[0, 4 * row + column] == sum(int(v) * 3**k for k, v in enumerate(cell))


def test_shifted_digits_are_inverted_transposed_ones_and_eval_is_apart() -> None:
    upright, inverted = rows("upright", "eval"), rows("inverted", "eval")
    assert [r["label"] for r in upright] == [r["label"] for r in rows("shifted", "eval")]
    mirror = rows("transposed", "eval")[0]["image"].split()
    tokens = np.array([int(t[1:]) for t in upright[0]["image"].split()]).reshape(4, 4)
    digits = (tokens[..., None] // 3 ** np.arange(4)) % 3
    flipped = digits.reshape(4, 4, 2, 2).transpose(1, 0, 3, 2).reshape(4, 4, 4)
    assert [f"p{n}" for n in (flipped * 3 ** np.arange(4)).sum(-1).ravel()] == mirror
    assert inverted[0]["image"] != upright[0]["image"]
    train = {r["image"] for r in rows("transposed", "train")}
    assert sum(r["image"] in train for r in rows("transposed", "eval")) < 8


def test_a_study_finds_the_files_that_it_names_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of TOML for one's own data, read from any working directory."""
    line = 'tasks = [{ name = "mine", train = "train.jsonl", eval = "eval.jsonl", prompt = "{text} It was", '
    line += 'words = { 0 = " bad", 1 = " good" } }]'
    rest = 'backbone = "digits"\nseeds = [0]\n[[methods]]\nfamily = "lora"\n'
    (folder / "study.toml").write_text(f"{line}\n{rest}")
    monkeypatch.chdir("/")
    study = Study.read(folder / "study.toml")
    assert len(study.search()) == 3
    assert study.search()[0].data == load(task(MINE), folder).digest


@pytest.mark.parametrize(
    "command", ["train lora --model {tiny} --task {own} --out {out}", "sweep {study} --out {out}"]
)
def test_a_command_ends_before_it_begins(folder: Path, tiny: Path, command: str) -> None:
    """Wrong data are told in one line with file and line number, exit code 2, and nothing is written."""
    own = 'name = "mine"\ntrain = "train.jsonl"\neval = "bad.csv"\nprompt = "{text}"\nwords = { 0 = "a", 1 = "b" }\n'
    (folder / "own.toml").write_text(own)
    rest = f'backbone = "{tiny}"\nseeds = [0]\n[[methods]]\nfamily = "lora"\n'
    (folder / "study.toml").write_text(f"{rest}[[tasks]]\n{own}")
    (folder / "bad.csv").write_text("text,label\nfine,1\nfair,maybe\n")
    places = {"tiny": tiny, "own": folder / "own.toml", "study": folder / "study.toml", "out": folder / "out"}
    done = CliRunner().invoke(app, command.format(**places).split())
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
    assert "bad.csv:3: unknown label 'maybe'; the task's labels are 0, 1" in done.output
    assert not (folder / "out").exists()


DATA = os.environ.get("TNPEFT_DATA") or str(Path(__file__).resolve().parents[3] / "shared" / "data")


@pytest.mark.data
@pytest.mark.skipif(not Path(DATA, "sst2").is_dir(), reason="no data folder")
@pytest.mark.parametrize(
    ("name", "sizes", "ending"),
    [("sst2", (67349, 872), " It was"), ("rte", (2490, 277), "Yes or No?\n"), ("boolq", (9427, 3270), "?")],
)
def test_the_real_tasks(name: str, sizes: tuple[int, int], ending: str) -> None:
    data = load(TASKS[name], DATA)
    assert (len(data.train), len(data.eval)) == sizes
    assert all(e.prompt.endswith(ending) for e in data.eval)
