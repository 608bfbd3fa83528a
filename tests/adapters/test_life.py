"""A tuner's life on every kind of weight: saved, loaded, switched, added up, merged, copied, recomputed, compiled."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import NETWORKS
from failing_steps import fingerprint
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from weight_kinds import ALL, BY_EXPERT, EXPERTS, GROUPED, KINDS, RAW, attached, shake

import tnpeft
from tnpeft.adapters.state import bank_of
from tnpeft.networks import AdapterFileError, NetworkError

LINES: dict[str, dict[str, Any]] = {name: NETWORKS[name] for name in ("lora", "mixed", "cp")}
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "lora": {"network": tnpeft.families.shared_outer_lora(rank=2)},
    "mixed": {
        "network": "G1[proj out a] G2[layer a b] G3[expert b c] G4[c inp] -> layer proj expert out inp",
        "ranks": {"a": 2, "b": 2, "c": 2},
        "scale": 0.5,
    },
    "cp": {"network": tnpeft.families.expert_cp(3)},
    "tera": {"network": tnpeft.families.tera()},
}
CASES = [(kind, line) for kind in KINDS for line in LINES] + [("opt", "shared"), ("opt", "vera")]
CASES += [(kind, "tera") for kind in EXPERTS]
# A second adapter of fewer targets, where a kind has parts.
FEWER = {**dict.fromkeys(EXPERTS, "experts_down_proj"), "attention apart": "q_proj_weight", "list of experts": "w2"}


def config(kind: str, line: str, **options: Any) -> tnpeft.TensorNetworkConfig:
    its = ALL[kind]
    network = (OF_EXPERTS if kind in BY_EXPERT else NETWORKS)[line]
    own = {"target_modules": [*its.targets], "axes": dict(its.axes)}
    return tnpeft.TensorNetworkConfig(**{**network, **own, **options})


def adapted(kind: str, line: str, **options: Any) -> tuple[nn.Module, Any]:
    """The base model, and an adapted copy as it starts."""
    return attached(kind, **(OF_EXPERTS if kind in BY_EXPERT else NETWORKS)[line], **options)


def moved(model: nn.Module, kind: str) -> Any:
    shake(model, ALL[kind].spread)
    return model


def example(kind: str) -> Tensor:
    torch.manual_seed(1)
    return ALL[kind].example()


def output(kind: str, model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        return ALL[kind].output(model, example(kind), **more)


def near(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


def weights(model: Any) -> dict[str, Tensor]:
    """The base model's Parameters by their names there."""
    held = model.get_base_model().named_parameters()
    return {name.replace(".base_layer", ""): p for name, p in held if "tnpeft" not in name}


