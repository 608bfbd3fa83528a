"""On a GPU as on the processor: outputs, gradients, files, merging, half precision, replicas, steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_models import row_by_row
from torch import Tensor, nn
from weight_kinds import FAMILIES, FOUNDING, KINDS, STACKS, adapted, frozen, shake

import tnpeft

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
DEVICE = "cuda"
CASES = [(family, "opt") for family in FAMILIES if "expert" not in FAMILIES[family].network.indices]
CASES += [(family, kind) for kind in KINDS if kind != "opt" for family in FOUNDING]
CASES += [(family, "mixtral") for family in ("expert_cp", "shared_outer_lora")]
LINES = ("lora", "cp", "tenslora", "tera", "vera", "lokr")


def outcome(model: nn.Module, kind: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of its mean square by each trainable parameter, on the processor."""
    model.zero_grad()
    found = KINDS[kind].output(model, x)
    found.square().mean().backward()
    grads = {n: p.grad.detach().clone().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return found.detach().cpu(), grads


def alike(found: Tensor, wanted: Tensor, size: float = 1e-9) -> bool:
    return torch.allclose(found.cpu(), wanted.cpu(), rtol=0, atol=size * float(wanted.abs().max()) + 1e-13)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_moved_to_the_gpu(family: str, kind: str) -> None:
    x = KINDS[kind].example()
    _, model = adapted(FAMILIES[family], kind)
    shake(model, KINDS[kind].spread)
    wanted, grads = outcome(model, kind, x)
    found, moved = outcome(model.to(DEVICE), kind, x.to(DEVICE))
    assert alike(found, wanted)
    assert moved.keys() == grads.keys()
    total = torch.stack([grad.norm() for grad in grads.values()]).norm()
    for name, grad in grads.items():
        assert (moved[name] - grad).norm() <= 1e-7 * grad.norm() + 1e-12 * total, name
    back, _ = outcome(model.cpu(), kind, x)
    assert alike(back, wanted, 1e-12)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_made_saved_loaded_and_merged_on_the_gpu(family: str, kind: str, tmp_path: Path) -> None:
    its, base = KINDS[kind], copy.deepcopy(frozen(kind)).to(DEVICE)
    options: dict[str, Any] = {"stack": STACKS.get(family), "axes": dict(its.axes), "target_modules": [*its.targets]}
    config = tnpeft.TensorNetworkConfig(network=FAMILIES[family], **options)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.device.type for p in held.values()} == {DEVICE}
    if family in STACKS:
        tnpeft.select(model, **dict.fromkeys(STACKS[family], 0))
    shake(model, its.spread)
    x = its.example().to(DEVICE)
    with torch.no_grad():
        wanted = its.output(model, x)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        if family in STACKS:
            tnpeft.select(again, **dict.fromkeys(STACKS[family], 0))
        assert {p.device.type for p in again.parameters()} == {DEVICE}
        assert alike(its.output(again, x), wanted, 1e-12)  # experts add up their tokens in any order
        # A merged weight is rounded to the dtype of the weight, here float64; the factors are float32.
        again.double().merge_adapter()
        model.double()
        assert alike(its.output(again, x), its.output(model, x), 1e-8)


@pytest.mark.parametrize("family", LINES)
def test_half_precision_is_near(family: str) -> None:
    x = KINDS["opt"].example()
    _, model = adapted(FAMILIES[family], "opt")
    shake(model, 0.4)
    wanted, _ = outcome(model, "opt", x)
    plain = frozen("opt")(x).logits.detach()
    half = copy.deepcopy(frozen("opt")).to(DEVICE).bfloat16()
    low = peft.get_peft_model(half, model.peft_config["default"]).eval()
    shake(low, 0.4)
    with torch.no_grad():
        found, bare = low(x.to(DEVICE)).logits.double().cpu(), low.unload()(x.to(DEVICE)).logits.double().cpu()
    # The update's own error is not far above that of the frozen model in the same precision.
    error, floor = (found - wanted).norm(), (bare - plain).norm() * wanted.norm() / plain.norm()
    assert error <= 4 * floor
    assert (wanted - plain).norm() > 2 * floor


