"""A linear and its update as one operation: outputs, both derivatives, checkpointing, compiling, when it is used."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import tnpeft
from tnpeft import network
from tnpeft.nn.executor.eligibility import why_not_fused
from tnpeft.nn.executor.program import Program, program

ROWS, OUT, INP, SCALE = 5, 6, 8, -0.75
NETWORKS = {
    "lora": "B[out r] A[r inp] -> out inp",
    "vera": "b[out] ~B[out r] d[r] ~A[r inp] -> out inp",
    "two gates": "B[out a] ~M[a b] ~A[b inp] -> out inp",
    "gate in two terms": "B[out a] ~A[a inp] - C[out a] ~A[a inp] -> out inp",
    "scaled base": "v[out] ^W[out inp] -> out inp",
    "matrix": "A[out inp] -> out inp",
    "hadamard": "^W[out inp] B[out r] A[r inp] -> out inp",
    "kron": "A[o1 i1] B[o2 i2] -> (o1 o2) (i1 i2)",
    "cp": "w[r] A[o1 r] B[o2 r] C[i1 r] D[i2 r] -> (o1 o2) (i1 i2)",
    "monarch": "B[c o k] A[k c i] -> (c o) (k i)",
    "difference": "B[out r] A[r inp] - ~B[out r] ~A[r inp] -> out inp",
}
SIZES = {"out": OUT, "inp": INP, **dict.fromkeys(("a", "o", "o1", "i", "i1"), 2)}
SIZES |= {**dict.fromkeys(("r", "b", "c", "o2"), 3), **dict.fromkeys(("k", "i2"), 4)}


def case(name: str) -> tuple[Program, list[Tensor]]:
    """A program, and x, weight, bias and its factors."""
    net = network(NETWORKS[name])
    run = program(net, {i: SIZES[i] for i in net.indices}, tokens=ROWS)
    generator = torch.Generator().manual_seed(0)
    factors = [tuple(SIZES[i] for i in net.factor(label).indices) for label in run.labels]
    shapes = ((ROWS, INP), (OUT, INP), (OUT,), *factors)
    return run, [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def apart(run: Program, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
    return linear(x, weight, bias) + linear(x, run.delta(factors, SCALE))


def joined(run: Program, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
    return run.with_linear(x, factors, weight, bias, SCALE)


def called(run: Program, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
    return run(x, factors, linear(x, weight, bias), SCALE)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("wanted", [range(9), (0, 3, 4), (3,), (4,), (0,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_outputs_and_gradients_are_those_of_two_operations(name: str, wanted: Any, with_bias: bool) -> None:
    run, all_tensors = case(name)
    if not any(k in wanted for k in range(len(all_tensors))):
        return
    found = []
    for function in (apart, joined, called):
        given = [tensor.detach().requires_grad_(k in wanted) for k, tensor in enumerate(all_tensors)]
        x, weight, bias, *factors = given
        result = function(run, x[None], weight, bias if with_bias else None, *factors)
        torch.linspace(-1, 1, result.numel(), dtype=torch.float64).dot(result.flatten()).backward()
        found.append([result, *(tensor.grad for tensor in given)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def scaled_matrices(run: Program) -> int:
    """How many products of two weights alone the backward pass takes in place of full-width ones."""
    listing = run.fused if run.prefix is None else run.prefix.rest
    code = listing.code((True, True, False, False, False, True, *(False for _ in run.labels[1:])))
    return code.total - 2 * code.size


@pytest.mark.parametrize(
    "line",
    [
        "b[out] ~B[out r] d[r] ~A[r inp] -> out inp",
        "b[out] ~B[out r] A[r inp] -> out inp",
        "-b[out] ~B[out r] d[r] ~A[r inp] -> out inp",
    ],
)
def test_a_gradient_is_scaled_through_the_matrix_where_that_is_smaller(line: str) -> None:
    """Planned for few rows or for many, the gradients are the same; only the latter multiply the matrix."""
    net = network(line)
    sizes = {"out": 384, "inp": 320, "r": 192}
    few, many = (program(net, sizes, tokens=tokens) for tokens in (100, 400))
    assert scaled_matrices(many)
    assert not scaled_matrices(few)
    generator = torch.Generator().manual_seed(0)
    groups = [("out", "inp"), *(net.factor(label).indices for label in few.labels)]
    shapes = [(ROWS, sizes["inp"]), *(tuple(sizes[index] for index in group) for group in groups)]
    found = []
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for run in (few, many):
        x, weight, *factors = (value.clone().requires_grad_() for value in values)
        joined(run, x, weight, None, *factors).square().sum().backward()
        found.append([x.grad, weight.grad, *(factor.grad for factor in factors)])
    for right, left in zip(*found, strict=True):
        assert 0 < left.abs().max() * 1e-12 >= (right - left).abs().max()


@pytest.mark.parametrize("function", [joined, called])
@pytest.mark.parametrize("name", NETWORKS)
def test_differentiable_twice(name: str, function: Any) -> None:
    run, given = case(name)
    assert torch.autograd.gradcheck(partial(function, run), given)
    assert torch.autograd.gradgradcheck(partial(function, run), given, atol=1e-4)


def test_the_check_of_second_derivatives_can_fail() -> None:
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x * x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return 3 * grad * ctx.saved_tensors[0]

    assert not torch.autograd.gradgradcheck(Forgetful.apply, case("lora")[1][:1], raise_exception=False)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        *((name, joined) for name in ("lora", "vera", "two gates", "hadamard", "kron", "monarch")),
        *((name, called) for name in ("hadamard", "kron", "monarch")),
    ],
)
def test_one_graph_for_all_batch_sizes_forward_and_backward(name: str, function: Any) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    run, given = case(name)
    eager = partial(function, run)
    compiled = torch.compile(eager, backend=counter, fullgraph=True)
    for rows in (13, 3, 11):  # 13 differs from the other sizes, which a graph would take for the same
        found = []
        for function in (eager, compiled):
            _, *rest = (tensor.detach().requires_grad_() for tensor in given)
            x = torch.ones(rows, 4, INP, dtype=torch.float64, requires_grad=True)
            torch._dynamo.mark_dynamic(x, 0)
            result = function(x, *rest)
            result.square().sum().backward()
            found.append([result, x.grad, *(tensor.grad for tensor in rest)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


# ---- in a model


LINES = {
    "lora": {"network": "lora", "ranks": {"r": 3}, "scale": -2.0},
    "subtracted": {"network": "-B[layer proj out r] A[r inp] -> layer proj out inp", "ranks": {"r": 3}},
    "tucker": {"network": tnpeft.families.tenslora("qkv_depth", ranks=(3, 3, 2, 2))},
    "cp": {"network": tnpeft.families.cp(rank=4, out=(8, 6), inp=(6, 8))},
    "kron": {"network": tnpeft.families.krona(out=(8, 6), inp=(6, 8))},
}


class Blocks(nn.Module):
    """Two blocks of two linears each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(48, 48), "v_proj": nn.Linear(48, 48)}) for _ in range(2)
        )

    def forward(self, x: Tensor, reentrant: bool | None = None) -> Tensor:
        for layer in self.layers:
            block = lambda x, layer=layer: (layer["q_proj"](x) * layer["v_proj"](x)).tanh()  # noqa: E731
            x = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        return x


