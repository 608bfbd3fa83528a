"""Tasks and models by their names on the hub: the real libraries against a hub of local folders, then without one."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import served

from tnpeft.studies.tasks.task import TASKS

PAIR = ("sentence1", "sentence2")
# repository, configuration, columns of text, label's column, its values: as the hub has them
LAYOUT: dict[str, tuple[str, str, tuple[str, ...], str, tuple[Any, Any]]] = {
    "sst2": ("nyu-mll/glue", "sst2", ("sentence",), "label", (0, 1)),
    "cola": ("nyu-mll/glue", "cola", ("sentence",), "label", (0, 1)),
    "rte": ("nyu-mll/glue", "rte", PAIR, "label", (0, 1)),
    "mrpc": ("nyu-mll/glue", "mrpc", PAIR, "label", (0, 1)),
    "boolq": ("aps/super_glue", "boolq", ("question", "passage"), "label", (0, 1)),
    "boolq_google": ("google/boolq", "", ("question", "passage"), "answer", (False, True)),
}
SIZES = {"train": 48, "validation": 24, "test": 4}


def put(folder: Path, configuration: str, columns: tuple[str, ...], label: str, values: tuple[Any, Any]) -> None:
    place = folder / (configuration or "data")
    place.mkdir(parents=True)
    for split, size in SIZES.items():
        if split == "test" and not configuration:
            continue  # google/boolq has none
        rows = [
            {**{name: f"{split} {name} {k} " for name in columns}, "idx": k, label: values[k % 2]}
            for k in range(size)
        ]
        if split == "test":
            rows = [{**row, label: -1} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / f"{split}-00000-of-00001.parquet")


def card(folder: Path, configurations: list[str]) -> None:
    lines = ["---", "configs:"]
    for name in configurations:
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in SIZES:
            lines += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a hub with the tasks' data sets and a tiny OPT."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    from tnpeft.studies.backbones import byte_tokenizer

    folder = tmp_path_factory.mktemp("hub")
    names: dict[str, list[str]] = {}
    for repository, configuration, *rest in LAYOUT.values():
        put(folder / repository, configuration, *rest)
        names.setdefault(repository, []).extend([configuration] if configuration else [])
    for repository, configurations in names.items():
        if configurations:
            card(folder / repository, configurations)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=259, num_attention_heads=2, max_position_embeddings=128, pad_token_id=1, **sizes)
    OPTForCausalLM(config).save_pretrained(folder / "someone" / "tiny-opt")
    byte_tokenizer().save_pretrained(folder / "someone" / "tiny-opt")
    repositories = {f"datasets/{name}": folder / name for name in names}
    with served({**repositories, "someone/tiny-opt": folder / "someone" / "tiny-opt"}) as address:
        yield address


APART = """
import json, os, sys
import datasets, peft, torch, transformers, tnpeft.studies.running.execution
from tnpeft.__main__ import main

folder, commands = sys.argv[1:]
for number, command in enumerate(json.loads(commands)):
    if not (child := os.fork()):
        for place, kind in enumerate(("out", "err"), 1):
            os.dup2(os.open(f"{folder}/{number}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), place)
        if command[0] == "-c":
            exec(command[1])
        else:
            sys.argv = ["tnpeft", *command]
            main()
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def go(home: Path, address: str, *commands: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Commands with the caches below ``home``, each a process of its own, but all after one import of the libraries;
    offline without an address."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0" if address else "1"}
    environment |= {"HF_ENDPOINT": address} if address else {}
    environment.pop("HF_DATASETS_CACHE", None)
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", APART, str(home), json.dumps(commands)],
        capture_output=True, text=True, env=environment, timeout=300, check=True,
    )  # fmt: skip
    said = [[(home / f"{k}.{kind}").read_text() for kind in ("out", "err")] for k in range(len(commands))]
    codes = map(int, done.stdout.split())
    return [subprocess.CompletedProcess([], *each) for each in zip(codes, *zip(*said, strict=True), strict=True)]


LOAD = """
import json
from tnpeft.studies.tasks.data import load
from tnpeft.studies.tasks.task import TASKS
found = {name: load(TASKS[name], "hub") for name in %r}
facts = {n: [len(d.train), len(d.eval), d.train[3].prompt, d.train[3].label, d.digest] for n, d in found.items()}
print(json.dumps(facts))
"""


def test_every_task_and_a_model_are_had_from_the_hub_and_again_from_its_cache(hub: str, tmp_path: Path) -> None:
    train = ["train", "lora", "--model", "someone/tiny-opt", "--task", "mrpc", "--data", "hub", "--steps", "2"]
    train += ["--settings", "dev=8; eval=0; max_length=120", "--json", "--out"]
    other = ["train", "lora", "--model", "someone/else", "--task", "digits_upright", "--out", str(tmp_path / "other")]
    facts, results = [], []
    for address in (hub, ""):
        commands = [["-c", LOAD % list(LAYOUT)], [*train, str(tmp_path / f"out{len(results)}")], other]
        loaded, trained, missing = go(tmp_path / "home", address, *commands)
        assert (loaded.returncode, trained.returncode) == (0, 0), loaded.stderr + trained.stderr
        facts.append(json.loads(loaded.stdout))
        results.append(json.loads(trained.stdout))
        assert (missing.returncode, missing.stderr.count("\n")) == (2, 1), missing.stderr
        assert "cannot load the model 'someone/else'" in missing.stderr
    for name, (_, _, columns, _, _) in LAYOUT.items():
        texts = {column: f"train {column} 3" for column in columns}
        expected = [SIZES["train"], SIZES["validation"], TASKS[name].prompt.format(**texts), 1]
        assert facts[0][name][:4] == expected
    assert facts[1] == facts[0]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]
    assert set(results[0]["scores"]) == {"accuracy", "f1", "matthews"}
    assert results[0]["examples"] == [SIZES["train"] - 8, 8, SIZES["validation"]]


STUDY = """
backbone = "someone/tiny-opt"
seeds = [0]
tasks = ["sst2"]
[protocol]
steps = 1
dev = 8
[[methods]]
family = "lora"
"""


OFFLINE = [
    ("train lora --model someone/tiny-opt --task sst2 --data hub --out {out}", "glue"),
    ("train lora --model someone/tiny-opt --task {own} --out {out}", "someone/tiny-opt"),
    ("sweep {study} --data hub --out {out}", "glue"),
    ("sweep {study} --data {folder} --out {out}", "someone/tiny-opt"),
]


def test_offline_one_line_says_what_and_how(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "sst2").mkdir()
    for name in ("train", "dev"):
        rows = [{"sentence": f"film {k}", "label": k % 2} for k in range(600)]
        with gzip.open(tmp_path / "sst2" / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "own.toml").write_text('name = "sst2"')
    names = {"out": tmp_path / "out", "own": tmp_path / "own.toml", "study": tmp_path / "study.toml"}
    commands = [command.format(folder=tmp_path, **names).split() for command, _ in OFFLINE]
    for done, (_, message) in zip(go(tmp_path / "home", "", *commands), OFFLINE, strict=True):
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        assert message in lines[0]
        assert "folder" in lines[0]  # the remedy
    assert not list(tmp_path.glob("out/*.json"))
