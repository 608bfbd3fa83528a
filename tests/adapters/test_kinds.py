"""Embeddings and convolutions: what they have beside the life of every kind of weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from watching import largest
from weight_kinds import CALLED as KINDS
from weight_kinds import attached, shake

import tnpeft
from tnpeft.adapters.sites.convolution import TensorNetworkConvolution
from tnpeft.networks import NetworkError

LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
SHARED = "U[out a] G[layer proj a b] V[b inp] -> layer proj out inp"
CP = "w[layer proj r] A[layer o1 r] B[o2 r] C[layer i1 r] D[i2 r] -> layer proj (o1 o2) (i1 i2)"
LINES: dict[str, dict[str, Any]] = {
    "lora": {"network": LORA, "ranks": {"r": 3}},
    "shared": {"network": SHARED, "ranks": {"a": 3, "b": 2}, "scale": 0.5},
    "cp": {"network": CP, "ranks": {"r": 5}, "unit_norm": ["A", "C"]},
}


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_rows(kind: str, line: str) -> None:
    base, model = attached(kind, **LINES[line])
    shake(model)
    x = KINDS[kind].example()[:0]
    y = model(x)
    assert y.shape == base(x).shape
    y.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_and_values_by_row(kind: str) -> None:
    x = torch.cat([KINDS[kind].example()] * 2)
    count = len(x) // 2
    _, model = attached(kind, network=LORA, ranks={"r": 2}, replicas=2)
    shake(model)
    found = model(x)
    for k in range(2):
        _, one = attached(kind, network=LORA, ranks={"r": 2})
        tnpeft.set_factors(one, tnpeft.replica(model, k))
        assert torch.allclose(one(x)[k * count :][:count], found[k * count :][:count], rtol=0, atol=1e-10)
    line = "B[layer proj scene out r] A[layer proj r inp] C[scene r] -> layer proj scene out inp"
    _, model = attached(kind, network=line, ranks={"r": 2}, unit_norm=["A"], stack={"scene": 3})
    shake(model)
    rows = [k % 3 for k in range(len(x))]
    tnpeft.select(model, scene=rows)
    found = model(x)
    for k, scene in enumerate(rows):
        tnpeft.select(model, scene=scene)
        assert torch.allclose(model(x[k : k + 1])[0], found[k], rtol=0, atol=1e-10)


def test_dropout_leaves_out_whole_tokens_and_doubles_others() -> None:
    base, model = attached("embedding", dropout=0.5, **LINES["lora"])
    shake(model)
    layer, plain, x = model.get_base_model().layers[0].embed, base.layers[0].embed, torch.arange(48)
    change, full = layer.train()(x) - plain(x), layer.eval()(x) - plain(x)
    left = (change == 0).all(-1)
    assert 0 < left.sum() < 48
    assert torch.allclose(change[~left], 2 * full[~left])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding"])
def test_dora_on_convolutions_is_pefts(kind: str) -> None:
    _, model = attached(kind, dora=True, **LINES["lora"])
    shake(model)
    x = KINDS[kind].example()
    wanted = model(x)
    for layer in (m for m in model.modules() if isinstance(m, TensorNetworkConvolution)):
        (item,) = layer.updates["default"]
        delta = item.program.delta(layer.operands("default", item), item.scale)
        weight = layer.get_base_layer().weight.flatten(1)
        new = weight + delta
        new = new * (weight.norm(dim=1) / new.norm(dim=1))[:, None]
        with torch.no_grad():
            layer.get_base_layer().weight.copy_(new.reshape(layer.get_base_layer().weight.shape))
    with model.disable_adapter():
        assert torch.allclose(model(x), wanted, rtol=0, atol=1e-10 * float(wanted.detach().abs().max()))
    _, model = attached(kind, dora=True, dropout=0.5, **LINES["lora"])
    assert torch.allclose(model.train()(x), model.eval()(x), rtol=0, atol=1e-10)  # the identity at the start


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d", "conv3d"])
def test_the_same_factors_in_pefts_lora_give_the_same_model(kind: str) -> None:
    base, model = attached(kind, network=LORA, ranks={"r": 3})
    shake(model)
    [target] = KINDS[kind].targets
    other = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=3, target_modules=[target])
    ).double()
    for ours, theirs in zip(model.get_base_model().layers, other.get_base_model().layers, strict=True):
        own = ours[target].tnpeft_factors["default"]
        with torch.no_grad():
            if kind == "embedding":
                theirs[target].lora_embedding_A["default"].copy_(own.get("A"))
                theirs[target].lora_embedding_B["default"].copy_(own.get("B"))
            else:
                weight = theirs[target].lora_A["default"].weight
                weight.copy_(own.get("A").reshape(weight.shape))
                weight = theirs[target].lora_B["default"].weight
                weight.copy_(own.get("B").reshape(weight.shape))
    x = KINDS[kind].example()
    assert torch.allclose(model(x), other(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "family"),
    [("embedding", f) for f in ("lora", "cp", "tensor_train", "tucker")] + [("conv2d", "lora"), ("conv2d", "tucker")],
)
def test_the_dense_update_is_never_formed(kind: str, family: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(4096, 64) if kind == "embedding" else nn.Conv2d(64, 64, 3))
    x = torch.arange(20) if kind == "embedding" else torch.randn(1, 64, 4, 4)
    f = tnpeft.families.get(family)(2)
    model = peft.get_peft_model(base, tnpeft.TensorNetworkConfig(network=f, target_modules=["0"]))
    elements = largest(lambda: model(x).square().mean().backward())
    assert 0 < elements < (4096 * 64 / 8 if kind == "embedding" else 64 * 64 * 9 / 2)


class Scaled(nn.Embedding):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def test_an_embedding_that_scales_its_rows() -> None:
    model = peft.get_peft_model(
        nn.Sequential(Scaled(8, 4)), tnpeft.TensorNetworkConfig(**LINES["lora"], target_modules=["0"])
    )
    shake(model)
    found = model(torch.arange(8))
    model.merge_adapter()
    assert torch.allclose(model(torch.arange(8)), found, atol=1e-5)


def test_a_line_names_the_taps_of_the_kernel() -> None:
    base = nn.Sequential(nn.Conv2d(8, 16, (3, 2), groups=2), nn.Conv1d(4, 16, 5), nn.Linear(12, 16))
    line = "U[layer proj out a] G[layer proj a b c d] I[layer proj inp b] H[layer proj kh c] W[layer proj kw d] "
    config = tnpeft.TensorNetworkConfig(
        network=line + "-> layer proj out (inp kh kw)",
        ranks={"a": 4, "b": 2, "c": 2, "d": 2},
        target_modules=["0", "1", "2"],
    )
    with pytest.warns(UserWarning, match="is all that it can carry"):
        model = peft.get_peft_model(base, config)
    shapes = {row.site: row.factors for row in tnpeft.explain(model).rows}
    assert [shapes[k]["I"][0] for k in "012"] == [4, 4, 12]
    assert [shapes[k]["H"][0] for k in "012"] == [3, 1, 1]
    assert [shapes[k]["W"][0] for k in "012"] == [2, 5, 1]
    edge = tnpeft.families.lora_edge((2, 2, 2))
    model = peft.get_peft_model(
        nn.Sequential(nn.Conv2d(8, 16, 3)), tnpeft.TensorNetworkConfig(network=edge, target_modules=["0"])
    )
    assert trained(model) == 16 * 2
    assert tnpeft.explain(model).rows[0].factors["G2"] == (2, 8, 2)
    liera = "^W[out inp kh kw] B[out r] A[r inp kh kw] -> out (inp kh kw)"
    config = tnpeft.TensorNetworkConfig(network=liera, ranks={"r": 2}, init={"W": "base"}, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(8, 16, 3)), config)
    assert trained(model) == 2 * (16 + 72)
    assert "formed" in tnpeft.explain(model).rows[0].reason


class Picture(nn.Module):
    """Convolutions, an embedding and attention, as in a model of pictures and words."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.patch_embeddings = nn.Conv2d(3, 16, 3, padding=1), nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(16, 32, 2, stride=2)
        self.embed_tokens, self.attn = nn.Embedding(50, 32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        patches = self.patch_embeddings.projection(self.conv1(x)).flatten(2).mT
        tokens = torch.cat([patches, self.embed_tokens(ids)], 1)
        return self.attn(tokens, tokens, tokens)[0]


def test_one_adapter_of_every_kind_of_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, batch = Picture().double(), (torch.randn(2, 3, 8, 8).double(), torch.randint(0, 50, (2, 5)))

    def same(one: Tensor, other: Tensor) -> bool:
        return torch.allclose(one, other, rtol=0, atol=1e-12)

    targets = ["conv1", "patch_embeddings.projection", "embed_tokens", "in_proj"]
    config = tnpeft.TensorNetworkConfig(network=tnpeft.families.tucker(4), target_modules=targets)
    model = peft.get_peft_model(copy.deepcopy(base), config).double()
    assert same(model(*batch), base(*batch))
    assert len({row.site for row in tnpeft.explain(model).rows}) == 6
    shake(model, 0.2)
    found = model(*batch).detach()
    assert not torch.allclose(found, base(*batch), atol=1e-3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert same(again(*batch), found)
    assert len(tnpeft.coordinate_check(model, batch).rows) == 18
    with pytest.raises(NetworkError, match="conv1 is not a linear, and only updates of linears are exported"):
        tnpeft.export_lora(model, tmp_path / "lora")
    assert same(model.merge_and_unload()(*batch), found)
