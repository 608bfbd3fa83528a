"""The benchmarks run, at sizes too small to say anything, and write what they say."""

from __future__ import annotations

import gzip
import importlib
import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import attach, driver, goals, growth, meters, packs, saved
from bench.models import CONSTRUCTIONS

from tnpeft.studies.digits import save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:the rank")
TINY = "--shape tiny --layers 2"
KEPT = ["PEFT LoRA r=8", "PEFT LoKr r=8", "lora rank=8", "lokr rank=8"]
STEP = ["PEFT LoRA r=8", "lora rank=8", "rebuilt tensor: qkv_depth", "rebuilt site: qkv_depth"]


def step(data: Any) -> None:
    found, matrix = data["cases"], 256 * 256 * 4
    assert {*found} == {"floor", *STEP}
    ours, theirs = found["lora rank=8"], found["PEFT LoRA r=8"]
    assert ours["parameters"] == theirs["parameters"] == 2 * 3 * 8 * 512
    assert ours["saved"] <= theirs["saved"]
    assert ours["kernels"] < theirs["kernels"]
    beyond = {name: row["saved"] - found["floor"]["saved"] for name, row in found.items()}
    assert beyond["rebuilt site: qkv_depth"] >= 6 * matrix
    assert beyond["rebuilt tensor: qkv_depth"] >= 6 * 6 * matrix


def against(data: Any) -> None:
    ours, theirs = data["cases"]["lora rank=8"], data["against"]["lora rank=8"]
    assert {key: ours[key] for key in ("flops", "saved", "kernels")}.items() <= theirs.items()
    assert theirs["time"] > 0
    assert len(theirs["samples"]) == 1


def rebuilt(data: Any) -> None:
    rows, matrix, sites = data["constructions"], 4 * 256 * 256, 6
    assert {*rows} == {*CONSTRUCTIONS}
    whole = dict.fromkeys(rows, 1) | {"qkv": 3, "att_qkv": 3, "depth": 2, "att_depth": 2}
    whole |= {"qkv_depth": 6, "att_qkv_depth": 6}
    for name, row in rows.items():
        assert row["rebuilt"]["saved"] >= sites * whole[name] * matrix
        assert row["factors"]["saved"] < matrix
        assert row["rebuilt"]["flops"] > 5 * row["factors"]["flops"]


def grown(data: Any) -> None:
    """Linear in sites but for what is done once, and in tokens and width: nothing grows with rows times columns."""
    for what, points in data["growth"].items():
        for family, rows in growth.by_family(points).items():
            for cost in growth.COUNTED:
                steps = [b[cost] - a[cost] for a, b in pairwise(rows)]
                if what == "sites":
                    assert steps[1] == 2 * steps[0]
                    once = rows[0][cost] - steps[0]  # columns are normalised for all sites at once
                    assert 0 <= once <= 26 * (cost == "kernels" and family.startswith("cp"))
                else:
                    assert growth.power(rows, what, cost) <= 1 + 1e-12


def over_experts(data: Any) -> None:
    """At equal rank at most half of what PEFT's LoRA keeps, beside the frozen block and in all."""
    rows = {(row["case"], row["experts"]): row for row in data["cases"].values()}
    for experts in (4, 8):
        frozen, theirs, ours = (rows[name, experts] for name in ("frozen", "PEFT LoRA r=2", "expert_lora rank=2"))
        assert ours["trained"] == theirs["trained"] == experts * 2 * (32 + 128 + 64 + 32)
        assert ours["saved"] - frozen["saved"] <= (theirs["saved"] - frozen["saved"]) / 2
        assert 2 * ours["saved"] <= theirs["saved"]
        assert all(rows[name, experts]["milliseconds"] > 0 for name, _ in rows)


def kept(data: Any) -> None:
    rows = {row["case"]: row for row in data["cases"]}
    assert rows["lora rank=8"]["saved"] == rows["PEFT LoRA r=8"]["saved"] == 4 * 8 * (128 + 8)
    assert (rows["lora rank=8"]["width"], rows["lora rank=8"]["factors"]) == (8, 4 * 2 * 8 * 128)
    assert rows["PEFT LoKr r=8"]["saved"] - rows["lokr rank=8"]["saved"] >= 4 * 128 * 128


def replicas(data: Any) -> None:
    cases = [(row["family"], row["rows"]) for row in data["cases"]]
    assert cases == [("none", 1), ("none", 2), ("lora rank=8", 1), ("lora rank=8", 2)]
    assert all(set(row["gain"]) == {"2", "3"} and min(row["gain"].values()) > 0 for row in data["cases"])


def packed(data: Any) -> None:
    (row,) = data["methods"]
    assert row["runs"] == 4
    assert row["packs"]["4"]["loss"] <= 1e-4


def sst2(data: Any) -> None:
    (row,) = data["cases"]
    assert row["milliseconds"] > 0
    assert {*row["gain"]} == {"2", "3"}
    assert row["tokens"] <= row["padded"]


