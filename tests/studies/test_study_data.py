"""Data: what is read, what a seed draws, and one clear error naming file and line for everything that is wrong."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tnpeft.studies.data import load
from tnpeft.studies.digits import patches, rows
from tnpeft.studies.files import StudyError
from tnpeft.studies.tasks import TASKS, task

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


def test_reads_jsonl_gz_and_csv_alike(folder: Path) -> None:
    plain = load(task(MINE), folder)
    with gzip.open(folder / "train.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write((folder / "train.jsonl").read_text())
    cells = ["text,label", *(f'"film {k}",{k % 2}' for k in range(40))]
    write(folder, "train.csv", list(cells))
    for name in ("train.jsonl.gz", "train.csv"):
        assert load(task({**MINE, "train": name}), folder).digest == plain.digest
    assert plain.train[3].prompt == "film 3 It was"
    assert plain.train[3].label == 1


def test_a_seed_draws_disjoint_reproducible_splits(folder: Path) -> None:
    data = load(task(MINE), folder)
    first, again, other = data.splits(0, 20, 8, 5), data.splits(0, 20, 8, 5), data.splits(1, 20, 8, 5)
    assert first == again != other
    assert len(first.train) == 20
    assert len(first.dev) == 8
    assert len(first.eval) == 5
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


WRONG = {
    "missing column": ([{"text": "a", "label": 0}, {"label": 1}], r"train\.jsonl:2: no column 'text'"),
    "unknown label": ([{"text": "a", "label": 7}], r"train\.jsonl:1: unknown label '7'; the task's labels are 0, 1"),
    "blank text": ([{"text": "a", "label": 0}, {"text": "  ", "label": 0}], r"train\.jsonl:2: 'text' holds no text"),
    "no JSON": ([{"text": "a", "label": 0}, "{'text'"], r"train\.jsonl:2: is no JSON"),
    "no object": (["[1, 2]"], r"train\.jsonl:1: is no JSON object"),
    "empty file": ([], r"train\.jsonl: the file holds no example"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_lines_are_named(folder: Path, kind: str) -> None:
    lines, message = WRONG[kind]
    write(folder, "train.jsonl", lines)
    with pytest.raises(StudyError, match=message):
        load(task(MINE), folder)


def test_wrong_encoding_missing_and_truncated_files_are_named(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(b'{"text": "a", "label": 0}\n{"text": "caf\xe9", "label": 0}\n')
    with pytest.raises(StudyError, match=r"train\.jsonl:2: is not in UTF-8"):
        load(task(MINE), folder)
    with pytest.raises(StudyError, match=r"absent\.csv: cannot be read \(No such file"):
        load(task({**MINE, "train": "absent.csv"}), folder)
    with pytest.raises(StudyError, match=r"train\.txt: is none of"):
        load(task({**MINE, "train": "train.txt"}), folder)
    whole = gzip.compress(b'{"text": "a", "label": 0}\n' * 500)
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StudyError, match=r"cut\.jsonl\.gz.*cannot be read"):
        load(task({**MINE, "train": "cut.jsonl.gz"}), folder)


def test_a_csv_row_of_another_length_is_named(folder: Path) -> None:
    write(folder, "train.csv", ["text,label", "fine,1", "one, two,1"])
    with pytest.raises(StudyError, match=r"train\.csv:3: has 3 cells, the header 2"):
        load(task({**MINE, "train": "train.csv"}), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"words": {"0": "x"}}, "at least two labels"),
        ({"prompt": "no field"}, "names no field"),
        ({"metric": "bleu"}, "unknown metric 'bleu'"),
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
