"""Histories of adapters in one model: whatever happens to them, in any order, the model is a dense one.

The dense model is kept by the test: base weights and factors of its own, einsum, and a plain forward.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import peft
import pytest
import torch
from adapter_models import VERA
from failing_steps import Planned, failing_at
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from oracles import dense, open_axes
from torch import Tensor, nn
from torch.func import functional_call
from transformers import OPTConfig, OPTForCausalLM

import tnpeft
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.networks import Factorization, NetworkError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
NAMES = ("one", "two", "three")
KINDS = {
    "line": {
        "network": "B[layer proj out r] A[layer proj r inp] -> layer proj out inp",
        "ranks": {"r": 2},
        "target_modules": ["q_proj", "k_proj", "v_proj"],  # that share an input
    },
    "shared": {
        "network": "U[out a] G[layer proj a b] V[inp b] -> layer proj out inp",
        "ranks": {"a": 3, "b": 2},
        "scale": 0.5,
        "target_modules": ["v_proj", "fc1"],
    },
    "frozen": {"network": VERA, "ranks": {"r": 4}, "target_modules": ["q_proj", "fc1"]},
    "magnitudes": {
        "network": "B[layer proj out r] A[r inp] -> layer proj out inp",
        "ranks": {"r": 2},
        "dora": True,
        "target_modules": ["q_proj", "v_proj"],
    },
}
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
BOUNDS = {torch.bfloat16: 0.1, torch.float32: 1e-4, torch.float64: 1e-9}
# Of gradients, by the norm of all of the adapter's; in bf16 rounding of the dense model's gradients comes on top.
GRADIENTS = {torch.bfloat16: 0.05, torch.float32: 1e-3, torch.float64: 1e-8}
NOISE = 2.0
IDS = torch.tensor([[2, 5, 3, 7, 11, 6]])


@cache
def _base() -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16, "vocab_size": 16, "num_hidden_layers": 2}
    more = {"max_position_embeddings": 8, "dropout": 0.0, "init_std": 0.3}
    config = OPTConfig(**sizes, **more, num_attention_heads=2, activation_function="gelu")  # rounding flips no unit
    return OPTForCausalLM(config).eval().double()


def config(kind: str, seed: int) -> tnpeft.TensorNetworkConfig:
    return tnpeft.TensorNetworkConfig(**KINDS[kind], seed=seed)


@cache
def factorization(kind: str) -> Factorization:
    return config(kind, 0).factorization


def path(layer: int, proj: str) -> str:
    return f"model.decoder.layers.{layer}.{proj if proj == 'fc1' else f'self_attn.{proj}'}"


@dataclass
class Dense:
    """An adapter as the test keeps it, in float64: its factors, stacked, and after ``|`` its magnitudes by linear."""

    kind: str
    seed: int
    tensors: dict[str, Tensor]
    frozen: dict[str, Tensor]  # as they were when drawn, which a file does not hold

    @property
    def factors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.tensors.items() if name[0] != "|"}

    def rounded(self, dtype: torch.dtype) -> Dense:
        return replace(self, tensors={name: value.to(dtype).double() for name, value in self.tensors.items()})

    def changes(self, weights: dict[str, Tensor], stack: Tensor | None = None) -> dict[str, Tensor]:
        """What the adapter adds to each base weight; ``stack`` is its dense update if that is known."""
        f = factorization(self.kind)
        stack = open_axes(f.network, self.factors) if stack is None else stack
        found = {}
        for layer in range(2):
            for k, proj in enumerate(KINDS[self.kind]["target_modules"]):
                name = path(layer, proj)
                delta, weight = f.scale * stack[layer, k], weights[f"{name}.weight"]
                if (magnitude := self.tensors.get(f"|{name}")) is not None:
                    length = (weight + delta).detach().norm(dim=1)
                    delta = (magnitude / length)[:, None] * (weight + delta) - weight
                found[f"{name}.weight"] = delta
        return found

    def numpy_changes(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same by numpy, unoptimised."""
        factors = {name: value.numpy() for name, value in self.factors.items()}
        stack = dense(factorization(self.kind).network, factors)
        return self.changes(weights, torch.from_numpy(np.ascontiguousarray(stack)))


