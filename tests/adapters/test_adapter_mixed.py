"""Mixed batches: adapters of one network run as one contraction, each row with its own adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import NETWORKS, adapted, config, opt, shake

from tnpeft.adapters.layer import TensorNetworkLinear
from tnpeft.adapters.mixed import in_blocks, lots

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


def row_by_row(model: Any, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    found = []
    for row, name in zip(ids, names, strict=True):
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    found.append(model(input_ids=row[None]).logits)
            else:
                model.set_adapter(name)
                found.append(model(input_ids=row[None]).logits)
    return torch.cat(found)


def tokens(rows: int, length: int = 7) -> torch.Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("key", sorted(NETWORKS))
def test_every_row_meets_its_own_adapter(key: str) -> None:
    model = family(key)
    ids = tokens(len(NAMES))
    wanted = row_by_row(model, ids, NAMES)
    layers = [m for m in model.modules() if isinstance(m, TensorNetworkLinear)]
    grouped = {name: lots(m, [n for n in ("default", "second", "third", "other") if n in m.updates]) for name, m in
               model.named_modules() if isinstance(m, TensorNetworkLinear)}  # fmt: skip
    assert any(["default", "second", "third"] in lot for lot in grouped.values())
    assert len(layers) == len(grouped)
    for _ in range(2):  # the second time with what the first has kept
        with torch.no_grad():
            found = model(input_ids=ids, adapter_names=NAMES).logits
        assert float((found - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
    shake(model, 9, "third")
    again = row_by_row(model, ids, NAMES)
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=NAMES).logits
    assert not torch.equal(again[3], wanted[3])
    assert float((found - again).abs().max()) <= 1e-12 * float(again.abs().max())


def test_other_dtypes_and_magnitudes() -> None:
    model = family("lora", torch.float32, dora=True)
    ids = tokens(len(NAMES))
    wanted = row_by_row(model, ids, NAMES)
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=NAMES).logits
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    layer = next(m for m in model.modules() if isinstance(m, TensorNetworkLinear) and "second" in m.updates)
    assert all(len(lot) == 1 for lot in lots(layer, ["default", "second", "third"]))  # a magnitude each: one by one
    half = adapted("mixed", opt().to(torch.bfloat16))  # factors stay in fp32
    half.add_adapter("second", config("mixed", seed=1))
    half.eval()
    shake(half)
    shake(half, 1, "second")
    names = ["second", "default", "second"]
    wanted = row_by_row(half, tokens(3), names).float()
    with torch.no_grad():
        found = half(input_ids=tokens(3), adapter_names=names).logits.float()
    assert float((found - wanted).abs().max()) <= 2**-6 * float(wanted.abs().max())


def test_other_numbers_are_no_lot() -> None:
    model = adapted("lora")
    for name, changes in {"scaled": {"scale": 2.0}, "wide": {"ranks": {"r": 4}}, "twin": {"seed": 5}}.items():
        model.add_adapter(name, config("lora", **changes))
    layer = next(m for m in model.modules() if isinstance(m, TensorNetworkLinear))
    assert lots(layer, ["default", "scaled", "wide", "twin"]) == [["default", "twin"], ["scaled"], ["wide"]]
    assert in_blocks(["twin", "default"], ["default", "default", "twin"]) == [2, 2, 0, 1]
