"""The benchmarks run, at sizes too small to say anything, and write what they say."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import _bench
import bench_attach
import bench_decode
import bench_packs
import bench_replicas
import bench_step

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
