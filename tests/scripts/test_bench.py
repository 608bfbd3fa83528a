"""The benchmarks run, at sizes too small to say anything, and write what they say."""

from __future__ import annotations

import gzip
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import _bench
import bench_attach
import bench_decode
import bench_growth
import bench_packs
import bench_rebuilt
import bench_replicas
import bench_saved
import bench_sst2
import bench_step
import pytest
import run_benchmarks
import speed_goals
import torch
from transformers import OPTConfig, OPTForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def call(module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(folder), "--samples", "1", *arguments])
    module.main()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("bare", [True, False])
def test_a_step(bare: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ["PEFT LoRA r=8", "lora rank=8", "rebuilt tensor: qkv_depth", "rebuilt site: qkv_depth"]
    size = ["--shape", "tiny", "--layers", "2", "--batch", "2", "--length", "16", *(["--bare"] if bare else [])]
    call(bench_step, tmp_path, monkeypatch, *size, "--only", *cases)
    data = json.loads((tmp_path / "step.json").read_text())
    found = data["cases"]
    assert {*found} == {"floor", *cases}
    assert found["lora rank=8"]["parameters"] == found["PEFT LoRA r=8"]["parameters"] == 2 * 3 * 8 * 512
    assert found["lora rank=8"]["saved"] <= found["PEFT LoRA r=8"]["saved"]
    assert found["lora rank=8"]["kernels"] < found["PEFT LoRA r=8"]["kernels"]
    matrix = 256 * 256 * 4
    beyond = {name: row["saved"] - found["floor"]["saved"] for name, row in found.items()}
    assert beyond["rebuilt site: qkv_depth"] >= 6 * matrix
    assert beyond["rebuilt tensor: qkv_depth"] >= 6 * 6 * matrix
    assert (tmp_path / "step.svg").stat().st_size > 0
    assert "lora rank=8" in (tmp_path / "step.md").read_text()


def test_unknown_cases_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no case 'lara'"):
        call(bench_step, tmp_path, monkeypatch, "--shape", "tiny", "--layers", "1", "--only", "lara")


def test_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(bench_decode, tmp_path, monkeypatch, "--shape", "tiny", "--layers", "1", "--tokens", "4", "--prompt", "3")
    data = json.loads((tmp_path / "decode.json").read_text())
    assert {"floor", "PEFT LoRA r=8", "lora rank=8", "lora rank=8, merged"} <= {*data["cases"]}


def test_attaching_counts_what_it_attaches() -> None:
    row = bench_attach.attached(1, "cp rank=21", ("q_proj", "v_proj"), 1, "cpu")
    assert (row["sites"], row["parameters"]) == (2, 2 * 21 * (1 + 32 + 64 + 32 + 64))


def test_the_meters_count_every_product_in_place_or_not() -> None:
    a, b, total = torch.ones(2, 3), torch.ones(3, 4), torch.zeros(2, 4)
    for product in (lambda: a @ b, lambda: torch.addmm(total, a, b), lambda: total.addmm_(a, b)):
        with _bench.flop_counter() as counter:
            product()
        assert counter.get_total_flops() == 2 * 2 * 3 * 4


def test_the_peak_is_what_lives_at_once() -> None:
    def forward() -> torch.Tensor:
        x = torch.zeros(1000, requires_grad=True)
        for _ in range(5):
            x = x.detach() + 1
        return x.requires_grad_().sum()

    found = _bench.meters(torch.nn.Identity(), forward)
    assert 8000 <= found.peak < 13000


def test_runs_are_interleaved() -> None:
    order: list[str] = []
    times = _bench.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, "wall")
    assert order == ["a", "b"] * 3
    assert [len(found) for found in times.values()] == [2, 2]
    slow = _bench.interleaved({"fast": lambda: None, "slow": lambda: time.sleep(0.01)}, 3, "wall")
    assert _bench.ratio(slow["slow"], slow["fast"]) > 1


def test_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ["--shapes", "tiny:1", "--batches", "1x4", "2x4", "--replicas", "2", "3"]
    call(bench_replicas, tmp_path, monkeypatch, *size, "--families", "none", "lora r=8")
    data = json.loads((tmp_path / "replicas.json").read_text())
    assert [(row["family"], row["rows"]) for row in data["cases"]] == [
        ("none", 1), ("none", 2), ("lora r=8", 1), ("lora r=8", 2)
    ]  # fmt: skip
    assert all(set(row["gain"]) == {"2", "3"} and min(row["gain"].values()) > 0 for row in data["cases"])
    assert "K=3" in (tmp_path / "replicas.md").read_text()
    assert (tmp_path / "replicas.svg").stat().st_size > 0


