"""Folders hold what they declare and nothing else; configurations are values that can be kept and used again."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import adapted, bert, gpt2, llama, logits, opt, shake
from disks import small_disk
from failing_steps import assert_same, fingerprint, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import tnpeft
from tnpeft.adapters.storage.expressions import check_expression
from tnpeft.networks import AdapterFileError, ConfigError, NetworkError, TnpeftError

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = adapted("mixed")
    shake(model, 1)
    model.save_pretrained(folder)
    return folder


def edited(saved: Path, to: Path, arrays: Any = None, **fields: Any) -> Path:
    """A copy of the folder with other arrays or fields."""
    to.mkdir(exist_ok=True)
    held = load_file(saved / "adapter_model.safetensors")
    save_file(arrays(held) if arrays else held, to / "adapter_model.safetensors")
    data = json.loads((saved / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**data, **fields}))
    return to


BASE = {name for name, _ in opt().named_parameters()}
PARTS = sorted({part for name in BASE for part in name.split(".")} | {"o", "out", "t", "proj", "e"})


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(BASE)), permits=st.lists(st.sampled_from(PARTS), max_size=2))
def test_no_file_overwrites_a_base_weight(name: str, permits: list[str], saved: Path, tmp_path: Path) -> None:
    """Whatever the configuration says is trained: it is refused or kept apart, and unloading brings the base back."""
    value = dict(opt().named_parameters())[name]
    folder = edited(
        saved,
        tmp_path / "evil",
        lambda held: held | {PREFIX + name: torch.full(value.shape, 7.0)},
        modules_to_save=permits or None,
    )
    base = opt()
    before = fingerprint(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(base, folder)
    except NetworkError:
        assert_same(fingerprint(base), before)
        return
    assert all(torch.equal(value, opt().get_parameter(key)) for key, value in model.unload().named_parameters())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.integers(0, 2**4 - 1), both=st.booleans())
def test_names_are_read_as_the_loader_reads_them(kept: int, both: bool, saved: Path, tmp_path: Path) -> None:
    """Names without PEFT's prefix, some or all, alone or beside those with it, are refused."""

    def rename(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = sorted(held)
        bare = {n.removeprefix(PREFIX): held[n] for k, n in enumerate(names) if kept >> k & 1 or not kept}
        return bare | (
            {n: v.clone() for n, v in held.items()}
            if both
            else {n: v for n, v in held.items() if n.removeprefix(PREFIX) not in bare}
        )

    with pytest.raises(AdapterFileError, match="does not begin with"):
        peft.PeftModel.from_pretrained(opt(), edited(saved, tmp_path / "bare", rename))


@pytest.mark.parametrize(
    "pattern",
    [
        r"(([a-z_.0-9])+)+!", r"(.*)*!", r"(.*.*)*x", ".*" * 9 + "!", r"(?:(?:.?){50}){50}!", r"(?:.{0,60}){0,60}!",
        r"(?=(.+)+!)x", r"(.)\1*!", r"(?:){2000000000}(?:.?){2000000000}!", r"(?i:([A-Z._]+)+)!",
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_expression_that_backtracks_for_ever_is_refused(
    field: str, pattern: str, saved: Path, tmp_path: Path
) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match="could match for ever"):
        peft.PeftModel.from_pretrained(opt(), edited(saved, tmp_path, **{field: pattern}))
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj", r"(?!.*lm_head).*\.layers\.\d+\.(self_attn|mlp)\..*_proj", r"(\w+\.)*q_proj",
        r"^(?:.*\.)?layers\.(?:[0-9]|1[0-5])\.self_attn\.[qkvo]_proj$", r"(?i).*Q_PROJ",
        r"model\.(?:[a-z_]+\.)+\d{1,2}\..+",
    ],
)  # fmt: skip
def test_expressions_that_people_write_are_taken(pattern: str) -> None:
    names = [f"model.decoder.layers.{k}.self_attn.{p}_proj" for k in range(100) for p in ("q", "k", "v", "out")]
    started = time.process_time()
    check_expression("target_modules", pattern, names)
    assert time.process_time() - started < 0.5


# ---- configurations are values