def names(*expected: str) -> Callable[[Any], None]:
    def check(data: Any) -> None:
        assert {*expected} <= {*data["cases"]}
        assert all(min(case["samples"]) > 0 for case in data["cases"].values())

    return check


SMALL_STEP = f"step {TINY} --batch 2 --length 16"
SENTENCES = "sst2 --shapes tiny:1 --batches 4 --replicas 2 3 --train 12 --steps 2 --orders shuffled "
SENTENCES += "--data {0} --tokenizer {0}/tokenizer --words ' p2' ' p3'"
EACH: dict[str, tuple[str, Callable[[Any], None]]] = {
    "bare": (f"{SMALL_STEP} --bare --only {shlex.join(STEP)}", step),
    "step": (f"{SMALL_STEP} --only {shlex.join(STEP)}", step),
    "against": (f"{SMALL_STEP} --bare --only 'lora rank=8' --against {driver.ROOT}", against),
    "mixed": (
        "mixed --shape tiny --layers 1 --adapters 3 --tokens 1 4",
        names("floor, 1 tokens", "PEFT LoRA r=8, 4 tokens", "cp rank=8, 4 tokens"),
    ),
    "forward": (
        "forward --shape tiny --layers 1 --tokens 4 8 --length 4 --dtype bfloat16 --only 'lora rank=8'",
        names("floor, 4 tokens", "lora rank=8, 8 tokens"),
    ),
    "decode": (
        "decode --shape tiny --layers 1 --tokens 4 --prompt 3",
        names("floor", "PEFT LoRA r=8", "lora rank=8", "lora rank=8, merged"),
    ),
    "optimizer": (
        "optimizer --shape tiny --layers 1 --batch 2 --length 4",
        names("lora", "cp, AdamW", "tucker, invariant"),
    ),
    "growth": ("growth --sites 6 12 24 --tokens 128 256 512 --widths 128 256 512", grown),
    "experts": ("experts --experts 4 8 --hidden 32 --width 64 --tokens 64 --rank 2", over_experts),
    "rebuilt": (f"rebuilt {TINY} --tokens 16", rebuilt),
    "saved": (f"saved --only {shlex.join(KEPT)}", kept),
    "replicas": ("replicas --shapes tiny:1 --batches 1x4 2x4 --replicas 2 3 --families none 'lora rank=8'", replicas),
    "packs": ("packs --backbone {0}/opt --cache {0}/cache --steps 2", packed),
    "sst2": (SENTENCES, sst2),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sentences, a tokenizer and a model, and sizes that are not options, made small."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    config = OPTConfig(vocab_size=95, num_attention_heads=2, max_position_embeddings=32, dropout=0.0, **sizes, **ids)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    save_tokenizer(tmp_path / "opt")
    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "sst2").mkdir()
    rows = [{"sentence": " ".join(["p1"] * (1 + 7 * k % 20)), "label": k % 2} for k in range(40)]
    for part in ("train", "dev"):
        with gzip.open(tmp_path / "sst2" / f"{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setattr(growth, "SMALL", {"sites": 6, "tokens": 128, "width": 128})
    monkeypatch.setattr(saved, "SIZES", ((128, 8),))
    for name, value in (("METHODS", packs.METHODS[:1]), ("SEEDS", (0, 1)), ("PACKS", (4,))):
        monkeypatch.setattr(packs, name, value)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    driver.main()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", EACH)
def test_a_benchmark(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, check = EACH[name]
    which, *options = shlex.split(text.format(folder))
    call(monkeypatch, which, *options, "--samples", "1", "--out", str(folder), "--name", name)
    check(json.loads((folder / f"{name}.json").read_text()))
    page, module = (folder / f"{name}.md").read_text(), importlib.import_module(f"bench.{which}")
    assert page.startswith(f"# {module.__doc__.partition('.')[0]}")
    assert "{" not in page
    assert "| --- |" in page


def test_every_benchmark_is_tried_and_published() -> None:
    """Attaching is tried below, at its smallest; the others want real weights, or more memory."""
    others = {"attach", "full_size", "compare_peft"}
    assert {*driver.NAMES} == {text.split()[0] for text, _ in EACH.values()} | others
    for which, options in driver.published().values():
        driver.parse(which, shlex.split(options))


def test_unknown_names_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="unknown case 'lara'"):
        call(monkeypatch, "step", "--shape", "tiny", "--layers", "1", "--only", "lara", "--out", str(tmp_path))
    for names in (["stop"], ["all", "stop"]):
        with pytest.raises(SystemExit, match="unknown benchmark 'stop'"):
            call(monkeypatch, *names)


def test_attaching_counts_what_it_attaches() -> None:
    options = Namespace(samples=1, clock="cpu")
    row = attach.attached(options, 1, "cp rank=21")
    assert (row["sites"], row["parameters"]) == (4, 4 * 21 * (1 + 32 + 64 + 32 + 64))
    assert row["of which planning s"] > 0
    theirs = attach.attached(options, 1, attach.PEFT)
    assert (theirs["sites"], theirs["parameters"]) == (4, 4 * 2 * 8 * 2048)


def test_the_meters_count_every_product_in_place_or_not() -> None:
    a, b, total = torch.ones(2, 3), torch.ones(3, 4), torch.zeros(2, 4)
    for product in (lambda: a @ b, lambda: torch.addmm(total, a, b), lambda: total.addmm_(a, b)):
        with meters.flop_counter() as counter:
            product()
        assert counter.get_total_flops() == 2 * 2 * 3 * 4


def test_the_peak_is_what_lives_at_once() -> None:
    def forward() -> torch.Tensor:
        x = torch.zeros(1000, requires_grad=True)
        for _ in range(5):
            x = x.detach() + 1
        return x.requires_grad_().sum()

    found = meters.meters(torch.nn.Identity(), forward)
    assert 8000 <= found.peak < 13000


def test_runs_are_interleaved() -> None:
    order: list[str] = []
    options = Namespace(samples=2, clock="wall")
    times = driver.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, options)
    assert order == ["a", "b"] * 3
    assert [len(found) for found in times.values()] == [2, 2]
    slow = driver.interleaved({"fast": lambda: None, "slow": lambda: time.sleep(0.01)}, options)
    assert driver.ratio(slow["slow"], slow["fast"]) > 1


