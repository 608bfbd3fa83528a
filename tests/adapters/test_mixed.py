"""Mixed batches: adapters of one network run as one contraction, each row with its own adapter."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from adapter_models import NETWORKS, adapted, config, opt, row_by_row, shake
from transformers import GenerationConfig

import tnpeft
from tnpeft.adapters.layer.linear import TensorNetworkLinear
from tnpeft.adapters.layer.mixed_batch import block_rows, group_by_network
from tnpeft.networks import NetworkError

NAMES = ["default", "second", "__base__", "third", "second", "other", "second", "default"]


def family(key: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Three adapters of one network and one of another."""
    model = adapted(key, opt().to(dtype), **changes)
    for seed, name in enumerate(("second", "third"), start=1):
        model.add_adapter(name, config(key, seed=seed, **changes))
    model.add_adapter("other", config("lora", ranks={"r": 2}, target_modules=["q_proj", "k_proj"]))
    model = model.to(dtype).eval()
    for seed, name in enumerate(("default", "second", "third", "other")):
        shake(model, seed, name)
    return model


def apart(model: Any, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    return row_by_row(model, names, lambda row: model(input_ids=ids[row : row + 1]).logits)


def check(model: Any, ids: torch.Tensor, wanted: torch.Tensor, size: float = 1e-12, names: list[str] = NAMES) -> None:
    """The rows of a mixed batch are those of each alone."""
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=names).logits
    assert float((found.double() - wanted.double()).abs().max()) <= size * float(wanted.abs().max())


def tokens(rows: int, length: int = 7) -> torch.Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("key", sorted(NETWORKS))
def test_every_row_meets_its_own_adapter(key: str) -> None:
    model = family(key)
    ids = tokens(len(NAMES))
    wanted = apart(model, ids, NAMES)
    layers = [m for m in model.modules() if isinstance(m, TensorNetworkLinear)]
    x, adapters = torch.ones(1, dtype=torch.float64), ("default", "second", "third", "other")
    grouped = [group_by_network(layer, [name for name in adapters if name in layer.updates], x) for layer in layers]
    assert any(["default", "second", "third"] in lot for lot in grouped)
    for _ in range(2):  # the second time with what the first has kept
        check(model, ids, wanted)
    shake(model, 9, "third")
    again = apart(model, ids, NAMES)
    assert not torch.equal(again[3], wanted[3])
    check(model, ids, again)


@torch.no_grad()
def test_of_groups_that_come_and_go_the_last_is_kept() -> None:
    model = family("lora")
    linears = (m for m in model.modules() if isinstance(m, TensorNetworkLinear) and "second" in m.updates)
    (item,) = next(linears).updates["default"]
    for names in (["default", "second"], ["default", "third"], ["default", "second"]):
        model(input_ids=tokens(2), adapter_names=names)
        assert len(item.kept) == 1


@pytest.mark.parametrize("key", sorted(NETWORKS))
def test_gradients_of_a_mixed_batch_are_those_of_its_rows(key: str) -> None:
    """In blocks of one, two and three rows, so that two of them are padded."""
    model = family(key)
    embedded = torch.randn(len(NAMES), 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(len(NAMES), 7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dtype.is_floating_point)

    def gradients(names: list[str], rows: slice) -> list[torch.Tensor]:
        given = embedded[rows].clone().requires_grad_()
        found = model(inputs_embeds=given, adapter_names=names).logits
        (found * weights[rows]).sum().backward()
        factors = [p for name, p in sorted(model.named_parameters()) if "tnpeft" in name]
        got = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in factors]
        model.zero_grad()
        assert given.grad is not None
        return [given.grad, *got]

    inputs, *together = gradients(NAMES, slice(None))
    single = [gradients([name], slice(row, row + 1)) for row, name in enumerate(NAMES)]
    wanted = [sum(parts) for parts in zip(*(parts for _, *parts in single), strict=True)]
    for ours, theirs in zip([inputs, *together], [torch.cat([x for x, *_ in single]), *wanted], strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-12 * float(torch.as_tensor(theirs).abs().max())
    assert any(t.any() for t in together)


@pytest.mark.parametrize("key", ["lora", "mixed"])
@pytest.mark.parametrize("targets", [["fc1", "fc2"], ["q_proj", "fc1", "out_proj"]])
def test_tokens_that_the_model_lays_out_as_rows(key: str, targets: list[str]) -> None:
    """OPT's feed-forward linears see no batch, but all its tokens one after the other; whole modules do, too."""
    model = family(key, target_modules=targets, modules_to_save=["fc2"] if "fc2" not in targets else None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.second" in name:
                parameter.add_(0.1)
    seen = []
    fc1 = next(m for name, m in model.named_modules() if name.endswith("fc1"))
    fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    ids = tokens(len(NAMES))
    wanted = apart(model, ids, NAMES)
    assert not torch.equal(wanted[0], wanted[1])
    seen.clear()
    for active in ("default", "other"):
        model.set_adapter(active)
        check(model, ids, wanted)
    assert seen == [(ids.numel(), 32)] * 2


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}])
@pytest.mark.parametrize("as_config", [True, False])
def test_generation_with_several_rows_for_one(options: dict[str, int], as_config: bool) -> None:
    model = family("lora", target_modules=["v_proj", "fc1", "fc2"])
    ids, names = tokens(4), ["second", "default", "third", "__base__"]
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    given = {"generation_config": GenerationConfig(**options, **fixed)} if as_config else {**options, **fixed}
    mixed = model.generate(input_ids=ids, adapter_names=names, **given)
    alone = row_by_row(model, names, lambda row: model.generate(input_ids=ids[row : row + 1], **given))
    assert torch.equal(mixed, alone)
    assert len({tuple(row[7:].tolist()) for row in mixed}) > 1


