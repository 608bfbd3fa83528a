"""Damaged and hostile adapter folders: each is refused with what is wrong and what to do, and changes nothing."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import adapted, opt, shake
from failing_steps import assert_same, fingerprint, refused
from safetensors.torch import load_file, save_file
from torch import nn

import tnpeft
from tnpeft.networks import NetworkError

Edit = Callable[[Path], object]
FactorStore = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    model = adapted("mixed")
    shake(model, 1)
    model.save_pretrained(folder)
    return folder


def weights(change: Callable[[FactorStore], FactorStore]) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return edit


def raw(change: Callable[[bytes], bytes]) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return edit


def setting(*path: str, value: Any) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        inner = whole = json.loads(file.read_text())
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        file.write_text(json.dumps(whole))

    return edit


def network(name: str, value: Any) -> Edit:
    return setting("network", name, value=value)


def first_to(value: float) -> Callable[[FactorStore], FactorStore]:
    return lambda held: held | {min(held): torch.full_like(held[min(held)], value)}


OTHER = "U[out a] G[layer proj a b] W[inp b] -> layer proj out inp"
_HUGE = json.dumps({"x": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}).encode()
_BASE = "base_model.model.model.decoder.layers.0.fc1.weight"
_FOREIGN = "base_model.model.factor_bank.tnpeft_factors.Z"

FILES: dict[str, tuple[Edit, str]] = {
    "cut short": (raw(lambda data: data[:-50]), "damaged"),
    "empty": (raw(lambda data: b""), "damaged"),
    "huge declared size": (raw(lambda data: struct.pack("<Q", len(_HUGE)) + _HUGE), "damaged"),
    "huge header": (raw(lambda data: struct.pack("<Q", 2**62) + data[8:]), "damaged"),
    "missing": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model"),
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "pickles",
    ),
    "nan": (weights(first_to(float("nan"))), "is not finite"),
    "infinite": (weights(first_to(float("inf"))), "is not finite"),
    "beyond fp32": (weights(lambda held: {n: v.double() + 1e300 for n, v in held.items()}), "is not finite"),
    "integers": (weights(lambda held: {n: v.int() for n, v in held.items()}), "of type torch.int32"),
    "complex": (weights(lambda held: {n: v.to(torch.complex64) for n, v in held.items()}), "of type torch.complex64"),
    "shapes": (weights(lambda held: {n: v[:1].contiguous() for n, v in held.items()}), r"is \(1, \d\), not"),
    "an array less": (weights(lambda held: {n: v for n, v in held.items() if n != min(held)}), "is missing"),
    "a factor more": (weights(lambda held: held | {_FOREIGN: torch.ones(2)}), "is not part of it"),
    "a base weight": (weights(lambda held: held | {_BASE: torch.zeros(64, 32)}), "would change the model"),
}
SETTINGS: dict[str, tuple[Edit, str]] = {
    "newer schema": (network("schema", 2), "upgrade tnpeft"),
    "no schema": (network("schema", True), "schema True"),
    "another line": (network("lines", [{"network": OTHER, "sites": "*"}]), "tnpeft_factors.W"),
    "half a line": (network("lines", [{"network": "B[", "sites": "*"}]), "B\\["),
    "lines of text": (network("lines", "B[out r]"), "lines"),
    "unknown entry": (network("evil", 1), "evil"),
    "rank as code": (network("ranks", {"a": "__import__('os').system('true')"}), "a"),
    "rank as tower": (network("ranks", {"a": "9**9**9**9", "b": 2}), "a"),
    "huge rank": (network("ranks", {"a": 10**9, "b": 2}), "elements"),
    "other rank": (network("ranks", {"a": 2, "b": 2}), "not"),
    "splits": (network("splits", {"out": 5}), "splits"),
    "start": (network("init", {"U": 5}), "init"),
    "start as table": (network("init", {"U": {}}), "init"),
    "huge scale": (network("scale", 10**400), "scale"),
    "scale as text": (network("scale", "1"), "scale"),
    "negative rate": (network("lr_multiplier", {"U": -3}), "learning rate"),
    "norm of nothing": (network("unit_norm", ["Z"]), "Z"),
    **{
        f"{name} {value!r}": (setting(name, value=value), name)
        for name, value in [
            ("target_modules", 5), ("target_modules", [1]), ("target_modules", "((("), ("target_modules", ""),
            ("exclude_modules", 5), ("layers_to_transform", "x"), ("layers_to_transform", [1.5]),
            ("modules_to_save", 5), ("modules_to_save", [1]), ("bias", 5), ("dropout", "x"), ("dropout", -1),
            ("seed", 1.0), ("seed", 2**200), ("tokens", 0), ("save_frozen", "yes"), ("dora", 1), ("layers", []),
            ("inference_mode", "x"), ("base_model_name_or_path", 5), ("trainable_token_indices", 5),
            ("layers", {"a": "x"}), ("layers", None),
            ("projections", "x"), ("projections", {"q_proj": 0, "v_proj": 2}), ("frozen", []),
        ]
    },
}  # fmt: skip
MORE: list[dict[str, Any]] = [  # what a configuration trains stands in the file
    {"trainable_token_indices": [3, 5]},
    {"trainable_token_indices": {"embed_tokens": [3]}},
    {"modules_to_save": ["fc1"]},
    {"modules_to_save": ["fc1", "final_layer_norm"]},
    {"bias": "all"},
    {"bias": "tensor_network_only"},
    {"dora": True},
]
DTYPES = (torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)
NUMBERS = {
    str(dtype): (
        weights(lambda held, dtype=dtype: {n: torch.ones(v.shape).to(dtype) for n, v in held.items()}),  # type: ignore[misc]
        f"of type {dtype}",
    )
    for dtype in DTYPES
}
CONFIGS: dict[str, tuple[Edit, str]] = {
    f"configuration: {data[:10]!r}": (
        lambda folder, data=data: (folder / "adapter_config.json").write_bytes(data),  # type: ignore[misc]
        "adapter_config.json is not an adapter configuration",
    )
    for data in (b"{cut sho", b"", b"[1, 2]", b'"text"', b"null", b"\xff\xfe{}", b"[" * 100_000)
}
CASES = FILES | NUMBERS | SETTINGS | CONFIGS


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("case", CASES)
def test_a_bad_folder_is_refused_and_nothing_changes(case: str, good: Path, tmp_path: Path) -> None:
    """By transformers' own load_adapter, too, which reads files after the adapter is attached."""
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    edit, message = CASES[case]
    edit(folder)
    base, model, plain, busy = opt(), adapted("mixed"), opt(), opt()
    busy.load_adapter(str(good), "first")
    for target, load, said in (
        (base, lambda: peft.PeftModel.from_pretrained(base, folder), message),
        (model, lambda: model.load_adapter(folder, "second"), message),
        (model, lambda: tnpeft.hotswap(model, str(folder)), None),  # it may stop at another difference first
        (plain, lambda: plain.load_adapter(str(folder), "second"), message),
        (busy, lambda: busy.load_adapter(str(folder), "second"), message),
    ):
        with refused(target, said):
            load()
    plain.load_adapter(str(good), "second")
    busy.load_adapter(str(good), "second")
    held = [[*getattr(its, "peft_config", {})] for its in (base, model, plain, busy)]
    assert held == [[], ["default"], ["second"], ["first", "second"]]