def trainable(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """The factors that are neither frozen nor constant."""
    net = model.peft_config[adapter].factorization.network
    held = tnpeft.factors(model, adapter)
    return {name: v for name, v in held.items() if net.factor(name.partition("#")[0]).kind == "trainable"}


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("kind", "line"), CASES)
def test_saved_loaded_set_and_counted(kind: str, line: str, tmp_path: Path) -> None:
    base, model = adapted(kind, line)
    wanted = output(kind, moved(model, kind))
    model.save_pretrained(tmp_path / "one")
    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert trained(model) == bank_of(model).layouts["default"].count() == sum(v.numel() for v in stored.values())
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one", adapter_name="other").eval()
    assert torch.equal(output(kind, again), wanted)
    again.save_pretrained(tmp_path / "two")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / "other" / file).read_bytes()
    again.load_adapter(tmp_path / "one", "third")
    again.set_adapter("third")
    assert torch.equal(output(kind, again), wanted)
    factors = trainable(again, "third")
    tnpeft.set_factors(again, {name: 2 * value for name, value in factors.items()}, "third")
    assert not near(output(kind, again), wanted)
    tnpeft.set_factors(again, factors, "third")
    assert torch.equal(output(kind, again), wanted)
    name, value = next(iter(factors.items()))
    for change, said in (({"Z": torch.zeros(1)}, "no factor"), ({name: value[None]}, "shape")):
        with pytest.raises(NetworkError, match=said):
            tnpeft.set_factors(again, change, "third")
    explained = tnpeft.explain(model)
    assert {row.adapter for row in explained.rows} == {"default"}
    assert explained.unmatched == {"default": ()}
    groups = tnpeft.parameter_groups(model, relative_step=1e-2)
    assert sum(p.numel() for group in groups for p in group["params"]) == trained(model)
    bad = {name: value[..., :-1].contiguous() for name, value in stored.items()}
    save_file(bad, tmp_path / "one" / "adapter_model.safetensors")
    names = [name for name, _ in base.named_modules()]
    plain = copy.deepcopy(base)
    with pytest.raises(AdapterFileError, match="is "):
        peft.PeftModel.from_pretrained(plain, tmp_path / "one")
    assert [name for name, _ in plain.named_modules()] == names


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize(("kind", "line"), [(kind, "lora") for kind in KINDS] + [("opt", "mixed"), ("opt", "vera")])
def test_switched_added_up_merged_deleted_copied_and_unloaded(kind: str, line: str) -> None:
    base, model = adapted(kind, line)
    plain = output(kind, base)
    outputs = {"default": output(kind, moved(model, kind))}
    names = [name for name, _ in model.named_modules()]
    targets = [FEWER[kind]] if kind in FEWER else [*ALL[kind].targets]
    model.add_adapter("second", config(kind, "mixed", target_modules=targets))
    model.double()
    assert torch.equal(output(kind, model), outputs["default"])
    model.set_adapter("second")
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
    assert near(output(kind, model), plain)
    outputs["second"] = output(kind, moved(model, kind))
    model.base_model.set_adapter(["default", "second"])
    both = output(kind, model)
    assert not any(near(both, one) for one in outputs.values())
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.double().set_adapter("sum")
    assert near(output(kind, model), both)
    model.delete_adapter("sum")
    model.base_model.set_adapter(["default", "second"])
    for order in (["default", "second"], ["second", "default"]):
        for name in order:
            model.merge_adapter([name])
        assert near(output(kind, model), both)
        model.unmerge_adapter()
        assert all(torch.equal(weights(model)[name], value) for name, value in base.named_parameters())
    assert torch.equal(output(kind, model), both)
    for merged in (False, True):
        if merged:
            model.merge_adapter(safe_merge=True)
            assert near(output(kind, model), both)
        with model.disable_adapter():  # which unmerges
            assert (near if kind in RAW else torch.equal)(output(kind, model), plain)
    model.delete_adapter("second")
    assert [name for name, _ in model.named_modules()] == names
    assert not [name for name, _ in [*model.named_parameters(), *model.named_buffers()] if "second" in name]
    assert not any(p.requires_grad for p in weights(model).values())
    assert torch.equal(output(kind, model), outputs["default"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len({p.data_ptr() for p in twin.parameters()}) == len({p.data_ptr() for p in model.parameters()})
        assert torch.equal(output(kind, twin), outputs["default"])
        assert all(m.bank is bank_of(twin) for m in twin.modules() if hasattr(m, "updates") and hasattr(m, "bank"))
        tnpeft.set_factors(twin, {name: 2 * value for name, value in trainable(twin).items()})
        assert not near(output(kind, twin), outputs["default"])
        assert torch.equal(output(kind, model), outputs["default"])
    copied = copy.deepcopy(model)
    copied.merge_adapter()
    merged = copy.deepcopy(model).merge_and_unload()
    assert near(output(kind, merged), outputs["default"])
    for unloaded in (merged, copied.unload(), model.unload()):
        assert [(n, type(m)) for n, m in unloaded.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
        assert [name for name, _ in unloaded.named_parameters()] == [name for name, _ in base.named_parameters()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())
        assert not any(isinstance(m, BaseTunerLayer) for m in unloaded.modules())
        assert unloaded is merged or (near if kind in RAW else torch.equal)(output(kind, unloaded), plain)


@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_safe_merge_of_what_is_not_finite_changes_nothing(kind: str, act: str) -> None:
    _, model = adapted(kind, "lora")
    last = [p for p in moved(model, kind).parameters() if p.requires_grad][-1]
    with torch.no_grad():
        last.view(-1)[0] = float("inf")
    before = fingerprint(model)
    with pytest.raises(NetworkError, match="not a number"):
        getattr(model, act)(safe_merge=True)
    assert fingerprint(model) == before


ONCE = {  # where one weight serves all rows of a call
    **dict.fromkeys(RAW, "once for all rows of a batch"),
    "list of experts": "is given the tokens of one expert, not the rows of a batch",
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_have_adapters_of_their_own(kind: str) -> None:
    base, model = adapted(kind, "lora")
    model.add_adapter("second", config(kind, "cp"))
    moved(model.double().eval(), kind)
    names = ["second", "default", "__base__"][: len(example(kind))]
    if kind in ONCE:
        with pytest.raises(NetworkError, match=ONCE[kind]):
            output(kind, model, adapter_names=names)
        return
    found = output(kind, model, adapter_names=names)
    for k, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        assert near(found[k], output(kind, base if name == "__base__" else model)[k])
    for wrong, said in (([*names, "default"], "adapter_names"), (["third", *names[1:]], "'third'\nthe adapters")):
        with pytest.raises(NetworkError, match=said):
            output(kind, model, adapter_names=wrong)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in RAW])
def test_dropout_acts_in_training_alone(kind: str) -> None:
    _, model = adapted(kind, "lora", dropout=0.5)
    wanted = output(kind, moved(model, kind))
    x = example(kind)
    for module in model.modules():  # a backbone has dropout of its own
        module.training = hasattr(module, "updates")
    assert not torch.equal(*(ALL[kind].output(model, x).detach() for _ in range(2)))
    assert torch.equal(output(kind, model.eval()), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS | GROUPED)
def test_recomputed_activations_give_the_same_gradients(kind: str, reentrant: bool) -> None:
    _, model = adapted(kind, "cp")
    moved(model, kind)
    x, start = example(kind), torch.ones(1, dtype=torch.float64, requires_grad=True)

    def run(y: Tensor) -> Tensor:
        return ALL[kind].output(model, x) * y

    def gradients(found: Tensor) -> list[Tensor]:
        model.zero_grad()
        found.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    again = gradients(checkpoint(run, start, use_reentrant=reentrant))
    for one, other in zip(gradients(run(start)), again, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


COMPILED = {"embedding": LINES, "conv2d": ["lora"], "conv2d strided": ["mixed", "cp"], "attention": ["lora"]}


@pytest.mark.parametrize(("kind", "line"), [(k, line) for k, lines in COMPILED.items() for line in lines])
def test_compiled_in_one_graph(kind: str, line: str) -> None:
    _, model = adapted(kind, line)
    moved(model.train(), kind)
    x = example(kind)
    torch._dynamo.reset()  # its limit of recompilations counts all models
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(found, model(x), rtol=0, atol=1e-10)
    found.square().mean().backward()