@dataclass
class History:
    """A model, and all that the test knows of it."""

    folder: Path
    model: peft.PeftModel
    weights: dict[str, Tensor]
    dtype: torch.dtype = torch.float64
    least: torch.dtype = torch.float64  # the coarsest dtype since the last merge
    dense: dict[str, Dense] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)  # weights as they were before the merge
    trained: set[str] = field(default_factory=set)
    paused: set[str] | None = None  # trained before the adapters were switched off
    files: dict[str, Dense] = field(default_factory=dict)
    elders: list[tuple[peft.PeftModel, Tensor]] = field(default_factory=list)

    # ---- looking

    def own(self, adapter: str) -> dict[str, nn.Parameter]:
        """The Parameters of an adapter that the model holds."""
        return {
            name: p
            for name, p in self.model.named_parameters()
            if f".tnpeft_factors.{adapter}." in name or name.endswith(f".tnpeft_magnitude.{adapter}")
        }

    def held(self, adapter: str) -> dict[str, Tensor]:
        """The adapter's factors and magnitudes in the model."""
        magnitudes = {
            f"|{name.removeprefix('base_model.model.').partition('.tnpeft_')[0]}": p.detach()
            for name, p in self.own(adapter).items()
            if "tnpeft_magnitude" in name
        }
        found = tnpeft.factors(self.model, adapter) | magnitudes
        return {name: value.double().clone() for name, value in found.items()}

    def output(self, adapters: list[str], dtype: torch.dtype = torch.float64) -> Tensor:
        weights = dict(self.weights)
        for name in adapters:
            for at, change in self.dense[name].changes(self.weights).items():
                weights[at] = weights[at] + change
        weights = {name: value.to(dtype) for name, value in weights.items()}
        return functional_call(_base(), weights, (IDS,)).logits

    def close(self, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
        scale = 1e-300 + float(wanted.detach().abs().max())
        return bool((got.detach().double() - wanted.detach()).abs().max() <= BOUNDS[dtype] * scale)

    def serving(self) -> list[str]:
        return [] if self.paused is not None else self.merged or self.active

    def coarsest(self, adapters: list[str]) -> torch.dtype:
        least = self.least if self.merged else self.dtype
        return min(least, *(self.dtypes[name] for name in adapters), key=DTYPES.index) if adapters else least

    def check(self) -> None:
        model, tuner = self.model, self.model.base_model
        assert {*model.peft_config} == {*self.dense}
        assert model.active_adapters == tuner.active_adapters == self.active
        for name, p in model.named_parameters():
            owners = [adapter for adapter in self.dense if f".{adapter}." in f"{name}." and ".tnpeft_" in name]
            assert len(owners) == (".tnpeft_" in name), name
            assert p.requires_grad == (bool(owners) and owners[0] in self.trained), name
        for name, kept in self.dense.items():
            found = self.held(name)
            assert found.keys() == kept.tensors.keys()
            assert all(torch.equal(found[key], value) for key, value in kept.tensors.items()), name
            assert {p.dtype for p in self.own(name).values()} == {self.dtypes[name]}
        merged = dict(self.weights)
        for name in self.merged:
            for at, change in self.dense[name].numpy_changes(self.weights).items():
                merged[at] = merged[at] + change
        for name, module in tuner.model.named_modules():
            if isinstance(module, TensorNetworkLinear):
                weight, wanted = module.get_base_layer().weight, merged[f"{name}.weight"]
                assert weight.dtype == self.dtype
                exact = wanted is self.weights[f"{name}.weight"]
                assert torch.equal(weight.double(), wanted) if exact else self.close(weight, wanted, self.least), name
        serving = self.serving()
        with torch.no_grad():
            wanted = self.output(serving)
            for _ in range(2):  # what the first call keeps, the second uses
                assert self.close(model(IDS).logits, wanted, self.coarsest(serving))

    # ---- acting

    def unmerged(self) -> None:
        self.merged, self.kept = [], {}

    def stand(self, adapter: str, kept: Dense) -> None:
        """Take an adapter up that has been attached in the base weight's dtype, or in fp32 if that is narrower.

        PEFT sets the active adapters again when one is attached, and unmerges with a warning before.
        """
        self.unmerged()
        self.dtypes[adapter] = torch.promote_types(self.dtype, torch.float32)
        self.dense[adapter] = kept.rounded(self.dtypes[adapter])

    def add(self, adapter: str, kind: str, seed: int) -> None:
        if adapter in self.dense:
            with pytest.raises((NetworkError, ValueError), match="already"):
                self.model.add_adapter(adapter, config(kind, seed))
            return
        self.model.add_adapter(adapter, config(kind, seed))
        self.begin(adapter, kind, seed)

    def begin(self, adapter: str, kind: str, seed: int) -> None:
        """Give a new adapter values that show."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.own(adapter).values():
                p += 0.3 * torch.randn(p.shape, generator=generator).to(p.dtype)
        tensors = self.held(adapter)
        frozen = {name: tensors[name] for name in ("B", "A") if kind == "frozen"}
        self.stand(adapter, Dense(kind, seed, tensors, frozen))

    def step(self) -> None:
        """One step of gradient descent in both models."""
        serving = [] if self.merged else self.serving()
        held = self.dense
        leaves = {name: {k: v.clone().requires_grad_() for k, v in its.tensors.items()} for name, its in held.items()}
        self.dense = {name: replace(its, tensors=leaves[name]) for name, its in held.items()}
        loss = self.output(self.serving()).square().mean()
        every = [leaf for name in serving for leaf in leaves[name].values()]
        noise = dict.fromkeys(map(id, every), 0.0)
        if serving:
            if self.coarsest(serving) == torch.bfloat16:
                rounded = self.output(self.serving(), torch.bfloat16).double().square().mean()
                grads = (torch.autograd.grad(its, every, retain_graph=True) for its in (rounded, loss))
                noise = {id(leaf): float((a - b).norm()) for leaf, a, b in zip(every, *grads, strict=True)}
            loss.backward()
        self.dense = held
        self.model.train()
        got = self.model(IDS).logits.square().mean()
        assert self.close(got, loss, self.coarsest(self.serving()))
        if got.requires_grad:
            got.backward()
        for name in self.dense:
            own = self.own(name)
            if name not in serving or name not in self.trained:
                assert all(p.grad is None for p in own.values()), name
                continue
            before = self.held(name)
            with torch.no_grad():  # the gradients as they are stacked: read as if they were the factors
                values = {key: p.detach().clone() for key, p in own.items()}
                for p in own.values():
                    p.copy_(p.grad)
                grads = self.held(name)
                for key, p in own.items():
                    p.copy_(values[key] - 0.05 * p.grad)
                    p.grad = None
            total = torch.stack([leaf.grad.norm() for leaf in leaves[name].values()]).norm()
            for key, leaf in leaves[name].items():
                if key not in held[name].frozen:
                    bound = GRADIENTS[self.coarsest(serving)] * total + NOISE * noise[id(leaf)]
                    assert (grads[key] - leaf.grad).norm() <= bound, (name, key)
                else:
                    assert torch.equal(before[key], held[name].tensors[key])
            self.dense[name] = replace(held[name], tensors=self.held(name))
        self.model.eval()

    def switch(self, adapters: list[str]) -> None:
        adapters = [name for name in adapters if name in self.dense]
        if adapters:
            self.model.base_model.set_adapter(adapters)
            self.active, self.trained = adapters, {*adapters}
            self.unmerged()
            if self.paused is not None:
                self.paused = set()

    def merge(self, adapters: list[str] | None) -> None:
        if self.paused is not None:
            with pytest.raises(NetworkError, match="switched off"):
                self.model.merge_adapter(adapters)
            return
        if adapters is not None and any(name not in self.dense for name in adapters):
            with pytest.raises(NetworkError, match="unknown adapter"):
                self.model.merge_adapter(adapters)
            return
        self.model.merge_adapter(adapters)
        names = [name for name in (self.active if adapters is None else adapters) if name not in self.merged]
        if not self.merged:
            self.least = self.dtype
        self.least = min(self.least, self.dtype, *(self.dtypes[name] for name in names), key=DTYPES.index)
        self.merged += names
        for name in names:
            for at in self.dense[name].changes(self.weights):
                self.kept.setdefault(at, self.weights[at])

    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.unmerged()

    def disable(self) -> None:
        self.model.base_model.disable_adapter_layers()
        self.paused, self.trained = (self.paused or set()) | self.trained, set()
        self.unmerged()

    def enable(self) -> None:
        self.model.base_model.enable_adapter_layers()
        self.trained, self.paused = self.trained | (self.paused or set()), None

    def save(self, adapter: str) -> None:
        if adapter in self.dense:
            self.model.save_pretrained(str(self.folder), selected_adapters=[adapter])
            self.files[adapter] = self.dense[adapter]

    def load(self, file: str, adapter: str) -> None:
        if file not in self.files:
            return
        stored, there = self.files[file], self.dense.get(adapter)
        like = there is None or (there.kind, there.seed) == (stored.kind, stored.seed)
        if not like or adapter in self.merged:
            with pytest.raises(NetworkError):
                self.model.load_adapter(str(self.folder / file), adapter)
            return
        self.model.load_adapter(str(self.folder / file), adapter)
        frozen = stored.frozen if there is None else {k: there.tensors[k] for k in there.frozen}
        kept = replace(stored, tensors={**stored.tensors, **frozen})
        if there is None:
            self.stand(adapter, kept)
        else:
            self.dense[adapter] = kept.rounded(self.dtypes[adapter])
            self.dtypes[adapter] = torch.promote_types(self.dtypes[adapter], torch.float32)  # as PEFT has it

    def delete(self, adapter: str) -> None:
        if adapter not in self.dense or len(self.dense) == 1:
            return
        if adapter in self.merged:
            with pytest.raises(ValueError, match="merged"):
                self.model.delete_adapter(adapter)
            return
        self.model.delete_adapter(adapter)
        del self.dense[adapter], self.dtypes[adapter]
        self.trained -= {adapter}
        if adapter in self.active:
            self.active = [name for name in self.active if name != adapter] or [min(self.dense)]
            self.trained = {*self.active}
            if self.paused is not None:
                self.paused = set()
        elif self.paused is not None:
            self.paused -= {adapter}

    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.dtype, self.least = dtype, min(self.least, dtype, key=DTYPES.index)
        own = {**self.weights, **self.kept}  # what a merge keeps is cast once, when it comes back
        self.weights = {name: value.to(dtype).double() for name, value in own.items()}
        self.dense = {name: kept.rounded(dtype) for name, kept in self.dense.items()}
        self.dtypes = dict.fromkeys(self.dense, dtype)

    def copied(self) -> None:
        elder, self.model = self.model, copy.deepcopy(self.model)
        theirs, mine = ({p.data_ptr() for p in model.parameters()} for model in (elder, self.model))
        assert not theirs & mine
        with torch.no_grad():
            self.elders.append((elder, elder(IDS).logits))

    def fail(self, adapter: str, kind: str, seed: int, at: int) -> None:
        """An attachment, or the load of a file, that ends at some step within the package."""
        own, folder = config(kind, seed), str(self.folder / adapter)
        loads = at % 2 and adapter in self.files
        name = adapter if loads else next((name for name in NAMES if name not in self.dense), None)
        if name is None:
            return

        def act() -> None:
            if loads:
                self.model.load_adapter(folder, name)
            else:
                self.model.add_adapter(name, own)

        try:
            failed = failing_at(at, (Planned, MemoryError)[at % 3 == 0], act)
        except NetworkError:
            failed = True  # the load is refused before
        if not failed and not loads:
            self.begin(name, kind, seed)
        elif not failed:
            self.load(adapter, name)  # again: it is as if once


def actions() -> st.SearchStrategy[tuple[object, ...]]:
    name, kind, seed = st.sampled_from(NAMES), st.sampled_from([*KINDS]), st.integers(0, 1)
    some = st.lists(name, min_size=1, max_size=2, unique=True)
    return st.one_of(
        st.tuples(st.just("add"), name, kind, seed),
        st.tuples(st.just("step")),
        st.tuples(st.just("switch"), some),
        st.tuples(st.just("merge"), st.none() | some),
        st.tuples(st.sampled_from(["unmerge", "disable", "enable", "copied"])),
        st.tuples(st.just("save"), name),
        st.tuples(st.just("load"), name, name),
        st.tuples(st.just("delete"), name),
        st.tuples(st.just("cast"), st.sampled_from(DTYPES)),
        st.tuples(st.just("fail"), name, kind, seed, st.integers(1, 600)),
    )


def merged_in_turn(kind: str) -> list[tuple[object, ...]]:
    """Which the drawn histories hardly meet: a second merge beside a first, and what comes back."""
    acts = [("add", "two", kind, 1), ("switch", ["one", "two"]), ("merge", ["two"]), ("merge", ["one"])]
    return [*acts, ("save", "two"), ("unmerge",), ("merge", ["one"]), ("merge", None), ("unmerge",), ("step",)]


@example("magnitudes", merged_in_turn("shared"))
@example("line", merged_in_turn("magnitudes"))
@settings(max_examples=200, phases=(Phase.explicit, Phase.generate))  # a history shrinks for minutes
@given(first=st.sampled_from([*KINDS]), told=st.lists(actions(), min_size=4, max_size=12))
def test_a_model_is_the_dense_model_of_its_history(first: str, told: list[tuple[object, ...]]) -> None:
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = copy.deepcopy(_base())
        weights = {name: value.detach().clone() for name, value in base.named_parameters()}
        model = peft.get_peft_model(base, config(first, 0), adapter_name="one").eval()
        history = History(Path(folder), model, weights, active=["one"], trained={"one"})
        history.begin("one", first, 0)
        history.check()
        for act, *arguments in told:
            getattr(history, act)(*arguments)
            history.check()
        for elder, output in history.elders:
            with torch.no_grad():
                assert torch.equal(elder(IDS).logits, output)