_TENSORS = ("nan", "infinite", "integers", "complex", "shapes", "an array less", "a factor more", "a base weight")
STATES = {name: FILES[name] for name in _TENSORS}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("from_folder", [True, False])
@pytest.mark.parametrize("case", STATES)
def test_transformers_refuses_a_bad_state_dict_as_well(
    case: str, from_folder: bool, good: Path, tmp_path: Path
) -> None:
    """The configuration is in a folder whose file is good, or an object."""
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    edit, message = STATES[case]
    edit(folder)
    bad, held = (load_file(its / "adapter_model.safetensors") for its in (folder, good))
    config = peft.PeftConfig.from_pretrained(good)
    where = {"peft_model_id": str(good)} if from_folder else {"peft_config": config}
    stored, model, wanted = config.stored, opt(), opt()
    with refused(model, message):
        model.load_adapter(adapter_state_dict=bad, **where)
    assert config.stored == stored
    model.load_adapter(adapter_state_dict=held, **where)
    wanted.load_adapter(str(good))
    assert same(model, wanted)
    assert not same(model, opt())


BESIDE: dict[str, tuple[dict[str, Any], Edit, str]] = {
    "a whole module": (
        {"modules_to_save": ["fc1"]},
        weights(lambda held: {n: v[..., :-1].contiguous() if "fc1.weight" in n else v for n, v in held.items()}),
        r"fc1.weight is stored with shape \(64, 31\), and the model's is \(64, 32\)",
    ),
    "a module that is not there": (
        {"modules_to_save": ["fc1"]},
        weights(lambda held: {n.replace(".0.fc1", ".7.fc1"): v for n, v in held.items()}),
        "holds model.decoder.layers.7.fc1.bias, which is not part of the adapter",
    ),
    "a bias": (
        {"bias": "tensor_network_only"},
        weights(lambda held: {n: v[:-1].contiguous() if n.endswith("bias") else v for n, v in held.items()}),
        r"proj.bias is stored with shape \(31,\)",
    ),
    "fewer tokens": (
        {"trainable_token_indices": [3, 5]},
        weights(lambda held: {n: v[:1].contiguous() if "token" in n else v for n, v in held.items()}),
        r"trainable_tokens_delta is stored with shape \(1, 32\), and the model's is \(2, 32\)",
    ),
    "a token that is not there": (
        {"trainable_token_indices": [3, 5]},
        setting("trainable_token_indices", value=[3, 64]),
        "names token 64 of model.decoder.embed_tokens",
    ),
    "an embedding that is not there": (
        {"trainable_token_indices": [3, 5]},
        setting("trainable_token_indices", value={"nowhere": [3, 5]}),
        "the model has no nowhere",
    ),
    "a negative token": (
        {"trainable_token_indices": [3, 5]},
        setting("trainable_token_indices", value=[3, -1]),
        "trainable_token_indices",
    ),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("case", BESIDE)
def test_what_stands_beside_the_factors_is_checked_as_they_are(case: str, tmp_path: Path) -> None:
    options, edit, message = BESIDE[case]
    adapted("mixed", **options).save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(opt(), tmp_path)
    edit(tmp_path)
    base, model = opt(), adapted("mixed")
    for target, load in (
        (base, lambda: peft.PeftModel.from_pretrained(base, tmp_path)),
        (base, lambda: base.load_adapter(str(tmp_path))),
        (model, lambda: model.load_adapter(tmp_path, "second")),
    ):
        with refused(target, message):
            load()


@pytest.mark.parametrize("fields", MORE)
def test_what_a_configuration_trains_stands_in_the_file(fields: dict[str, Any], good: Path, tmp_path: Path) -> None:
    """As it is saved, it loads."""
    shutil.copytree(good, tmp_path / "bad")
    setting(*fields, value=next(iter(fields.values())))(tmp_path / "bad")
    with refused(base := opt(), "is missing"):
        peft.PeftModel.from_pretrained(base, tmp_path / "bad")
    adapted("mixed", **fields).save_pretrained(tmp_path / "more")
    peft.PeftModel.from_pretrained(opt(), tmp_path / "more")
    adapted("mixed").load_adapter(tmp_path / "more", "second")
    opt().load_adapter(str(tmp_path / "more"))


@pytest.mark.parametrize("text", ["{}", '{"peft_type": null}', '{"network": {}}'])
def test_a_configuration_without_a_kind_is_not_loaded(text: str, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text(text)
    for load in (peft.PeftModel.from_pretrained, lambda model, path: model.load_adapter(str(path))):
        with refused(base := opt(), "unknown kind"):
            load(base, tmp_path / "bad")


# ---- the hub's cache


@pytest.fixture
def hub(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The adapter "me/adapter" as the hub's cache holds it, and no connection."""
    import huggingface_hub.constants as settings

    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    cached, commit = tmp_path / "models--me--adapter", "0123456789abcdef0123456789abcdef01234567"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(good, cached / "snapshots" / commit)
    shutil.copytree(good, cached / "snapshots" / commit / "inner")
    return cached / "snapshots" / commit


@pytest.mark.parametrize("subfolder", [None, "inner"])
@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_of_the_hub_is_refused_before_it_is_attached(
    case: str, subfolder: str | None, hub: Path, tmp_path: Path
) -> None:
    edit, message = FILES[case]
    edit(hub / (subfolder or ""))
    if case in ("missing", "a pickle"):
        message = "cannot be had from the hub"
    base, model = opt(), adapted("mixed")
    there = {"cache_dir": str(tmp_path), "subfolder": subfolder}
    for target, load in (
        (base, lambda: peft.PeftModel.from_pretrained(base, "me/adapter", **there)),
        (model, lambda: model.load_adapter("me/adapter", "second", **there)),
    ):
        with refused(target, message):
            load()


def test_a_good_file_of_the_hub_loads(hub: Path, good: Path, tmp_path: Path) -> None:
    found = peft.PeftModel.from_pretrained(opt(), "me/adapter", cache_dir=str(tmp_path))
    assert same(found, peft.PeftModel.from_pretrained(opt(), good))


def test_other_adapters_are_read_as_ever(tmp_path: Path) -> None:
    peft.get_peft_model(opt(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    for kind in (peft.PeftConfig, peft.LoraConfig):
        assert type(kind.from_pretrained(tmp_path)) is peft.LoraConfig
    (tmp_path / "adapter_model.safetensors").unlink()
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is peft.LoraConfig


def same(one: nn.Module, two: nn.Module) -> bool:
    """True if both have the same modules and arrays, of which the same are trained."""

    def held(model: nn.Module) -> Any:
        arrays = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
        return (
            [name for name, _ in model.named_modules()],
            arrays,
            {n: p.requires_grad for n, p in model.named_parameters()},
        )

    return bool(held(one) == held(two))


def test_a_folder_of_another_kind_of_adapter_is_not_swapped_in(tmp_path: Path) -> None:
    peft.get_peft_model(opt(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with refused(model := adapted("mixed"), r"is a .*LORA"):
        tnpeft.hotswap(model, str(tmp_path))


def test_the_good_folder_loads(good: Path) -> None:
    model = peft.PeftModel.from_pretrained(opt(), good)
    assert not same(opt(), model)
    before = fingerprint(model)
    tnpeft.hotswap(model, str(good))
    assert_same(fingerprint(model), before)


def test_lower_precision_and_what_peft_writes_beside_factors_load(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(good, folder)
    weights(lambda held: {n: v.half() for n, v in held.items()})(folder)
    model = peft.PeftModel.from_pretrained(opt(), folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    resized = adapted("mixed")
    resized.save_pretrained(tmp_path / "embeddings", save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "embeddings" / "adapter_model.safetensors"))
    config = tmp_path / "embeddings" / "adapter_config.json"
    declared = json.loads(config.read_text())
    assert declared["embeddings"] == ["lm_head.weight", "model.decoder.embed_tokens.weight"]
    peft.PeftModel.from_pretrained(opt(), tmp_path / "embeddings")
    config.write_text(json.dumps(declared | {"embeddings": None}))
    with pytest.raises(NetworkError, match=r"(lm_head|embed_tokens)\.weight, which is not part"):
        peft.PeftModel.from_pretrained(opt(), tmp_path / "embeddings")