def test_the_power_of_a_growth() -> None:
    rows = [{"width": 2, "flops": 3}, {"width": 8, "flops": 48}]
    assert growth.power(rows, "width", "flops") == pytest.approx(2)


@pytest.mark.parametrize("table", driver.published())
def test_published_pages_show_what_their_results_hold(table: str) -> None:
    """Every cell; a result file keeps no order, and a text may be that of the day of the measurement."""

    def cells(text: str) -> list[str]:
        rows = [line.split("|") for line in text.splitlines() if line[:1] == "|"]
        return sorted(cell.strip() for row in rows for cell in row if cell.strip(" -:"))

    path = driver.TABLES / f"{table}.json"
    module = importlib.import_module(f"bench.{driver.published()[table][0]}")
    assert cells(driver.page(module, json.loads(path.read_text()))) == cells(path.with_suffix(".md").read_text())


def test_the_page_of_goals_is_up_to_date() -> None:
    data = goals.measure(Namespace(out=driver.TABLES))
    assert driver.page(goals, data) == (driver.TABLES / "speed.md").read_text()


def test_benchmarks_that_have_run_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(command: list[str], **_: Any) -> None:
        ran.append(command[2])
        (tmp_path / "decode.json").write_text("{}")

    monkeypatch.setattr(driver.subprocess, "run", run)
    options = ["all", "decode", "--out", str(tmp_path), "--done", str(tmp_path / "notes")]
    for more, count in (([], 1), ([], 1), (["--again"], 2)):
        call(monkeypatch, *options, *more)
        assert ran == ["decode"] * count
    monkeypatch.setattr(driver, "code", lambda: "another")
    call(monkeypatch, *options)
    (tmp_path / "decode.json").unlink()
    call(monkeypatch, *options)
    assert len(ran) == 4


def changed(good: bool) -> Callable[[str], Any]:
    """The committed results with what is ours made so good that it reaches every goal, or so bad that it misses."""

    def read(name: str) -> Any:
        data = json.loads((driver.TABLES / f"{name}.json").read_text())
        rows = data.get("cases", [])
        named = rows.items() if isinstance(rows, dict) else ((row.get("case", ""), row) for row in rows)
        for case, row in named:
            if case and not case.startswith("PEFT"):
                row |= {"overhead": 0.0, "saved": 0} if good else {"overhead": 99.0, "saved": 10**9}
            if "gain" in row:
                row["gain"] = dict.fromkeys(row["gain"], 9.0 if good else 0.1)
        for row in data.get("constructions", {}).values():
            row["factors"] = {key: value / (1000 if good else 1) for key, value in row["rebuilt"].items()}
        for what, points in data.get("growth", {}).items() if name == "growth" else ():
            for row in points:
                row |= dict.fromkeys((*goals.COUNTED, "milliseconds"), row[what] ** (1 if good else 2))
        for row in [*data.get("attach", ()), *data["growth"]] if name == "attach" else ():
            row["attach s"] = row["sites"] / 1000 if good else row["sites"] ** 2
            row |= {"of which planning s": 0.1 if good else 1.0} if "of which planning s" in row else {}
        return data

    return read


def test_goals_are_judged_by_the_measurements() -> None:
    good, bad = ([*goals.goals(changed(which))] for which in (True, False))
    assert [goal["what"] for goal in good if not goal["reached"]] == []
    assert [goal["what"] for goal in bad if goal["reached"]] == []
    text = driver.page(goals, {"goals": bad, "machine": changed(True)("step_bare")["machine"]})
    assert f"{len(bad)} goals, {len(bad)} missed" in text
    assert text.count("**no**") == len(bad)