@pytest.mark.parametrize("cores", [0, 2])
def test_sst2(cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tnpeft.studies.digits import save_tokenizer

    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "sst2").mkdir()
    rows = [{"sentence": " ".join(["p1"] * (1 + 7 * k % 20)), "label": k % 2} for k in range(40)]
    for part in ("train", "dev"):
        with gzip.open(tmp_path / "sst2" / f"{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    size = ["--shapes", "tiny:1", "--batches", "4", "--replicas", "2", "3", "--train", "12", "--steps", "2"]
    where = ["--data", str(tmp_path), "--tokenizer", str(tmp_path / "tokenizer"), "--cores", str(cores)]
    where += ["--words", " p2", " p3"]
    call(bench_sst2, tmp_path, monkeypatch, *size, *where, "--orders", "shuffled")
    (row,) = json.loads((tmp_path / "sst2.json").read_text())["cases"]
    assert row["milliseconds"] > 0
    if cores:
        assert {*row["ways"]} == {
            "alone, a thread each", "packs, a thread each", "alone, all threads", "one pack, all threads"
        }  # fmt: skip
        assert row["ways"]["alone, a thread each"] == 1.0
    else:
        assert {*row["gain"]} == {"2", "3"}
        assert row["tokens"] <= row["padded"]


def test_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tnpeft.studies.digits import save_tokenizer

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    config = OPTConfig(vocab_size=95, num_attention_heads=2, max_position_embeddings=32, dropout=0.0, **sizes, **ids)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    save_tokenizer(tmp_path / "opt")
    monkeypatch.setattr(bench_packs, "METHODS", bench_packs.METHODS[:1])
    monkeypatch.setattr(bench_packs, "SEEDS", (0, 1))
    monkeypatch.setattr(bench_packs, "PACKS", (4,))
    options = ["--backbone", str(tmp_path / "opt"), "--steps", "2", "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--cache", str(tmp_path / "cache")])
    bench_packs.main()
    torch.set_num_threads(threads)
    row = json.loads((tmp_path / "packs.json").read_text())["methods"][0]
    assert row["runs"] == 4
    assert row["packs"]["4"]["loss"] <= 1e-4
    assert "lora" in (tmp_path / "packs.md").read_text()


def test_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(bench_rebuilt, tmp_path, monkeypatch, "--shape", "tiny", "--layers", "2", "--tokens", "16")
    rows = json.loads((tmp_path / "rebuilt.json").read_text())["constructions"]
    assert {*rows} == {*bench_rebuilt.CONSTRUCTIONS}
    matrix, sites = 4 * 256 * 256, 6
    whole = dict.fromkeys(rows, 1) | {"qkv": 3, "att_qkv": 3, "depth": 2, "att_depth": 2}
    whole |= {"qkv_depth": 6, "att_qkv_depth": 6}
    for name, row in rows.items():
        assert row["rebuilt"]["saved"] >= sites * whole[name] * matrix
        assert row["factors"]["saved"] < matrix
        assert row["rebuilt"]["flops"] > 5 * row["factors"]["flops"]


