"""Merging: the weight that the forward reads is the one that changes, every bit comes back, in every order."""

from pathlib import Path

import peft
import pytest
import torch
from adapter_models import llama, opt, shake
from failing_steps import check_every_step
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from torch.nn.utils import parametrizations, prune

import tnpeft
from tnpeft.networks import NetworkError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")
NAMES = ("one", "two")


class Tied(nn.Module):
    """Two linears and an embedding with one Parameter, and a linear of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.last = nn.Embedding(8, 8), nn.Linear(8, 8)
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.first.weight = self.second.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(self.embed(ids)).tanh()).tanh())


def adapted(model: nn.Module, targets: list[str], **options: object) -> PeftModel:
    for k, name in enumerate(NAMES):
        config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=targets, seed=k, **options)
        if k:
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
        shake(model, k, name)
    return model.eval()


ACTIONS = st.sampled_from(["one", "two", "both", "unmerge", "bfloat16", "float32", "float64"])


@settings(max_examples=40, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=1, max_size=8))
def test_every_order_of_merging_and_casting(actions: list[str]) -> None:
    """A twin is cast in the same way and never merged; tied Parameters stay one Parameter, adapted apart."""
    model, twin = (adapted(Tied(), ["first", "second", "last"], exclude_modules=["embed"]) for _ in range(2))
    ids = torch.arange(8)[None]
    merged: list[str] = []
    dtype = least = torch.float32
    for action in actions:
        if action in ("bfloat16", "float32", "float64"):
            dtype = getattr(torch, action)
            least = min(least, dtype, key=lambda each: each.itemsize)
            model.to(dtype), twin.to(dtype)
        elif action == "unmerge":
            model.unmerge_adapter()
            merged = []
        else:
            names = [*NAMES] if action == "both" else [action]
            model.merge_adapter(names)
            merged += [name for name in names if name not in merged]
        twin.base_model.set_adapter(merged or ["one"])
        wanted = twin(ids)
        got = model(ids)
        bound = {torch.bfloat16: 0.1, torch.float32: 1e-5}[min(least, torch.float32, key=lambda each: each.itemsize)]
        assert got.dtype == dtype
        if merged:
            assert (got - wanted).abs().max() < bound * (1 + wanted.abs().max())
    if merged:
        model.unmerge_adapter()
    base, other = model.get_base_model(), twin.get_base_model()
    assert base.first.base_layer.weight is base.second.base_layer.weight is base.embed.weight
    for name, array in base.named_parameters():
        if "base_layer" in name or "embed" in name:
            assert array.dtype == dtype
            if least == torch.float32:
                assert torch.equal(array, other.get_parameter(name)), name


def test_a_tied_linear_is_merged_alone_if_the_others_are_excluded() -> None:
    model, ids = adapted(Tied(), ["first"], exclude_modules=["embed", "second"]), torch.arange(8)[None]
    wanted = model(ids)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(ids), wanted, atol=1e-5)
    assert merged.second.weight is merged.embed.weight
    assert merged.first.weight is not merged.embed.weight


def computed(kind: str) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    if kind == "pruned":
        prune.l1_unstructured(plain["b"], "weight", 0.5)
    elif kind == "weight_norm":
        nn.utils.weight_norm(plain["b"])
    else:
        getattr(parametrizations, kind.removeprefix("parametrized_"))(plain["b"])
    return plain


@pytest.mark.parametrize(
    "kind",
    ["pruned", "weight_norm", "parametrized_weight_norm", "parametrized_spectral_norm", "parametrized_orthogonal"],
)
def test_a_computed_weight_takes_no_merge(kind: str) -> None:
    model = adapted(computed(kind), ["a", "b"])
    before = model.get_base_model()["a"].base_layer.weight.clone()
    for act in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NetworkError, match="b cannot be merged"):
            act()
        assert torch.equal(model.get_base_model()["a"].base_layer.weight, before)
        assert not model.get_model_status().merged_adapters


def test_a_merge_that_fails_leaves_nothing_merged() -> None:
    targets = ["q_proj", "fc1"]
    check_every_step(lambda: adapted(opt(), targets), lambda model: model.merge_adapter(["two"]), 20)

    def one_merged() -> PeftModel:
        model = adapted(opt(), targets)
        model.merge_adapter(["one"])
        return model

    check_every_step(one_merged, lambda model: model.merge_adapter(["two"]), 20)


def test_an_unknown_adapter_cannot_be_merged() -> None:
    model = adapted(Tied(), ["first"])
    for act in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NetworkError, match="unknown adapter 'nobody'"):
            act(adapter_names=["one", "nobody"])
    assert not model.get_model_status().merged_adapters


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_saved_while_merged(target: str, tmp_path: Path) -> None:
    model, ids = adapted(llama(), [target]), torch.arange(8)[None]
    wanted = model(input_ids=ids).logits
    model.merge_adapter(["one"])
    held = model(input_ids=ids).logits
    model.save_pretrained(str(tmp_path))
    assert torch.equal(model(input_ids=ids).logits, held)
    again = PeftModel.from_pretrained(llama(), str(tmp_path / "one")).eval()
    assert torch.allclose(again(input_ids=ids).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_rows_of_zeros_under_learned_magnitudes(train: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(4, 8)
    with torch.no_grad():
        model[0].weight[2:4].zero_()
    wanted = model(x)
    config = tnpeft.TensorNetworkConfig(network="lora", target_modules=["0"], dora=True, dropout=0.5 * train)
    model = peft.get_peft_model(model, config).train(train)
    if not train:
        assert torch.equal(model(x), wanted)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        model(x).pow(2).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
    wanted = model.eval()(x)
    model.merge_adapter()
    assert torch.allclose(model(x), wanted, atol=1e-5)


def test_transformers_writes_a_merged_embedding_as_it_was() -> None:
    model = opt()
    model.add_adapter(tnpeft.TensorNetworkConfig(network="vera", target_modules=["embed_tokens"]), "one")
    layer, before = model.get_input_embeddings(), model.get_adapter_state_dict("one")
    tnpeft.set_factors(model, {"b": torch.ones_like(tnpeft.factors(model, "one")["b"])}, "one")
    layer.merge()
    merged = layer.get_base_layer().weight.clone()
    [name] = [name for name in before if name.endswith("embed_tokens.base_layer.weight")]
    written = model.get_adapter_state_dict("one")[name]
    assert torch.equal(written, before[name])
    assert not torch.equal(written, merged)
    assert torch.equal(layer.get_base_layer().weight, merged)