def fresh(**more: Any) -> tnpeft.TensorNetworkConfig:
    return tnpeft.TensorNetworkConfig(**{"network": "vera", "target_modules": ["q_proj", "v_proj"], **more})


@settings(max_examples=10, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 9), "ranks": st.just({"r": 3}), "target_modules": st.just(["k_proj"]),
            "scale": st.sampled_from([0.5, 2.0]), "save_frozen": st.booleans(),
        },
    )
)  # fmt: skip
def test_an_attached_configuration_is_copied_and_replaced(fields: dict[str, Any]) -> None:
    config = fresh()
    held = copy.deepcopy(config.to_dict())
    first = peft.get_peft_model(opt(), config)
    peft.get_peft_model(llama(), config)
    assert config.to_dict() == held
    first.add_adapter("other", dataclasses.replace(first.peft_config["default"], **fields))
    assert first.peft_config["other"].seed == fields.get("seed", 0)


HEADS = {"SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}


def with_heads(name: str = "") -> nn.Module:
    model = bert()
    model.name_or_path, model.qa_outputs = name, nn.Linear(2, 2)
    return model


@pytest.mark.parametrize("saved", [None, ["pooler.dense"]])
@pytest.mark.parametrize("kind", [None, *HEADS])
def test_a_head_and_a_models_name_are_written_into_a_copy(
    kind: str | None, saved: list[str] | None, recwarn: pytest.WarningsRecorder
) -> None:
    config = fresh(target_modules=["query"], task_type=kind, modules_to_save=saved)
    held = copy.deepcopy(config.to_dict())
    for name in ("first", "second"):
        model = peft.get_peft_model(with_heads(name), config, revision=name)
        model.add_adapter("other", config)
        own = model.peft_config["default"]
        assert (own.base_model_name_or_path, own.revision) == (name, name)
        assert config.to_dict() == held
        for adapter in ("default", "other"):
            assert {HEADS.get(kind), *(saved or ())} - {None} <= {*(model.peft_config[adapter].modules_to_save or ())}
    peft.get_peft_model(with_heads("third"), own)
    assert own.base_model_name_or_path == "second"
    renamed = [str(w.message) for w in recwarn if "was renamed" in str(w.message)]
    assert len(renamed) == 1  # the attached one, on another model
    assert "from 'second' to 'third'" in renamed[0]


@pytest.mark.parametrize("kind", HEADS)
def test_heads_are_trained_saved_and_loaded_over_and_beside(kind: str, tmp_path: Path) -> None:
    """Adapters with heads of their own, each its own after any load."""

    def head(model: Any, adapter: str) -> torch.Tensor:
        return dict(model.named_parameters())[f"base_model.model.{HEADS[kind]}.modules_to_save.{adapter}.weight"]

    def heads(model: Any, **wanted: float) -> None:
        for adapter, value in wanted.items():
            assert bool((head(model, adapter) == value).all()), adapter

    config = fresh(target_modules=["query"], task_type=kind, modules_to_save=["pooler.dense"])
    model = peft.get_peft_model(with_heads(), config)
    model.add_adapter("other", config)
    assert head(model, "default").requires_grad
    with torch.no_grad():
        head(model, "default").fill_(1.0)
        head(model, "other").fill_(2.0)
    model.save_pretrained(tmp_path)
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]) == sorted(
        {"pooler.dense", *model.peft_config["default"].modules_to_save}
    )
    again = peft.PeftModel.from_pretrained(with_heads(), tmp_path)
    heads(again, default=1.0)
    assert len(again.peft_config["default"].modules_to_save) == len(model.peft_config["default"].modules_to_save)
    again.load_adapter(tmp_path / "other", "other")
    heads(again, default=1.0, other=2.0)
    again.load_adapter(tmp_path, "other")
    heads(again, default=1.0, other=1.0)
    with torch.no_grad():
        head(again, "default").fill_(3.0)
    again.load_adapter(tmp_path / "other", "default")
    heads(again, default=2.0, other=1.0)
    kept = again.base_model.model.get_submodule(HEADS[kind]).original_module.weight
    assert torch.equal(kept, with_heads().get_submodule(HEADS[kind]).weight)


