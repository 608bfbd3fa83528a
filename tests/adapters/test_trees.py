"""Any module tree, without a configuration of Hugging Face's: trained, saved, loaded, switched, merged, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import MIXED, NETWORKS, row_by_row, shake
from safetensors.torch import load_file
from torch import Tensor, nn

import tnpeft
from tnpeft.networks import NetworkError


class Tree(nn.Module):
    """Numbered layers, and linears of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in "ab")
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        result: Tensor = self.head(x)
        return result


def sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def nested() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))


TREES = {"tree": Tree, "sequence": sequence, "nested": nested}
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "tree, all": ("tree", {"target_modules": "all-linear", "exclude_modules": ["head"]}),
    "tree, layers": ("tree", {"target_modules": ["up", "down"], "modules_to_save": ["head"]}),
    "tree, one of the model's own": ("tree", {"target_modules": ["stem"]}),
    "tree, both": ("tree", {"target_modules": ["stem", "down"], "bias": "tensor_network_only"}),
    "sequence, by number": ("sequence", {"target_modules": ["0", "2"], "modules_to_save": ["4"]}),
    "sequence, by expression": ("sequence", {"target_modules": "[24]"}),
    "nested": ("nested", {"target_modules": "all-linear"}),
}


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    return TREES[name]()


def trained(name: str, **options: Any) -> Any:
    model = peft.get_peft_model(fresh(name), tnpeft.TensorNetworkConfig(**options))
    shake(model)
    x = torch.linspace(-1, 1, 40).reshape(5, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model(x)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    return model


@pytest.mark.parametrize("network", ["lora", "mixed", "vera"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_tree_is_saved_loaded_and_merged(choice: str, network: str, tmp_path: Path) -> None:
    name, options = CHOICES[choice]
    model = trained(name, **NETWORKS[network], **options)
    x = torch.linspace(-1, 1, 40).reshape(5, 8)
    wanted = model(x)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(fresh(name), tmp_path)
    assert torch.equal(again(x), wanted)
    if "bias" not in options:  # of which PEFT allows one adapter
        again.load_adapter(tmp_path, "second")
        again.set_adapter("second")
        assert torch.equal(again(x), wanted)
        with again.disable_adapter():
            assert torch.equal(again(x), fresh(name)(x))
    merged = again.merge_and_unload()
    assert type(merged) is type(fresh(name))
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in fresh(name).named_modules()]
    torch.testing.assert_close(merged(x), wanted)


def test_an_adapter_of_another_tree_is_refused(tmp_path: Path) -> None:
    trained("sequence", **NETWORKS["lora"], target_modules=["0", "2"]).save_pretrained(tmp_path)
    with pytest.raises(NetworkError, match="not a linear"):
        peft.PeftModel.from_pretrained(fresh("tree"), tmp_path)
    with pytest.raises(NetworkError, match="made for 0, 2"):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), tmp_path)


def test_export_of_a_tree(tmp_path: Path) -> None:
    model = trained("sequence", network=MIXED, ranks={"a": 3, "b": 2}, target_modules=["0", "2"])
    x = torch.linspace(-1, 1, 40).reshape(5, 8)
    tnpeft.export_lora(model, tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(fresh("sequence"), tmp_path)(x), model(x))


@pytest.mark.parametrize("name", ["sequence", "tree"])
def test_mixed_rows_and_replicas_in_a_tree(name: str) -> None:
    targets = {"sequence": ["0", "2"], "tree": ["up", "down"]}[name]
    model = trained(name, **NETWORKS["lora"], target_modules=targets)
    model.add_adapter("other", tnpeft.TensorNetworkConfig(**NETWORKS["mixed"], target_modules=targets))
    shake(model, 5)
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    names = ["other", "default", "__base__", "other"]
    model.eval()
    found = model(x, adapter_names=names)
    torch.testing.assert_close(found, row_by_row(model, names, lambda row: model(x[row : row + 1])))
    config = tnpeft.TensorNetworkConfig(**NETWORKS["lora"], target_modules=targets, replicas=2)
    packed = peft.get_peft_model(fresh(name), config)
    shake(packed)
    found = packed(x)
    for k in range(2):
        alone = tnpeft.TensorNetworkConfig(**NETWORKS["lora"], target_modules=targets)
        single = peft.get_peft_model(fresh(name), alone)
        tnpeft.set_factors(single, tnpeft.replica(packed, k))
        torch.testing.assert_close(found[2 * k : 2 * k + 2], single(x)[2 * k : 2 * k + 2])


def test_a_module_that_is_called_as_another_adapter_is_saved(tmp_path: Path) -> None:
    model = nn.ModuleDict({"other": nn.ModuleDict({"up": nn.Linear(4, 4)}), "up": nn.Linear(4, 4)})
    model = peft.get_peft_model(model, tnpeft.TensorNetworkConfig(network="lora", target_modules=["up"]))
    model.add_adapter("other", tnpeft.TensorNetworkConfig(network="lora", target_modules=["up"], seed=1))
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        stored = {key.removeprefix("base_model.model.") for key in load_file(folder / "adapter_model.safetensors")}
        assert stored == {f"{path}.tnpeft_factors.{label}" for path in ("up", "other.up") for label in "AB"}, name
