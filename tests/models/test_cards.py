"""Model cards against transformers' own module trees, and the selection of sites."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from threading import Event
from typing import Any

import pytest

import tnpeft
from tnpeft.counting import biases, card, groups, names, sites
from tnpeft.networks import NetworkError

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 40,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MIXTURE = {**GROUPED, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
TINY = {
    "opt": {
        **{key: size for key, size in SIZES.items() if key != "intermediate_size"},
        **{"ffn_dim": 48, "word_embed_proj_dim": 16},
    },
    "bert": SIZES,
    "roberta": SIZES,
    "vit": {key: size for key, size in SIZES.items() if key != "vocab_size"},
    "gpt2": {
        **{"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_inner": None},
        **{"bos_token_id": 0, "eos_token_id": 1},
    },
    "llama": {**GROUPED, "attention_bias": True},
    "mistral": {**GROUPED, "head_dim": 16},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    **{kind: {**GROUPED, "head_dim": 16} for kind in ("ministral", "gemma", "gemma2", "gemma3_text", "exaone4")},
    **dict.fromkeys(("smollm3", "olmo", "olmo2", "phi", "phi3"), GROUPED),
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**MIXTURE, "head_dim": 16, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "qwen2_moe": {**MIXTURE, "shared_expert_intermediate_size": 20, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    "gpt_oss": {**GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **{**MIXTURE, "num_experts": None, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 2},
        **{"n_group": 2, "topk_group": 1, "num_hidden_layers": 3, "first_k_dense_replace": 1},
        **{"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7},
    },
}
ROUTERS = ("gate", "router", "shared_expert_gate")  # linears in some classes, never targets


@pytest.mark.parametrize("kind", TINY)
def test_card_agrees_with_the_modules_of_transformers(kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.for_model(kind, **TINY[kind])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    linears = {
        name: (module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape, module.bias)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
        if name.rpartition(".")[2] not in ROUTERS
    }
    fused = {
        name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 3 and ".experts." in name
    }
    for name, parameter in fused.items():
        experts, *shape = parameter.shape
        biased = dict(model.named_parameters()).get(f"{name}_bias")
        linears[name] = (shape[::-1] if kind == "gpt_oss" else shape, biased)
        assert {site.experts for site in sites(config, "experts")} == {experts}
    covered = dict.fromkeys(linears, 0)
    for site in sites(config, ["all-linear", "experts"] if fused else "all-linear"):
        (out, inp), _ = linears[site.module]
        assert inp == site.inp
        assert (site.module in fused) == (site.experts > 0)
        assert site.start == covered[site.module]
        covered[site.module] += site.out
        assert covered[site.module] <= out
    assert covered == {name: shape[0] for name, (shape, _) in linears.items()}
    assert biases(config, ["all-linear", "experts"] if fused else "all-linear") == sum(
        bias.numel() for _, bias in linears.values() if bias is not None
    )


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "olmoe"])  # which has no classifier
def test_head_agrees_with_transformers(kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

    config = AutoConfig.for_model(kind, **TINY[kind], num_labels=3)
    auto = AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(config)
    base = {id(parameter) for parameter in model.base_model.parameters()}
    pooler = sum(p.numel() for name, p in model.named_parameters() if ".pooler." in name)
    head = sum(p.numel() for p in model.parameters() if id(p) not in base)
    assert head == card(config).head(labels=3), f"pooler has {pooler}"


@pytest.mark.parametrize(
    ("model", "linears"),
    [  # elements of the layers' linears: published totals less embeddings, norms and biases, worked out by hand
        ("facebook/opt-1.3b", 24 * 12 * 2048**2),
        ("facebook/opt-350m", 24 * 12 * 1024**2),
        ("roberta-base", 84_934_656),
        ("gpt2", 84_934_656),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400 - 128256 * 2048 - 33 * 2048),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096 - 2 * 32000 * 4096 - 65 * 4096),
        ("Qwen/Qwen2.5-0.5B", 494_032_768 - 151936 * 896 - 49 * 896 - 24 * (896 + 2 * 128)),
        ("Qwen/Qwen3-0.6B", 596_049_920 - 151936 * 1024 - 57 * 1024 - 28 * 2 * 128),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008 - 49152 * 576 - 61 * 576),
        ("google/gemma-2-2b", 2_614_341_888 - 256000 * 2304 - 105 * 2304),
        ("google/gemma-2-9b", 9_241_705_984 - 256000 * 3584 - 169 * 3584),
        ("google/gemma-2-27b", 27_227_128_320 - 256000 * 4608 - 185 * 4608),
        ("google/gemma-3-1b-pt", 999_885_952 - 262144 * 1152 - 105 * 1152 - 26 * 2 * 256),
        ("microsoft/phi-2", 2_779_683_840 - 51200 * (2 * 2560 + 1) - 32 * 11 * 2560 - 2 * 2560),
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552 - 2 * 32064 * 3072 - 65 * 3072),
        ("microsoft/phi-4", 14_659_507_200 - 2 * 100352 * 5120 - 81 * 5120),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704 - 2 * 32000 * 4096 - 32 * 8 * 4096 - 65 * 4096),
        ("mistralai/Mixtral-8x22B-v0.1", 140_620_634_112 - 2 * 32000 * 6144 - 56 * 8 * 6144 - 113 * 6144),
        ("allenai/OLMoE-1B-7B-0924", 6_919_161_856 - 2 * 50304 * 2048 - 16 * 64 * 2048 - 65 * 2048),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624 - 2 * 151936 * 2048 - 48 * (130 * 2048 + 256) - 2048),
        ("Qwen/Qwen3-235B-A22B", 235_093_634_560 - 2 * 151936 * 4096 - 94 * (130 * 4096 + 256) - 4096),
        ("openai/gpt-oss-20b", 20_914_757_184 - 2 * 201088 * 2880 - 24 * (32 * (4 * 2880 + 1) + 8064) - 49 * 2880),
        ("deepseek-ai/DeepSeek-V3", 671_026_419_200 - 2 * 129280 * 7168 - 58 * 256 * 7169 - 61 * 16384 - 7168),
        ("moonshotai/Kimi-K2-Instruct", 1_026_408_232_448 - 2 * 163840 * 7168 - 60 * 384 * 7169 - 61 * 16384 - 7168),
    ],
)
def test_linears_add_up_to_the_published_size(model: str, linears: int) -> None:
    targets = ["all-linear", "experts"] if "experts" in card(model).sizes else "all-linear"
    assert sum(site.out * site.inp * max(site.experts, 1) for site in sites(model, targets)) == linears


def test_every_named_card_is_consistent() -> None:
    for name in names():
        its = card(name)
        assert its.name == name
        assert its.sizes["heads"] % its.sizes["kv_heads"] == 0
        assert {p.name for p in its.select()} == set(its.default)
        assert {p.role for p in its.select()} in ({"q", "v"}, {"q", "kv"})  # latent attention has k and v in one
        held = [p for layer in range(its.layers) for p in its.projections if its.has(layer, p)]
        assert len(sites(name, [p.name for p in its.projections])) == len(held)
        assert set(held) == set(its.projections)
        if "q_lora" not in its.sizes:
            assert its.projections[0].out == its.sizes["heads"] * its.sizes["head_dim"]


def test_targets_over_experts() -> None:
    found = sites("deepseek-ai/DeepSeek-V3", ["experts"])
    assert len(found) == 58 * 3
    assert (found[0].layer, found[0].module, found[0].experts) == (0, "layers.3.mlp.experts.gate_up_proj", 256)
    assert len(sites("deepseek-ai/DeepSeek-V3", "mlp")) == 61 * 3 + 58 * 3
    assert {s.proj for s in sites("deepseek-ai/DeepSeek-V3", "shared_experts")} == {
        f"shared_experts_{role}_proj" for role in ("gate", "up", "down")
    }
    assert len(sites("deepseek-ai/DeepSeek-V3", "mlp", layers=[0, 1])) == 6
    with pytest.raises(NetworkError, match=r"none of the layers \[0, 1\] .*\nits dense layers are \[0, 1, 2\]"):
        sites("deepseek-ai/DeepSeek-V3", "experts", layers=[0, 1])
    with pytest.raises(NetworkError, match="no projection 'experts'"):
        sites("facebook/opt-125m", "experts")
    assert card("Qwen/Qwen3-30B-A3B").sizes["active"] == 8
    with pytest.raises(NetworkError, match="no q_lora_rank"):
        card({"model_type": "deepseek_v3", **GROUPED, "n_routed_experts": 4, "num_experts_per_tok": 2})


@pytest.mark.parametrize(
    ("family", "model", "targets", "count"),
    [
        (tnpeft.families.shared_outer_lora(rank=1), "Qwen/Qwen3-30B-A3B", ["experts"], 14_450_688),
        (tnpeft.families.shared_outer_lora(rank=1), "openai/gpt-oss-20b", ["experts"], 6_842_880),
        (tnpeft.families.shared_outer_lora(rank=1), "deepseek-ai/DeepSeek-V3.1", ["mlp"], 94_307_328),
        (tnpeft.families.lora(rank=1), "meta-llama/Llama-3.1-8B", ["mlp"], 1_769_472),
        (tnpeft.families.lora(rank=1), "meta-llama/Llama-3.1-8B", ["attention"], 851_968),
        (tnpeft.families.lora(rank=1), "Qwen/Qwen3-30B-A3B", ["attention"], 835_584),
        (tnpeft.families.bd_lora(rank=14), "meta-llama/Llama-3.2-3B", ["mlp"], 8_429_568),
        (tnpeft.families.mica(rank=32), "meta-llama/Llama-3.2-3B", None, 5_505_024),
        (tnpeft.families.glora(rank=8), "meta-llama/Llama-3.2-3B", None, 4_587_520),
    ],
)
def test_published_counts_from_the_cards(
    family: tnpeft.Factorization, model: str, targets: object, count: int
) -> None:
    assert tnpeft.parameters(family, model=model, targets=targets) == count


def test_names_are_found_in_any_case_and_without_the_owner() -> None:
    assert card("FACEBOOK/OPT-350M") == card("opt-350m")
    assert card("opt-350m").sizes["embed"] == 512
    assert card("opt-350m").head(2) == 1024
    assert card("bert-base-cased") == card("google-bert/bert-base-uncased")


def test_a_config_file_and_its_folder_give_the_same_card(tmp_path) -> None:
    config = {"model_type": "llama", **GROUPED}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert card(tmp_path).projections == card(tmp_path / "config.json").projections == card(config).projections
    assert [(g.out, g.inp, g.count) for g in groups(sites(tmp_path, "q,k,v,up"))] == [
        (32, 32, 2),
        (16, 32, 4),
        (48, 32, 2),
    ]


def test_targets_are_names_path_ends_roles_or_all() -> None:
    def chosen(model: str, targets: object) -> list[str]:
        return [p.name for p in card(model).select(targets)]

    assert chosen("roberta-base", None) == ["query", "value"]
    assert chosen("roberta-base", "dense") == ["attn_output", "intermediate", "output"]
    assert chosen("roberta-base", "attention.output.dense") == ["attn_output"]
    assert chosen("gpt2", "c_attn") == ["c_attn/out:0", "c_attn/out:1", "c_attn/out:2"]
    assert chosen("gpt2", "attn.c_proj, mlp.c_proj") == ["attn_c_proj", "mlp_c_proj"]
    assert chosen("opt-125m", ["v_proj", "q_proj", "v_proj"]) == ["v_proj", "q_proj"]
    assert chosen("opt-125m", "q,v") == ["q_proj", "v_proj"]
    assert len(chosen("opt-125m", "all-linear")) == 6


def test_layers_are_counted_from_zero_but_modules_keep_their_place() -> None:
    found = sites("opt-125m", "q_proj", layers=[10, 11])
    assert [(s.layer, s.module) for s in found] == [
        (0, "decoder.layers.10.self_attn.q_proj"),
        (1, "decoder.layers.11.self_attn.q_proj"),
    ]
    with pytest.raises(NetworkError, match="no layers"):
        sites("opt-125m", layers=[12])


def test_errors_name_the_input_and_the_remedy(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NetworkError, match=r"facebook/opt-1\.3b"):
        card("facebook/opt-1.3")
    with pytest.raises(NetworkError, match="q_proj, k_proj, v_proj"):
        sites("opt-125m", "query")
    with pytest.raises(NetworkError, match="mamba"):
        card({"model_type": "mamba"})
    with pytest.raises(NetworkError, match="num_hidden_layers"):
        card({"model_type": "opt", "hidden_size": 8, "num_attention_heads": 2})
    with pytest.raises(NetworkError, match="cannot be read"):
        card(tmp_path)
    for bad in (5, "", " "):
        with pytest.raises(NetworkError, match="expected a model, got"):
            card(bad)
    with pytest.raises(NetworkError, match="no target"):
        sites("opt-125m", [])


MIXTURE = {"model_type": "mixtral", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
MIXTURE |= {"intermediate_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size")
          for value in (-1, 1.5, "8", [8], True, 10**12, 10**400, float("nan"))),
        ("num_local_experts", {}), ("num_attention_heads", 9), ("mlp_only_layers", 3), ("decoder_sparse_step", "2"),
    ],
    ids=lambda value: str(value)[:9],
)  # fmt: skip
def test_a_configuration_with_absurd_sizes_is_refused(key: str, value: Any) -> None:
    assert card(MIXTURE).sizes["experts"] == 2
    with pytest.raises(NetworkError, match=rf"has (no )?{key}"):
        card({**MIXTURE, key: value})


def test_a_name_that_no_file_can_have_is_unknown() -> None:
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(NetworkError, match="no card"):
            card(name)


def test_an_unknown_name_is_answered_at_once_where_the_hub_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """No retries: the connection is tried once, for a second."""
    from huggingface_hub import constants

    from tnpeft.models import hub

    released = Event()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub, "create_connection", lambda *_, **__: nullcontext(released.wait(20)))
    started = time.monotonic()
    with pytest.raises(NetworkError, match="the hub cannot be reached") as caught:
        card("facebook/opt-1.3c")
    assert time.monotonic() - started < 3
    assert "did you mean facebook/opt-1.3b" in caught.value.remedy
    released.set()
