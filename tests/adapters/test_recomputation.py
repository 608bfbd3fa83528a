"""Activation checkpointing sees what the forward saw, or says that it does not."""

from collections.abc import Callable

import peft
import pytest
import torch
from adapter_models import shake
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnpeft
from tnpeft.networks import NetworkError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LINES = {"lora": {}, "shared": {"network": "vera"}, "magnitudes": {"dora": True}, "dropout": {"dropout": 0.3}}


class Net(nn.Module):
    """Two checkpointed blocks, the second with a checkpoint inside a checkpoint."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: self.b(self.a(x).tanh()), x, use_reentrant=self.reentrant)
        inner = lambda x: checkpoint(self.c, x, use_reentrant=self.reentrant)  # noqa: E731
        return checkpoint(inner, x, use_reentrant=self.reentrant)


def adapted(reentrant: bool, options: dict[str, object]) -> PeftModel:
    model = Net()
    model.reentrant = reentrant
    for name in ("one", "two"):
        config = tnpeft.TensorNetworkConfig(**{"network": "lora", **options}, target_modules=["a", "b", "c"])
        if name == "one":
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        shake(model, adapter=name)
    return model.train()


CHANGES: dict[str, Callable[[PeftModel], object]] = {
    "switched": lambda model: model.set_adapter("two"),
    "both": lambda model: model.base_model.set_adapter(["one", "two"]),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(["one"]),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("line", LINES)
def test_adapters_that_change_before_backward(line: str, change: str, reentrant: bool) -> None:
    model = adapted(reentrant, LINES[line])
    loss = model(torch.randn(4, 6, requires_grad=True)).pow(2).sum()
    CHANGES[change](model)
    with pytest.raises(NetworkError, match="between a checkpointed forward and its recomputation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("line", ["lora", "shared", "magnitudes"])
def test_adapters_that_change_in_between_and_back(line: str, reentrant: bool) -> None:
    """A reference pass with the adapter off, as preference training makes it, takes nothing from the gradients."""
    got, x = [], torch.randn(4, 6, dtype=torch.float64)
    for held in (False, True):
        model = adapted(reentrant, LINES[line]).double()
        model.get_base_model().reentrant = reentrant
        if not held:
            model.base_model.model.forward = lambda x, m=model.base_model.model: m.c(m.b(m.a(x).tanh()))
        loss = model(x.clone().requires_grad_()).pow(2).sum()
        with torch.no_grad(), model.disable_adapter():
            model(x)
        loss.backward()
        got.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert got[0].keys() == got[1].keys() != set()
    assert all(torch.allclose(got[0][name], got[1][name], atol=1e-5) for name in got[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("line", "refused"), [("lora", False), ("B[out r] A[r inp] -> out inp", True)])
def test_hooks_that_take_parts_of_a_gradient(line: str, refused: bool, training: bool) -> None:
    """A hook runs once for each reentrant checkpoint that holds a shared factor, with a part of its gradient."""
    model, seen = adapted(True, {"network": line, "ranks": {"r": 1}}).train(training), []
    with torch.no_grad():
        model(torch.ones(3, 6))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda its: seen.append(id(its)))
    x = torch.randn(3, 6, requires_grad=True)
    if refused:
        with pytest.raises(NetworkError, match="hooks on gradients"):
            model(x)
        model.base_model.model.reentrant = False
    model(x).sum().backward()
    assert seen
    assert len(seen) == len({*seen})