@pytest.mark.filterwarnings("ignore:TensorFloat32")
def test_compiled_without_a_break() -> None:
    model = adapted(FAMILIES["lora"], "opt")[1].float().to(DEVICE)
    shake(model)
    x = KINDS["opt"].example().to(DEVICE)
    with torch.no_grad():
        wanted = model(x).logits
        found = torch.compile(model, fullgraph=True)(x).logits
    assert alike(found, wanted, 1e-4)


@pytest.mark.parametrize("family", LINES)
def test_replicas_take_the_same_steps(family: str) -> None:
    x, found = KINDS["opt"].example(), []
    x = torch.cat([x, x.flip(0)])
    for device in ("cpu", DEVICE):
        config = tnpeft.TensorNetworkConfig(network=FAMILIES[family], target_modules=["q_proj", "v_proj"], replicas=2)
        model = peft.get_peft_model(copy.deepcopy(frozen("opt")), config).double().to(device)
        optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-2))
        tnpeft.replicas.learning_rates(optimizer, model, [1.0, 0.1])
        for _ in range(3):
            out = KINDS["opt"].output(model, x.to(device))
            tnpeft.replicas.losses(out, x.to(device), 2).sum().backward()
            tnpeft.replicas.clip(model, 1e-3)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found.append(KINDS["opt"].output(model, x.to(device)))
    assert alike(found[1], found[0], 1e-8)


@pytest.mark.parametrize("family", ["lora", "cp", "tenslora"])
def test_rows_with_adapters_of_their_own(family: str) -> None:
    _, model = adapted(FAMILIES[family], "opt")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.double().to(DEVICE)
    shake(model)
    x = KINDS["opt"].example().to(DEVICE)[:1].repeat(3, 1)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        found = KINDS["opt"].output(model, x, adapter_names=names)
    wanted = row_by_row(model, names, lambda row: KINDS["opt"].output(model, x[:1]))
    assert all(alike(row, its, 1e-6) for row, its in zip(found, wanted, strict=True))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("family", ["lora", "cp", "tucker", "tenslora"])
def test_preconditioned_steps(family: str, invariant: bool) -> None:
    x, found = KINDS["opt"].example(), []
    for device in ("cpu", DEVICE):
        _, model = adapted(FAMILIES[family], "opt")
        shake(model, 0.3)
        model.to(device)
        optimizer = torch.optim.SGD(tnpeft.parameter_groups(model, lr=1e-2))
        optimizer = tnpeft.optim.precondition(optimizer, model, invariant=invariant)
        for _ in range(2):
            optimizer.zero_grad()
            KINDS["opt"].output(model, x.to(device)).square().mean().backward()
            optimizer.step()
        tnpeft.optim.rebalance(model)
        with torch.no_grad():
            found.append(KINDS["opt"].output(model, x.to(device)))
    assert alike(found[1], found[0], 1e-6)


@pytest.mark.parametrize("family", ["lora", "cp", "tera"])
def test_measured_steps(family: str) -> None:
    _, model = adapted(FAMILIES[family], "opt")
    shake(model, 0.3)
    x = KINDS["opt"].example()
    wanted = tnpeft.coordinate_check(model, x)
    found = tnpeft.coordinate_check(model.to(DEVICE), x.to(DEVICE))
    for ours, theirs in zip(found.rows, wanted.rows, strict=True):
        for one, other in zip(vars(ours).values(), vars(theirs).values(), strict=True):
            assert one == (pytest.approx(other, rel=1e-4) if isinstance(other, float) else other)


@pytest.mark.parametrize("family", LINES)
def test_recomputed_in_the_backward(family: str) -> None:
    x = KINDS["opt"].example()
    _, model = adapted(FAMILIES[family], "opt")
    shake(model)
    wanted, grads = outcome(model, "opt", x)
    model.to(DEVICE).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found, again = outcome(model, "opt", x.to(DEVICE))
    assert alike(found, wanted)
    for name, grad in grads.items():
        assert alike(again[name], grad, 1e-7), name