def test_growth_is_linear_where_it_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sites, tokens and width; nothing grows with rows times columns."""
    sizes = ["--sites", "6", "12", "24", "--tokens", "128", "256", "512", "--widths", "128", "256", "512"]
    monkeypatch.setattr(bench_growth, "SMALL", {"sites": 6, "tokens": 128, "width": 128})
    call(bench_growth, tmp_path, monkeypatch, *sizes)
    growth = json.loads((tmp_path / "growth.json").read_text())["growth"]
    for what, points in growth.items():
        for family in bench_growth.FAMILIES:
            rows = [row for row in points if row["family"] == family]
            for cost in bench_growth.COUNTED:
                steps = [b[cost] - a[cost] for a, b in pairwise(rows)]
                if what == "sites":
                    assert steps[1] == 2 * steps[0]
                    assert rows[0][cost] == steps[0]
                else:
                    assert bench_growth.power(rows, what, cost) <= 1 + 1e-12
    assert (tmp_path / "growth.svg").stat().st_size > 0


def test_the_power_of_a_growth() -> None:
    rows = [{"width": 2, "flops": 3}, {"width": 8, "flops": 48}]
    assert bench_growth.power(rows, "width", "flops") == pytest.approx(2)


def test_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_saved, "SIZES", ((128, 8),))
    monkeypatch.setattr(bench_saved, "FAMILIES", [("lora", {"rank": 8}), ("lokr", {"rank": 8})])
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path)])
    bench_saved.main()
    rows = {row["case"]: row for row in json.loads((tmp_path / "saved.json").read_text())["cases"]}
    assert rows["lora rank=8"]["saved"] == rows["PEFT LoRA r=8"]["saved"] == 4 * 8 * (128 + 8)
    assert (rows["lora rank=8"]["width"], rows["lora rank=8"]["factors"]) == (8, 4 * 2 * 8 * 128)
    assert rows["PEFT LoKr r=8"]["saved"] - rows["lokr rank=8"]["saved"] >= 4 * 128 * 128


def test_benchmarks_that_have_run_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(command: list[str], **_: Any) -> None:
        ran.append(Path(command[1]).name)
        (tmp_path / "decode.json").write_text("{}")

    monkeypatch.setattr(run_benchmarks.subprocess, "run", run)
    options = ["decode", "--out", str(tmp_path), "--done", str(tmp_path / "notes")]
    for more, count in (([], 1), ([], 1), (["--again"], 2)):
        monkeypatch.setattr(sys, "argv", ["run", *options, *more])
        run_benchmarks.main()
        assert ran == ["bench_decode.py"] * count
    monkeypatch.setattr(run_benchmarks, "code", lambda: "another")
    monkeypatch.setattr(sys, "argv", ["run", *options])
    run_benchmarks.main()
    (tmp_path / "decode.json").unlink()
    run_benchmarks.main()
    assert len(ran) == 4
    assert all((run_benchmarks.HERE / command.split()[0]).is_file() for command in run_benchmarks.RUNS.values())


class Faked(speed_goals.Results):
    """Results that reach every goal, or miss every one."""

    def __init__(self, good: bool) -> None:
        ours, theirs = (0.1, 0.3) if good else (0.3, 0.1)
        names = [name for its in speed_goals.OF_WIDTH.values() for name in its]
        over = {name: {"overhead": ours} for name in (*names, *speed_goals.PEERS, "lora rank=8")}
        peers = ("PEFT LoRA r=8", "PEFT LoRA r=64", *speed_goals.PEERS.values())
        over |= {name: {"overhead": theirs} for name in peers}
        inputs = 4 * 128 * 8
        saved = dict.fromkeys(names, inputs + 4 * 8 * 8 + 7 + (not good))
        saved |= dict.fromkeys(speed_goals.PEERS, inputs + 1000)
        saved |= dict.fromkeys(speed_goals.PEERS.values(), 10 * (inputs + 1000) if good else inputs + 9000)
        costs = (*speed_goals.COUNTED, "milliseconds")
        points = [
            {"family": name, "sites": size, "tokens": size, "width": size}
            | dict.fromkeys(costs, size if good else size**2)
            for size in (1, 4)
            for name in speed_goals.FAMILIES
        ]
        attach = [
            {
                "family": "lora",
                "sites": sites,
                "attach s": sites * (0.1 if good else sites),
                "of which planning s": ours,
            }
            for sites in (1, 4)
        ]
        less = {"seconds": 50, "saved": 100} if good else {"seconds": 49, "saved": 99}
        case = {"factors": {"seconds": 1, "saved": 1}, "rebuilt": less}
        rebuilt = {
            "settings": {"sites": 36, "tokens": 128},
            "floor": {"seconds": 10},
            "constructions": dict.fromkeys(speed_goals.CONSTRUCTIONS, case),
        }
        gain = {
            "family": "lora r=8",
            "shape": "tiny",
            "layers": 2,
            "batch": 16,
            "order": "shuffled",
            "cut": 1.0,
            "gain": {"8": 4 * theirs},
        }
        machine = {"cores": 2, "processor": "P", "torch": "T", "peft": "F"}
        self.data: dict[str, Any] = {
            "step_bare": {"cases": over, "machine": machine},
            "step_lora": {"cases": over},
            "decode": {"cases": over},
            "saved": {
                "cases": [
                    {"case": name, "linear": 128, "tokens": 8, "width": 8, "factors": 7, "saved": value}
                    for name, value in saved.items()
                ]
            },
            "rebuilt": rebuilt,
            "rebuilt_short": rebuilt,
            "growth": {"growth": dict.fromkeys(("sites", "tokens", "width"), points)},
            "attach": {"attach": [*attach[-1:], {"family": "PEFT", "sites": 4, "attach s": 0.9}], "growth": attach},
            "sst2": {"cases": [gain]},
        }

    def __getitem__(self, name: str) -> Any:
        return self.data[name]


def test_goals_are_judged_by_the_measurements() -> None:
    good, bad = ([*speed_goals.goals(Faked(which))] for which in (True, False))
    assert {goal.measured for goal in good if goal.reached is None} == {"no GPU was at hand"}
    assert [goal.what for goal in good if goal.reached is False] == []
    assert [goal.what for goal in bad if goal.reached] == []
    text, missed = speed_goals.page(bad, Faked(False)), sum(goal.reached is False for goal in bad)
    assert f"{len(bad)} goals, {missed} missed" in text
    assert text.count("**no**") == missed