def model(key: str) -> Any:
    torch.manual_seed(1)
    config = tnpeft.TensorNetworkConfig(**LINES[key], target_modules=["q_proj", "v_proj"])
    built = peft.get_peft_model(Blocks().double(), config).double()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return built


def run(net: Any, reentrant: bool | None = None) -> list[Tensor]:
    x = torch.linspace(-1, 1, 5 * 48, dtype=torch.float64).reshape(5, 48).requires_grad_()
    result = net(x, reentrant=reentrant)
    result.square().sum().backward()
    return [result, x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


def counted(net: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is called whenever a linear and its update run as one operation."""
    calls: list[Any] = []
    kind = type(next(m for m in net.modules() if hasattr(m, "updates")).updates["default"][0].program)
    original = kind.with_linear
    monkeypatch.setattr(kind, "with_linear", lambda *args: (calls.append(args), original(*args))[1])
    return calls


@pytest.mark.parametrize("key", LINES)
def test_joined_or_not_the_model_is_the_same(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(key)
    hooked = copy.deepcopy(net)
    for module in hooked.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, result: result * 1.0)
    calls = counted(net, monkeypatch)
    wanted = run(hooked)
    assert not calls
    found = run(net)
    assert len(calls) == 4
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("key", LINES)
def test_checkpointing(key: str, reentrant: bool) -> None:
    wanted, found = run(model(key)), run(model(key), reentrant)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_anything_that_is_more_than_a_linear_is_left_alone() -> None:
    class Special(nn.Linear):
        pass

    x, replaced, hooked = torch.ones(1, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    hooked.register_full_backward_hook(lambda *args: None)
    assert not why_not_fused(nn.Linear(2, 2), x)
    assert all(why_not_fused(module, x) for module in (Special(2, 2), replaced, hooked, nn.Bilinear(2, 2, 2)))


def test_per_sample_gradients() -> None:
    """torch.func's transforms take the general way."""
    net = model("lora")
    given = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    rows = torch.linspace(-1, 1, 3 * 48, dtype=torch.float64).reshape(3, 1, 48)

    def loss(given: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(net, given, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(given, rows)
    for k, row in enumerate(rows):
        net.zero_grad()
        net(row).square().sum().backward()
        for name, parameter in net.named_parameters():
            if name in given:
                torch.testing.assert_close(found[name][k], parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_forward_differentiation_and_traces_take_the_general_way(tmp_path: Path) -> None:
    net = model("lora")
    x = torch.linspace(-1, 1, 2 * 48, dtype=torch.float64).reshape(2, 48)
    jacobian = torch.autograd.functional.jacobian
    found = jacobian(net, x, strategy="forward-mode", vectorize=True)
    torch.testing.assert_close(found, jacobian(net, x), rtol=1e-12, atol=1e-12)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, found.sum((2, 3)), rtol=1e-12, atol=1e-12)
    torch.jit.trace(net, x).save(tmp_path / "net.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "net.pt")(2 * x), net(2 * x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("key", LINES)
def test_a_trace_of_a_half_precision_model_passes_its_own_check(key: str) -> None:
    """The check traces again without gradients: the same operations must be seen."""
    net = model(key).float()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    x = torch.linspace(-1, 1, 2 * 48).reshape(2, 48).bfloat16()
    assert torch.equal(torch.jit.trace(net, x)(-x), net(-x))


@pytest.mark.parametrize("training", [True, False])
def test_on_the_meta_device(training: bool) -> None:
    net = model("lora").train(training)
    x = torch.ones(2, 48, dtype=torch.float64)
    wanted = net(x).shape
    net, x = net.to("meta"), x.to("meta")
    assert net(x).shape == wanted
    with torch.no_grad():
        assert net(x).device.type == "meta"


@pytest.mark.parametrize("grads", [True, False])
def test_a_hook_of_all_modules_sees_the_linears(grads: bool) -> None:
    net, seen = model("lora").eval(), list[nn.Module]()
    x = torch.ones(2, 48, dtype=torch.float64)
    with torch.set_grad_enabled(grads):
        wanted = [net(x) for _ in range(3)][-1]
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: seen.append(module))
        try:
            torch.testing.assert_close(net(x), wanted, rtol=1e-12, atol=1e-12)
        finally:
            handle.remove()
    assert all(m in seen for m in net.modules() if type(m) is nn.Linear)


def test_dropout_autocast_and_other_dtypes_take_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model("lora")
    calls = counted(net, monkeypatch)
    with torch.no_grad():
        net(torch.ones(2, 48, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.ones(2, 48, dtype=torch.float64))
    for module in net.modules():
        if hasattr(module, "dropouts"):
            module.dropouts["default"] = 0.5
    net.train()(torch.ones(2, 48, dtype=torch.float64))
    assert not calls
    net.eval()(torch.ones(2, 48, dtype=torch.float64))
    assert len(calls) == 4