def test_a_configuration_comes_back_from_a_folder_without_factors(tmp_path: Path) -> None:
    attached = adapted("vera").peft_config["default"]
    for name, config in {"fresh": fresh(), "attached": attached}.items():
        config.save_pretrained(str(tmp_path / name))
        again = tnpeft.TensorNetworkConfig.from_pretrained(str(tmp_path / name))
        assert again.to_dict() == config.to_dict()
        peft.get_peft_model(opt(), again)  # a recipe to be trained
        for load in (peft.PeftModel.from_pretrained, lambda model, folder: model.load_adapter(str(folder))):
            with refused(base := opt(), "no adapter_model", AdapterFileError):
                load(base, tmp_path / name)


@pytest.mark.parametrize(
    "fields", [{"scale": 5.0}, {"seed": 2}, {"unit_norm": ["d"]}, {"target_modules": ["q_proj"]}, {"bias": "all"}]
)
def test_an_adapter_is_loaded_over_its_like_only(fields: dict[str, Any], tmp_path: Path) -> None:
    model, like = peft.get_peft_model(opt(), fresh()), peft.get_peft_model(opt(), fresh())
    other = peft.get_peft_model(opt(), fresh(**fields))
    for its, name in ((like, "like"), (other, "other")):
        shake(its)
        its.save_pretrained(tmp_path / name)
    with refused(model, "has another", AdapterFileError):
        model.load_adapter(tmp_path / "other", "default")
    model.load_adapter(tmp_path / "like", "default")
    assert torch.equal(logits(model), logits(like))


@pytest.mark.parametrize("fields", [{"replica_ranks": [{"r": 1}, {"r": 2}]}, {"replica_scales": [1.0, 3.0]}])
def test_replicas_of_other_ranks_or_scales_are_not_swapped_in(fields: dict[str, Any], tmp_path: Path) -> None:
    more = {"ranks": {"r": 2}, "replicas": 2, "network": "lora"}
    other = peft.get_peft_model(opt(), fresh(**more, **fields))
    other.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=f"another {next(iter(fields))}"):
        tnpeft.hotswap(peft.get_peft_model(opt(), fresh(**more)), str(tmp_path))


def test_a_state_dict_without_the_frozen_factors_says_so() -> None:
    source, target = peft.get_peft_model(opt(), fresh()), peft.get_peft_model(opt(), fresh(seed=1))
    with pytest.warns(match="holds no frozen factors: A, B stay as seed 1"):
        peft.set_peft_model_state_dict(target, peft.get_peft_model_state_dict(source))
    kept = peft.get_peft_model(opt(), fresh(save_frozen=True)), peft.get_peft_model(opt(), fresh(save_frozen=True))
    peft.set_peft_model_state_dict(kept[1], peft.get_peft_model_state_dict(kept[0]))


@pytest.mark.parametrize("bias", ["all", "tensor_network_only"])
def test_a_state_dict_holds_what_the_configuration_declares(bias: str) -> None:
    source = adapted("lora", bias=bias)
    with torch.no_grad():
        source.base_model.model.model.decoder.layers[0].self_attn.q_proj.base_layer.bias.fill_(1.23)
    held = peft.get_peft_model_state_dict(source)
    message = "bias, which is not part of the adapter and would change the model"
    with refused(target := adapted("lora"), message, AdapterFileError):
        peft.set_peft_model_state_dict(target, held)
    like = adapted("lora", bias=bias)
    peft.set_peft_model_state_dict(like, held)
    assert torch.equal(logits(like), logits(source))


class _Moved(nn.Module):
    def __init__(self, moved: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8)})])})
        self.model = nn.ModuleDict({"language_model": inner}) if moved else inner
        rule = {r"^model(?!\.language_model)": "model.language_model"}
        self._checkpoint_conversion_mapping = rule if moved else {}


def test_modules_that_have_moved_since_are_found(tmp_path: Path) -> None:
    old = peft.get_peft_model(_Moved(False), fresh(target_modules=["q_proj"]))
    shake(old)
    old.save_pretrained(tmp_path)
    new = peft.PeftModel.from_pretrained(_Moved(True), tmp_path)
    for name, value in tnpeft.factors(old).items():
        assert torch.equal(value, tnpeft.factors(new)[name])
    new.load_adapter(tmp_path, "default")