def test_other_rows_than_the_batch_s_are_refused() -> None:
    model = family("lora", target_modules=["fc1"])
    for names in (["default"], ["default"] * 14, [], ["default"] * 3):
        said = f"adapter_names has {len(names)} entries" if names else "adapter_names is empty"
        with pytest.raises(NetworkError, match=said), torch.no_grad():
            model(input_ids=tokens(2), adapter_names=names)

    class Experts(torch.nn.Module):
        """Half of all tokens go to one linear, the other half to another."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.left, self.right = (torch.nn.Linear(8, 8) for _ in "abc")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(x).flatten(0, 1)
            return torch.cat([self.left(x[::2]), self.right(x[1::2])])

    experts = peft.get_peft_model(Experts(), config("lora", target_modules=["left", "right"])).eval()
    with pytest.raises(NetworkError, match="2 entries for 4 rows"):
        experts(torch.ones(2, 4, 8), adapter_names=["default", "__base__"])


def test_other_dtypes_and_magnitudes() -> None:
    model = family("lora", torch.float32, dora=True)
    ids = tokens(len(NAMES))
    check(model, ids, apart(model, ids, NAMES), 1e-5)
    layer = next(m for m in model.modules() if isinstance(m, TensorNetworkLinear) and "second" in m.updates)
    own = group_by_network(layer, ["default", "second", "third"], torch.ones(1))
    assert all(len(lot) == 1 for lot in own)  # a magnitude each: one by one
    half = adapted("mixed", opt().to(torch.bfloat16))  # factors stay in fp32
    half.add_adapter("second", config("mixed", seed=1))
    half.eval()
    shake(half)
    shake(half, 1, "second")
    names = ["second", "default", "second"]
    check(half, tokens(3), apart(half, tokens(3), names), 2**-6, names)


def test_other_numbers_are_no_lot() -> None:
    model = adapted("lora")
    for name, changes in {"scaled": {"scale": 2.0}, "wide": {"ranks": {"r": 4}}, "twin": {"seed": 5}}.items():
        model.add_adapter(name, config("lora", **changes))
    layer = next(m for m in model.modules() if isinstance(m, TensorNetworkLinear))
    found = group_by_network(layer, ["default", "scaled", "wide", "twin"], torch.ones(1))
    assert found == [["default", "twin"], ["scaled"], ["wide"]]
    assert block_rows(["twin", "default"], ["default", "default", "twin"]) == ([2, 2, 0, 1], [0, 2, 3])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {}])
@pytest.mark.parametrize("where", ["call", "model"])
def test_beams_of_an_encoder_and_a_decoder(where: str, options: dict[str, int]) -> None:
    """The encoder runs on the batch, the decoder on its beams; beams may be the model's own setting."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    names = ["one", "two", "__base__"]
    for k, name in enumerate(names[:2]):
        config = tnpeft.TensorNetworkConfig(network="lora", target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
        model = model if k else peft.get_peft_model(model, config, adapter_name=name)
        if k:
            model.add_adapter(name, config)
        tnpeft.set_factors(model, {n: torch.randn_like(v) for n, v in tnpeft.factors(model, name).items()}, name)
    model.eval()
    ids, length = torch.arange(36).reshape(3, 12), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    given = options if where == "call" else {}
    if where == "model":
        model.get_base_model().generation_config.update(**options)
    alone = row_by_row(model, names, lambda k: model.generate(input_ids=ids[k : k + 1], **given, **length))
    assert torch.equal(model.generate(input_ids=ids, adapter_names=names, **given, **length), alone)
