"""Named stacks: every value against a dense oracle, chosen for a call or row by row, through a tuner's whole life."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import peft
import pytest
import torch
from adapter_models import opt
from oracles import open_axes
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watching import compiled

import tnpeft
from tnpeft.networks import AdapterFileError, NetworkError

SIZES = {"scene": 4, "env": 3}
LINES = {
    "tuka": {"network": tnpeft.families.tuka(ranks=(2, 3, 2, 2)), "stack": SIZES},
    "lora": {
        "network": "B[layer proj scene out r] A[layer proj r inp] -> layer proj scene out inp",
        "ranks": {"r": 2},
        "stack": {"scene": 4},
    },
    "sum": {
        "network": "B[scene env out r] A[layer proj r inp] + d[env out] C[scene inp] -> layer proj scene env out inp",
        "ranks": {"r": 2},
        "stack": SIZES,
    },
    "cp": {
        "network": "w[scene r] A[layer o1 r] B[o2 r] C[env i1 r] D[i2 r] -> layer scene env (o1 o2) (i1 i2)",
        "ranks": {"r": 3},
        "unit_norm": ["A", "C"],
        "scale": 0.5,
        "stack": SIZES,
    },
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def adapted(key: str = "tuka", **options: object) -> peft.PeftModel:
    torch.manual_seed(0)
    config = tnpeft.TensorNetworkConfig(**{**LINES[key], "target_modules": ["0", "1"], **options})
    model = peft.get_peft_model(Net(), config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tnpeft" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


def dense(model: nn.Module, key: str) -> Tensor:
    """The updates ``[proj, scene, env, out, inp]`` by one plain einsum for each term: both linears are one layer."""
    f, factors = model.peft_config["default"].factorization, tnpeft.factors(model)
    for label in f.unit_norm:
        indices = f.network.factor(label).indices
        axes = [k for k, index in enumerate(indices) if index in ("o1", "o2", "i1", "i2")]
        factors[label] = factors[label] / factors[label].norm(dim=axes, keepdim=True)
    found = open_axes(f.network, factors)
    sizes = dict(zip(f.network.outer, found.shape, strict=True))
    stack = [sizes.get(index, 1) for index in ("layer", "proj", "scene", "env")]
    return f.scale * found.reshape(*stack, 6, 6)[0].expand(2, 4, 3, 6, 6)


def oracle(model: nn.Module, deltas: Tensor, x: Tensor, scene: int, env: int) -> Tensor:
    for k, layer in enumerate(model.get_base_model().layers):
        base = layer.base_layer
        x = nn.functional.linear(x, base.weight + deltas[k, scene, env], base.bias).tanh()
    return x


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("key", LINES)
def test_every_value_is_its_dense_update(key: str, train: bool) -> None:
    model, x = adapted(key).train(train), torch.randn(5, 6).double()
    deltas = dense(model, key)
    outputs = []
    for scene in range(4):
        for env in range(3):
            tnpeft.select(
                model, **{i: v for i, v in {"scene": scene, "env": env}.items() if i in LINES[key]["stack"]}
            )
            with torch.set_grad_enabled(train):
                outputs.append(model(x).detach())
            assert (outputs[-1] - oracle(model, deltas, x, scene, env)).abs().max() < 1e-10
    assert len({float(output.sum()) for output in outputs}) == (12 if "env" in LINES[key]["stack"] else 4)


@pytest.mark.parametrize("shape", [(6,), (5, 6)])
@pytest.mark.parametrize("key", LINES)
def test_a_value_for_each_row(key: str, shape: tuple[int, ...]) -> None:
    """Outputs and gradients are those of one call for each row."""
    rows = {"scene": [1, 3, 3, 0], "env": [2, 0, 1, 1]}
    rows = {index: values for index, values in rows.items() if index in LINES[key]["stack"]}
    model, x = adapted(key), torch.randn(4, *shape).double()
    trained = [p for p in model.parameters() if p.requires_grad]
    tnpeft.select(model, **{index: torch.tensor(values) for index, values in rows.items()})
    found = model(x)
    one = torch.autograd.grad(found.square().sum(), trained)
    outputs = []
    for k in range(4):
        tnpeft.select(model, **{index: values[k] for index, values in rows.items()})
        outputs.append(model(x[k : k + 1]))
    wanted = torch.cat(outputs)
    each = torch.autograd.grad(wanted.square().sum(), trained)
    assert (found - wanted).abs().max() < 1e-10
    for a, b in zip(one, each, strict=True):
        assert (a - b).abs().max() < 1e-10 * (1 + b.abs().max())


def test_tokens_that_the_model_lays_out_as_rows() -> None:
    config = tnpeft.TensorNetworkConfig(**LINES["lora"], target_modules=["q_proj", "fc1", "fc2"])
    model = peft.get_peft_model(opt().double(), config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".B" in name:
                parameter.copy_(torch.randn_like(parameter))
    ids = torch.randint(3, 60, (3, 7))
    tnpeft.select(model, scene=[2, 0, 2])
    found = model(input_ids=ids).logits
    for k, scene in enumerate((2, 0, 2)):
        tnpeft.select(model, scene=scene)
        assert (model(input_ids=ids[k : k + 1]).logits - found[k]).abs().max() < 1e-10
    tnpeft.select(model, scene=[0, 1])
    with pytest.raises(NetworkError, match="2 values are chosen for the rows of a batch"):
        model(input_ids=ids)


def test_a_value_that_is_not_chosen_is_an_error() -> None:
    model = adapted("tuka")
    x = torch.randn(2, 6).double()
    with pytest.raises(NetworkError, match=r"no value of the stack index 'scene' is chosen\ncall tnpeft.select"):
        model(x)
    tnpeft.select(model, scene=1)
    with pytest.raises(NetworkError, match="'env' is chosen"):
        model(x)
    with pytest.raises(NetworkError, match="'env' is chosen"):
        model.merge_adapter()
    with model.disable_adapter():
        model(x)
    assert {row.reason for row in tnpeft.explain(model).rows} == {"scene = 1, env is not chosen"}
    tnpeft.select(model, env=0)
    model(x)
    tnpeft.select(model, scene=None)
    with pytest.raises(NetworkError, match="'scene' is chosen"):
        model(x)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (4, "is 4, and the index has the values 0 to 3"),
        (-1, "is -1"),
        (2**63, "is 9223372036854775808"),
        ([0, 2**200], f"is {2**200}, and"),
        (True, "is True"),
        (1.0, "is 1.0"),
        ("1", "is '1'"),
        ([], r"is \[\]"),
        ([0, 4], "is 4"),
        (torch.tensor([0.0]), "is a tensor of torch.float32"),
        (torch.tensor([[0]]), r"is a tensor of torch.int64 with shape \(1, 1\)"),
        (torch.tensor([], dtype=torch.long), "is an empty tensor"),
    ],
)
def test_values_that_cannot_be_chosen(value: object, problem: str) -> None:
    model = adapted("tuka")
    tnpeft.select(model, scene=0, env=0)
    with pytest.raises(NetworkError, match=f"the value of the stack index 'scene' {problem}"):
        tnpeft.select(model, scene=value)
    model(torch.randn(2, 6).double())


def test_what_cannot_be_chosen_from() -> None:
    with pytest.raises(NetworkError, match="no adapter of the model declares a stack index"):
        tnpeft.select(nn.Linear(2, 2), scene=1)
    model = adapted("tuka")
    with pytest.raises(NetworkError, match="the declared ones are scene, env"):
        tnpeft.select(model, layer=1)
    with pytest.raises(NetworkError, match="scene has 2, env has 3"):
        tnpeft.select(model, scene=[0, 1], env=[0, 1, 2])


@pytest.mark.parametrize("key", LINES)
def test_saved_loaded_counted(key: str, tmp_path: Path) -> None:
    model = adapted(key)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert sum(v.numel() for v in load_file(tmp_path / "adapter_model.safetensors").values()) == trained
    assert model.get_base_model().factor_bank.layouts["default"].count() == trained
    again = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert again.peft_config["default"].stack == LINES[key]["stack"]
    for name, value in tnpeft.factors(again).items():
        assert torch.equal(value, tnpeft.factors(model)[name])
        axes = model.peft_config["default"].factorization.network.factor(name).indices
        assert len(axes) == value.dim()
    again.load_adapter(tmp_path, "default")
    broken = model.peft_config["default"].to_dict() | {"stack": {**LINES[key]["stack"], "scene": 5}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(broken, default=str))
    with pytest.raises(AdapterFileError):
        peft.PeftModel.from_pretrained(Net(), tmp_path)


def test_the_start_is_the_base_model() -> None:
    config = tnpeft.TensorNetworkConfig(**LINES["tuka"], target_modules=["0", "1"])
    base, x = Net(), torch.randn(3, 6).double()
    model = peft.get_peft_model(copy.deepcopy(base), config)
    tnpeft.select(model, scene=[0, 3, 1], env=2)
    assert torch.equal(model(x), base(x))


def test_the_chosen_value_is_merged() -> None:
    model, x = adapted("tuka").eval(), torch.randn(3, 6).double()
    before = [layer.base_layer.weight.detach().clone() for layer in model.get_base_model().layers]
    tnpeft.select(model, scene=[1, 1, 2], env=0)
    with pytest.raises(NetworkError, match="for each row, not one update"):
        model.merge_adapter()
    tnpeft.select(model, scene=3)
    wanted = model(x)
    model.merge_adapter()
    assert (model(x) - wanted).abs().max() < 1e-10
    delta = dense(model, "tuka")[:, 3, 0]
    for k, layer in enumerate(model.get_base_model().layers):
        assert (layer.base_layer.weight - before[k] - delta[k]).abs().max() < 1e-10
    with pytest.raises(NetworkError, match="is merged"):
        tnpeft.select(model, scene=1)
    model.unmerge_adapter()
    for k, layer in enumerate(model.get_base_model().layers):
        assert torch.equal(layer.base_layer.weight, before[k])
    tnpeft.select(model, scene=1)
    assert (model(x) - wanted).abs().max() > 1e-3
    merged = copy.deepcopy(model).merge_and_unload()
    assert (merged(x) - model(x)).abs().max() < 1e-10


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_is_recomputed_with_what_its_forward_saw(reentrant: bool) -> None:
    model = adapted("tuka")
    x = torch.randn(4, 6).double().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]

    def losses(run: object) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for scene in (0, [1, 2, 2, 3], 3):
            tnpeft.select(model, scene=scene, env=1)
            total = total + run(x).square().sum()
        tnpeft.select(model, scene=2, env=0)
        return total

    losses(model).backward()
    wanted = [p.grad.clone() for p in trained]
    model.zero_grad()
    losses(lambda x: checkpoint(model, x, use_reentrant=reentrant)).backward()
    for p, grad in zip(trained, wanted, strict=True):
        assert (p.grad - grad).abs().max() < 1e-12 * grad.abs().max()


def test_one_compiled_graph_for_all_values() -> None:
    model = adapted("tuka")
    run, graphs = compiled(model, dynamic=False)
    x = torch.randn(4, 6).double()
    for scene in range(4):
        tnpeft.select(model, scene=scene, env=scene % 3)
        assert (run(x) - model(x)).abs().max() < 1e-10
    assert len(graphs) == 1
    for scene in ([0, 1, 2, 3], [3, 3, 1, 0]):
        tnpeft.select(model, scene=scene)
        assert (run(x) - model(x)).abs().max() < 1e-10
    assert len(graphs) == 2


def test_several_adapters_and_mixed_batches() -> None:
    model, x = adapted("tuka"), torch.randn(3, 6).double()
    other = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"], init={"B": "normal(1)"})
    model.add_adapter("plain", other)
    model.double().eval()
    tnpeft.select(model, scene=2, env=1)
    outputs = {}
    for name in ("default", "plain"):
        model.set_adapter(name)
        outputs[name] = model(x)
    found = model(x, adapter_names=["default", "plain", "default"])
    assert (
        found - torch.stack([outputs["default"][0], outputs["plain"][1], outputs["default"][2]])
    ).abs().max() < 1e-10
    tnpeft.select(model, scene=[0, 1, 2])
    with pytest.raises(NetworkError, match="rows cannot have both an adapter and a value of 'scene'"):
        model(x, adapter_names=["default", "plain", "default"])
    model.set_adapter("plain")
    assert torch.equal(model(x), outputs["plain"])
    model.delete_adapter("default")
    with pytest.raises(NetworkError, match="no adapter of the model declares"):
        tnpeft.select(model, scene=1)


def test_dropout_copies_rates_and_export(tmp_path: Path) -> None:
    model, x = adapted("tuka", dropout=0.5), torch.randn(3, 6).double()
    tnpeft.select(model, scene=[0, 1, 2], env=1)
    assert (model.train()(x) - model.eval()(x)).abs().max() > 1e-3
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
    groups = tnpeft.parameter_groups(model, relative_step=1e-2)
    assert {group["name"] for group in groups} == {"G", "U1", "U2", "S", "E"}
    tnpeft.select(model, scene=3)
    tnpeft.export_lora(model, tmp_path)
    plain = peft.PeftModel.from_pretrained(Net(), tmp_path)
    for mine, lora in zip(model.get_base_model().layers, plain.get_base_model().layers, strict=True):
        lora.base_layer.load_state_dict(mine.base_layer.state_dict())
    assert (plain.double()(x) - model(x)).abs().max() < 1e-5


def test_tasks_are_a_named_stack() -> None:
    line = "B[task out r] A[layer proj r inp] -> layer proj task out inp"
    config = tnpeft.TensorNetworkConfig(network=line, ranks={"r": 2}, stack={"task": 3}, target_modules=["0"])
    model = peft.get_peft_model(Net(), config)
    tnpeft.select(model, task=[0, 2])
    assert model(torch.randn(2, 6).double()).shape == (2, 6)