def t5(tied: bool) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    config = T5Config(**sizes, tie_word_embeddings=tied, decoder_start_token_id=0, pad_token_id=0)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [opt, llama, gpt2, bert, partial(t5, True), partial(t5, False)])
def test_resized_embeddings_come_back(make: Any, tmp_path: Path) -> None:
    both, ids = isinstance(make, partial), torch.tensor([[65, 7, 69, 3]])  # an encoder and a decoder; new tokens

    def resized() -> nn.Module:
        torch.manual_seed(1)
        model = make()
        torch.manual_seed(1)
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    def output(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, **({"decoder_input_ids": ids.flip(1)} if both else {})).logits

    its = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"} if both else {"target_modules": "all-linear"}
    model = peft.get_peft_model(resized(), fresh(network="lora", **its))
    shake(model)
    heads = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for weight in {head.weight for head in heads if head is not None}:
            weight.add_(1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(resized(), tmp_path)
    assert torch.equal(output(again), output(model))
    assert not torch.allclose(output(model), output(resized()))


# ---- writing


def test_a_pickle_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="pickles are not read"):
        adapted("mixed").save_pretrained(tmp_path, safe_serialization=False)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("size", [0, 300, 2000])
def test_whoever_writes_leaves_everything_or_nothing(size: int, tmp_path: Path) -> None:
    model = adapted("lora")
    writers = {
        "adapter": lambda: model.save_pretrained(tmp_path / "adapter"),
        "recipe": lambda: model.peft_config["default"].save_pretrained(str(tmp_path / "recipe")),
        "lora": lambda: tnpeft.export_lora(model, tmp_path / "lora"),
    }
    for write in writers.values():
        write()
    writers |= {
        "new": lambda: tnpeft.export_lora(model, tmp_path / "new"),
        "converted": lambda: tnpeft.convert(tmp_path / "lora", tmp_path / "converted"),
        "kohya": lambda: tnpeft.convert(tmp_path / "lora", tmp_path / "kohya.safetensors", to="kohya"),
    }
    files = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}  # noqa: E731
    before = files()
    held = sorted(path.name for path in before if path.parent.name == "adapter")
    assert held == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for name, write in writers.items():
        if size < 2000 or name != "recipe":  # which is smaller
            with small_disk(size), pytest.raises(AdapterFileError, match=r"cannot be written(.|\n)*make room"):
                write()
        assert files() == before, name


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300])
def test_a_place_that_is_no_folder_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    model = adapted("lora")
    for write in (model.save_pretrained, partial(tnpeft.export_lora, model)):
        with pytest.raises(AdapterFileError, match="cannot be written"):
            write(tmp_path / place)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


# ---- values of any kind

KEYS = ["r", "a", "b", "out", "inp", "q_proj", "U", "schema", "lines", "network", "sites", "*", "", "0"]
NUMBERS = st.one_of(
    st.integers(-3, 3), st.sampled_from([2**31, 2**63, -(2**63), 10**400, 1e308, -1e308, 1e-308, 1e30, 0.5, -0.0])
)
TEXTS = st.one_of(
    st.sampled_from([
        *KEYS, "all-linear", "none", "all", "SEQ_CLS", "CAUSAL_LM", "LORA", "TENSOR_NETWORK",
        "(a+)+$", "((", "[", "normal(1e300)",
        "9**9**9", "ceildiv(r, 0)", "B[out r] A[r inp] -> out inp", "\x00", "\ud800", "x" * 3000,
    ]),
    st.text(max_size=8),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.sampled_from([float("nan"), float("inf")])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=4)), inner, max_size=3),
    ),
    max_leaves=6,
)  # fmt: skip
INNER = ["ranks", "splits", "init", "scale", "unit_norm", "lr_multiplier", "square"]
FIELDS = [field.name for field in dataclasses.fields(tnpeft.TensorNetworkConfig)]
FIELDS += [*INNER, "rank_pattern", "runtime_config", "new"]
INNER = [*INNER, "schema", "name", "lines", "source"]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=120, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2),
    inner=st.dictionaries(st.sampled_from(INNER), VALUES, max_size=2),
    dropped=st.lists(st.sampled_from(FIELDS), max_size=1),
)
def test_a_folder_with_any_values_is_loaded_or_refused(
    fields: dict[str, Any], inner: dict[str, Any], dropped: list[str], saved: Path, tmp_path: Path
) -> None:
    data = json.loads((saved / "adapter_config.json").read_text())
    data["network"] |= inner
    data = {name: value for name, value in {**data, **fields}.items() if name not in dropped}
    (folder := tmp_path / "any").mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(data))
    base = opt()
    before = fingerprint(base)
    try:
        found = peft.PeftModel.from_pretrained(base, folder)
    except TnpeftError:
        assert_same(fingerprint(base), before)
        return
    assert torch.isfinite(logits(found)).all()


