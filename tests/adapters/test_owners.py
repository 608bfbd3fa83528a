"""What an adapter meets in a model: owners that read weights, names that coincide, reports, flags, many adapters."""

import time
from collections.abc import Callable

import peft
import pytest
import torch
from adapter_models import opt, shake
from failing_steps import refused, steps
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import tnpeft
from tnpeft.adapters.sites.owners import read_weights
from tnpeft.networks import NetworkError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def config(*targets: str, **options: object) -> tnpeft.TensorNetworkConfig:
    return tnpeft.TensorNetworkConfig(**{"network": "lora", **options}, target_modules=[*targets])


def shaken(model: nn.Module) -> nn.Module:
    shake(model)
    return model


@pytest.mark.parametrize(
    ("owner", "children"),
    [
        ("mamba.modeling_mamba.MambaMixer", {"dt_proj", "out_proj", "x_proj"}),
        ("mamba2.modeling_mamba2.Mamba2Mixer", {"out_proj"}),
        ("falcon_h1.modeling_falcon_h1.FalconH1Mixer", {"out_proj"}),
        ("wavlm.modeling_wavlm.WavLMAttention", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("t5.modeling_t5.T5DenseGatedActDense", set()),
        ("bloom.modeling_bloom.BloomMLP", set()),
        ("llama.modeling_llama.LlamaAttention", set()),
    ],
)
def test_owners_that_read_weights(owner: str, children: set[str]) -> None:
    module, name = f"transformers.models.{owner}".rsplit(".", 1)
    found = read_weights(getattr(__import__(module, fromlist=[name]), name))
    assert children <= found
    assert children or not {"wo", "wi_0", "dense_4h_to_h", "q_proj", "o_proj"} & found


def decorated(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args: method(*args)


class Reader(nn.Module):
    """Reads the weights of linears that it calls, too, by whatever path."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("own", "alias", "called", "of_property", "of_decorated"):
            setattr(self, name, nn.Linear(4, 4))
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4), "called": nn.Linear(4, 4)})
        self.listed = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.looped = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alias = self.alias
        x = self.called(x.to(self.called.weight.dtype)) @ self.own.weight + x @ alias.weight.t()
        x = self.inner["called"](x) @ self.inner.deep.weight @ self.listed[1].weight
        for block in self.looped:
            x = block.down(x) @ block.up.weight
        return x

    @property
    def turned(self) -> torch.Tensor:
        return self.of_property.weight.T

    @decorated
    def other(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.of_decorated.weight


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("own", True), ("alias", True), ("of_property", True), ("of_decorated", True),
        ("inner.deep", True), ("listed.1", True), ("looped.0.up", True),
        ("called", False), ("inner.called", False), ("listed.0", False), ("looped.0.down", False),
    ],
)  # fmt: skip
def test_a_weight_is_read_by_whatever_path(name: str, read: bool) -> None:
    model = nn.Sequential(nn.Identity(), Reader())
    if read:
        with pytest.raises(NetworkError, match=f"1.{name} cannot be adapted: Reader reads its weight"):
            peft.get_peft_model(model, config(f"1.{name}"))
    else:
        assert peft.get_peft_model(model, config(f"1.{name}")).peft_config


class Written(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_with_a_forward_of_its_own_has_to_be_a_linear(dtype: torch.dtype) -> None:
    """Those that do more are in test_refusals.py."""
    model = shaken(peft.get_peft_model(nn.Sequential(Written(64, 48, dtype=dtype)), config("0")))
    x = torch.randn(3, 64, dtype=dtype)
    wanted = model(x)
    model.merge_adapter()
    assert (model(x) - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("train", [False, True])
def test_the_fused_encoder_layer_calls_what_is_adapted(train: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    model = shaken(peft.get_peft_model(nn.Sequential(nn.TransformerEncoder(layer, 2)), config("linear1", "linear2")))
    model.train(train)
    with torch.no_grad():
        wanted = model(x)
        model.merge_adapter()
        assert torch.allclose(model(x), wanted, atol=1e-5)
    with pytest.raises(NetworkError, match="reads its weight"):
        peft.get_peft_model(nn.Sequential(nn.TransformerEncoder(layer, 2)), config("out_proj"))


class Paths(nn.Module):
    """Linears whose joined names coincide, in one layer."""

    def __init__(self, *paths: str) -> None:
        super().__init__()
        for path in paths:
            module = self
            *parts, last = path.split(".")
            for part in parts:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.add_module(last, nn.Linear(4, 4))


@pytest.mark.parametrize("network", ["lora", "vera"])
def test_names_that_coincide_are_told_apart_or_refused(network: str) -> None:
    expression = tnpeft.TensorNetworkConfig(network=network, target_modules=r"h\..*c")
    with refused(model := Paths("h.0.a.b.c", "h.0.d.b.c", "h.0.a.b_c"), "nothing tells"):
        peft.get_peft_model(model, expression)
    model = peft.get_peft_model(Paths("h.0.a_b.c", "h.0.a.b_c"), expression)
    assert len(model.get_layer_status()) == 2


@pytest.mark.parametrize("targets", [r"(q|v)_proj.*", r".*k.*", r".*"])
def test_expressions_that_match_below_an_adapted_linear(targets: str) -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})
    expression = tnpeft.TensorNetworkConfig(network="lora", target_modules=targets)
    model = peft.get_peft_model(model, expression)
    for name in ("second", "third"):
        model.add_adapter(name, expression)
    assert all(set(layer.available_adapters) == {"default", "second", "third"} for layer in model.get_layer_status())


@pytest.mark.parametrize("network", ["lora", "vera"])
def test_reports_of_peft(network: str) -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config("0", "1", network=network))
    status = model.get_model_status()
    assert (status.peft_types, status.num_adapter_layers) == ({"default": "TENSOR_NETWORK"}, 2)
    assert all(hasattr(m, "in_features") for m in model.modules() if isinstance(m, BaseTunerLayer))
    with disable_input_dtype_casting(model, active=True):
        assert model(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize("options", [{}, {"network": "vera"}, {"dora": True}])
@pytest.mark.parametrize("frozen", [False, True])
def test_switching_off_and_on_keeps_what_was_trained(frozen: bool, options: dict[str, object]) -> None:
    model = peft.get_peft_model(opt(), config("q_proj", "k_proj", inference_mode=frozen, **options))
    model.add_adapter("other", config("q_proj", **options))
    model.set_requires_grad("other")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(flags.values())
    with model.disable_adapter(), model.disable_adapter():
        assert not any("tnpeft" in name and p.requires_grad for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("autocast", [False, True])
def test_magnitudes_are_cast_with_the_factors(autocast: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    model = peft.get_peft_model(model, config("0", dora=True), autocast_adapter_dtype=autocast)
    found = {p.dtype for name, p in model.named_parameters() if "tnpeft" in name}
    assert found == {torch.float32 if autocast else torch.bfloat16}


def test_the_last_of_many_adapters_costs_what_the_first_did() -> None:
    model = peft.get_peft_model(opt(), config("q_proj"))

    def seconds(act: object) -> float:
        start = time.process_time()
        act()
        return time.process_time() - start

    added = [seconds(lambda k=k: model.add_adapter(f"a{k}", config("q_proj", ranks={"r": 2}))) for k in range(150)]
    switched = [seconds(lambda k=k: model.base_model.set_adapter(f"a{k}")) for k in (*range(20), *range(130, 150))]
    first, last = sorted(added[1:21])[10], sorted(added[-20:])[10]
    assert last < 3 * first + 0.002, (first, last)
    assert sorted(switched[20:])[10] < 3 * sorted(switched[:20])[10] + 0.002


def test_calls_to_attach_and_switch_do_not_grow() -> None:
    """Counted, not timed: one look at each name that is taken is all that grows with the number of adapters."""
    model = peft.get_peft_model(opt(), config("q_proj"))
    added = [steps(lambda k=k: model.add_adapter(f"a{k}", config("q_proj"))) for k in range(40)]
    switched = [steps(lambda k=k: model.set_adapter(f"a{k}")) for k in (0, 39)]
    assert added[-1] - added[1] <= 40
    assert switched[0] == switched[1]


def test_calls_to_attach_grow_as_the_sites_do() -> None:
    def calls(sites: int) -> int:
        model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(sites))})
        return steps(lambda: peft.get_peft_model(model, config("q")))

    calls(1)
    assert calls(200) <= 4.1 * calls(50)