@pytest.mark.parametrize("depth", [70, 900, 5000])
@pytest.mark.parametrize("field", ["network", "auto_mapping", "target_modules", "frozen", "new"])
def test_values_nested_deeply_are_refused(field: str, depth: int, saved: Path, tmp_path: Path) -> None:
    folder = edited(saved, tmp_path, **{field: "here"})
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"here"', "[" * depth + "]" * depth))
    for read in (peft.PeftConfig.from_pretrained, lambda path: peft.PeftModel.from_pretrained(opt(), path)):
        with pytest.raises(TnpeftError, match=r"levels deep|not an adapter configuration"):
            read(folder)


ABSURD: list[dict[str, Any]] = [
    {"scale": 1e308}, {"scale": -1e31}, {"scale": 1e-300}, {"peft_type": "NOTHING"}, {"peft_type": ["LORA"]},
    {"peft_type": "LORA"}, {"peft_type": None}, {"relative_step": 10**400},
    {"task_type": "SING"}, {"task_type": {}}, {"replicas": 2**40}, {"peft_version": 3},
]  # fmt: skip


@pytest.mark.parametrize("fields", ABSURD)
def test_absurd_values_are_refused_when_read(fields: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    with pytest.raises(TnpeftError, match=next(iter(fields)) if "task_type" not in fields else "Invalid task type"):
        peft.PeftConfig.from_pretrained(edited(saved, tmp_path, **fields))


@pytest.mark.parametrize("hub", [False, True])
def test_a_folder_without_a_configuration_is_named(hub: bool, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    held = (saved / "adapter_model.safetensors").read_bytes()
    (tmp_path / "sub" / "adapter_model.safetensors").write_bytes(held)
    where: Any = (tmp_path, {"subfolder": "sub"}) if hub else (tmp_path / "sub", {})
    model, plain = adapted("mixed"), opt()
    calls = {
        "from_pretrained": partial(peft.PeftModel.from_pretrained, plain),
        "load_adapter": partial(model.load_adapter, adapter_name="other"),
        "over": partial(model.load_adapter, adapter_name="default"),
        "configuration": peft.PeftConfig.from_pretrained,
    }
    for call in calls.values():
        with pytest.raises(AdapterFileError, match=r"no adapter_config.json in '.*sub'\ncopy the adapter"):
            call(str(where[0]), **where[1])
    with pytest.raises(AdapterFileError, match=r"no adapter_config.json in"):
        plain.load_adapter(str(where[0]), adapter_kwargs=where[1])
    assert [*model.peft_config] == ["default"]
    assert {name for name, _ in plain.named_parameters()} == BASE


@pytest.mark.filterwarnings("ignore:the update of")
def test_a_plan_that_takes_all_memory_is_refused_in_a_folder(tmp_path: Path) -> None:
    """Eleven factors, each sharing a bond of size 2 with every other one."""
    legs = [[f"b{min(a, b)}x{max(a, b)}" for b in range(11) if b != a] for a in range(11)]
    line = " ".join(f"K{k}[{' '.join(its + ['out'] * (k == 0) + ['inp'] * (k == 10))}]" for k, its in enumerate(legs))
    config = fresh(network=f"{line} -> out inp", ranks={bond: 2 for its in legs for bond in its})
    peft.get_peft_model(opt(), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="are allowed in a folder"):
        peft.PeftModel.from_pretrained(opt(), tmp_path)
