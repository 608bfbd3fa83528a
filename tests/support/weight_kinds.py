"""Every kind of weight that an adapter can be of, in tiny models, and the dense oracle of all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import oracles
import peft
import torch
from adapter_models import MODELS, TARGETS, inputs
from expert_models import CONFIGS, KeepDouble, mixture, tokens
from torch import Tensor, nn
from torch.func import functional_call

import tnpeft
from tnpeft.adapters.state import bank_of
from tnpeft.layout import ParameterSpec, SiteLayout
from tnpeft.networks import Factorization, Site
from tnpeft.nn.init.philox import normal


class Two(nn.Module):
    """Two layers of one module each, and what they make of an input."""

    def __init__(self, name: str, make: Callable[[], nn.Module], run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers, self.run = nn.ModuleList(nn.ModuleDict({name: make()}) for _ in range(2)), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(*(module for layer in self.layers for module in layer.values()), x)


def multiplied(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return first(x) * second(x).tanh()


def added(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    x = first(x) + x
    return second(x) + x


def attended(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    for layer in (first, second):
        y = x[..., : layer.kdim]
        x = layer(x, y, y, need_weights=False)[0] + x
    return x


def read(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return first.back(second(first(x)).tanh()) + x @ second.kernel


def Tokens() -> nn.Module:
    """Embeddings of 16 features for 48 tokens, the first with a padding token."""
    model = Two("embed", partial(nn.Embedding, 48, 16), multiplied)
    model.layers[0].embed.padding_idx = 3
    return model


def Images(dims: int = 2, groups: int = 1, **options: Any) -> nn.Module:
    """Convolutions: 16 x 16 matrices for every number of dimensions and groups."""
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    taps = {1: (4,), 2: (2, 2), 3: (1, 2, 2)}[dims]
    return Two("conv", partial(make, 4 * groups, 16, taps, groups=groups, **{"padding": 1, **options}), multiplied)


def Attention(apart: bool = False) -> nn.Module:
    """Attention; ``apart`` it reads keys and values of another width, whose projections stand apart."""
    widths = {"kdim": 8, "vdim": 8} if apart else {}
    return Two("attn", partial(nn.MultiheadAttention, 16, 4, batch_first=True, **widths), attended)


class Kernel(nn.Module):
    """A module with a matrix of its own, read in two methods and from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(16, 16))

    def back(self, x: Tensor) -> Tensor:
        return x @ self.kernel

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.T


class Batched(nn.Module):
    """Experts in one Parameter ``[expert, inp, out]``, all of which each row meets."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eio,...e->...o", x, self.kernel, x[..., :4].softmax(-1))


class Gated(nn.Module):
    """An expert of three linears."""

    def __init__(self, inp: int, width: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(inp, width, bias=False), nn.Linear(inp, width)
        self.w2 = nn.Linear(width, inp, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """A router and its experts in a list, two of which each token meets, as in mixtures before transformers 5."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(Gated(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        shares, chosen = self.gate(rows).softmax(-1).topk(2, -1)
        result = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            if len(row):
                result = result.index_add(0, row, expert(rows[row]) * shares[row, place, None])
        return result.reshape(x.shape)


def Mixtures() -> nn.Module:
    return Two("moe", Mixture, added)


def image(dims: int = 2, groups: int = 1) -> Tensor:
    return torch.randn(3, 4 * groups, *(5 + k for k in range(dims)), dtype=torch.float64)


def sequence() -> Tensor:
    return torch.randn(2, 5, 16, dtype=torch.float64)


def _same(matrix: Tensor) -> Tensor:
    return matrix


@dataclass(frozen=True)
class Kind:
    """A model, an input, the targets in it; the stored weight as ``[out, inp]``, experts before, and back.

    ``spread`` is the size of random factors: attention saturates if it is large, and its gradients with it.
    Models of transformers return logits, and round to fp32 on the way.
    """

    make: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    targets: tuple[str, ...]
    matrix: Callable[[Tensor], Tensor] = _same
    back: Callable[[Tensor, Tensor], Tensor] = lambda matrix, stored: matrix
    spread: float = 0.5
    experts: str = ""
    axes: Mapping[str, str] = field(default_factory=dict)
    transformer: bool = False

    def output(self, model: nn.Module, x: Tensor, weights: dict[str, Tensor] | None = None, **more: Any) -> Tensor:
        with KeepDouble() if self.transformer else nullcontext():
            found = model(x, **more) if weights is None else functional_call(model, weights, (x,))
        return found.logits if self.transformer else found


def _turned(matrix: Tensor, stored: Tensor | None = None) -> Tensor:
    return matrix.mT


def _conv(dims: int = 2, groups: int = 1, **options: Any) -> Kind:
    return Kind(
        lambda: Images(dims, groups, **options),
        lambda: image(dims, groups),
        ("conv",),
        lambda stored: stored.flatten(1),
        lambda matrix, stored: matrix.reshape(stored.shape),
    )


def _experts(name: str, implementation: str = "eager") -> Kind:
    sides = (_turned, _turned) if name == "gpt_oss" else ()
    make = partial(mixture, name, implementation)
    return Kind(make, tokens, ("experts",), *sides, experts=name, transformer=True)


def _architecture(name: str) -> Kind:
    """Attention and MLP: grouped queries, fused and transposed linears and both oblong shapes are among them."""
    [(_, batch)] = inputs(name).items()
    batch = batch.double() if batch.is_floating_point() else batch
    more = {"opt": "fc2", "llama": "up_proj", "gpt2": "c_fc", "bert": "output.dense", "vit": "fc1"}
    sides = (_turned, _turned) if name == "gpt2" else ()
    return Kind(MODELS[name], lambda: batch, (*TARGETS[name], more[name]), *sides, transformer=True)


LINEARS = {name: _architecture(name) for name in MODELS}
PLAIN = {"linear": Kind(partial(Two, "q_proj", partial(nn.Linear, 16, 16), multiplied), sequence, ("q_proj",))}
CALLED = {
    "embedding": Kind(Tokens, lambda: torch.tensor([[1, 3, 47], [5, 1, 3]]), ("embed",), _turned, _turned),
    "conv1d": _conv(1),
    "conv2d": _conv(),
    "conv2d grouped": _conv(2, 2),
    "conv2d strided": _conv(2, 4, stride=2, dilation=(1, 2), padding_mode="circular", bias=False),
    "conv3d": _conv(3),
}
KERNELS, BATCHES = partial(Two, "mix", Kernel, read), partial(Two, "mix", Batched, added)
RAW = {
    "attention": Kind(Attention, sequence, ("in_proj",), spread=0.2),
    "attention apart": Kind(lambda: Attention(True), sequence, ("q_proj_weight", "v_proj"), spread=0.2),
    "parameter": Kind(KERNELS, sequence, ("mix.kernel",), spread=0.2),
    "parameter turned": Kind(KERNELS, sequence, ("kernel",), _turned, _turned, 0.2, axes={"kernel": "inp out"}),
    "parameter of experts": Kind(
        BATCHES, sequence, ("kernel",), _turned, _turned, 0.2, axes={"mix.kernel": "expert inp out"}
    ),
}
EXPERTS = {name: _experts(name) for name in CONFIGS if name != "qwen2_moe"}  # which is stored as qwen3_moe
LISTED = {"list of experts": Kind(Mixtures, sequence, ("experts",))}
KINDS = {**LINEARS, **CALLED, **RAW, **EXPERTS, **LISTED}
GROUPED = {f"{name}, grouped": _experts(name, "grouped_mm") for name in ("mixtral", "gpt_oss", "qwen3_moe")}
ALL = {**KINDS, **GROUPED, **PLAIN}
FAMILIES = {name: tnpeft.families.get(name)() for name in tnpeft.families.names()}
# Of the founding papers: CP steps, LoRTA, TensLoRA and TeRA, and what they are compared with.
FOUNDING = ("cp", "lorta", "tenslora", "tera", "tucker", "tensor_train", "lora")
STACKS = {"tuka": {"scene": 2, "env": 3}, "lotra": {"basis": 2}}
BY_EXPERT = {**EXPERTS, **GROUPED, **LISTED, "parameter of experts": RAW["parameter of experts"]}


@cache
def frozen(kind: str) -> nn.Module:
    """The model of a kind in double precision, to be copied."""
    torch.manual_seed(0)
    return ALL[kind].make().double().eval().requires_grad_(False)


def attached(name: str, **options: Any) -> tuple[nn.Module, Any]:
    """The frozen model of a kind, and a copy with an adapter."""
    kind, base = ALL[name], frozen(name)
    own = {"target_modules": [*kind.targets], "axes": dict(kind.axes)}
    config = tnpeft.TensorNetworkConfig(**{**own, **options})
    return base, peft.get_peft_model(copy.deepcopy(base), config).double().eval()


def adapted(f: Factorization, name: str) -> tuple[nn.Module, Any]:
    """The same with a family, of whose named stacks the first values are chosen."""
    base, model = attached(name, network=f, stack=STACKS.get(f.name))
    if f.name in STACKS:
        tnpeft.select(model, **dict.fromkeys(STACKS[f.name], 0))
    return base, model


def shake(model: nn.Module, size: float = 0.5) -> None:
    """Random trainable factors."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tnpeft_factors" in name:
                values = torch.from_numpy(normal(parameter.numel(), 0, name)).reshape(parameter.shape)
                parameter.copy_(size * values)


# ---- the oracle


def dense(place: SiteLayout, values: Mapping[ParameterSpec, Tensor], f: Factorization, weight: Tensor) -> Tensor:
    """One site's scaled update by plain einsum from the line alone, ``[out, inp]``, or with experts before.

    ``weight`` is the site's own, for lines that hold it. Of named stacks the first values are taken.
    """
    net, sizes = place.network, place.sizes
    named = [index for index in net.stack if index != "expert"]
    factors = {}
    for factor in net.factors:
        label = net.label(factor)
        value = (
            weight.reshape([sizes[i] for i in factor.indices])
            if f.init.get(label) == "base"
            else values[place.parameters[label]]
        )
        if label in f.unit_norm:
            axes = [axis for axis, index in enumerate(factor.indices) if index in (*net.rows, *net.cols)]
            value = value / value.norm(dim=axes, keepdim=True)
        factors[label] = value
    found = oracles.dense(net, factors)
    for axis in reversed([k for k, group in enumerate(net.output) if group[0] in named]):
        found = found.select(axis, 0)
    return f.scale * found.reshape(*(s for s in found.shape[:-2]), *weight.shape[-2:])


def region(kind: Kind, site: Site, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns of a site: gate and up of experts side by side, in gpt-oss row by row in turn."""
    rows, cols = torch.arange(weight.shape[-2]), torch.arange(weight.shape[-1])
    first, *parts = site.proj.split("/")
    if kind.experts and first == "experts_gate_up_proj":
        number, half = int(parts.pop(0).removeprefix("out:")), len(rows) // 2
        rows = rows[number::2] if kind.experts == "gpt_oss" else rows[number * half :][:half]
    for part in parts:
        side, number = part.split(":")
        if side == "out":
            rows = rows[int(number) * site.out :][: site.out]
        else:
            cols = cols[int(number) * site.inp :][: site.inp]
    return rows[:, None], cols[None]


def stored_names(base: nn.Module, site: Site) -> list[str]:
    """The names of the Parameters that hold a site's weight: one, or one for every expert."""
    known = {name for name, _ in base.named_parameters()}
    each = ((path, f"{path}.weight", f"{path}_weight", path.removesuffix("_weight")) for path in site.paths)
    return [next(name for name in names if name in known) for names in each]


def replaced(
    kind: Kind, base: nn.Module, model: nn.Module, f: Factorization, values: Mapping[ParameterSpec, Tensor]
) -> dict[str, Tensor]:
    """Every adapted Parameter of the base model with the updates of its sites added."""
    changes: dict[str, Tensor] = {}
    for place in bank_of(model).layouts["default"].site_layouts:
        names = stored_names(base, place.site)
        stored = [kind.matrix(base.get_parameter(name).detach()) for name in names]
        weight = torch.stack(stored) if place.site.listed else stored[0]
        rows, cols = region(kind, place.site, weight)
        part = weight[..., rows, cols]
        update = dense(place, values, f, part).expand(part.shape)
        zero = torch.zeros_like(weight)
        index = (torch.arange(len(weight))[:, None, None], rows, cols) if weight.dim() == 3 else (rows, cols)
        whole = zero.index_put(index, update)
        for name, change in zip(names, whole if place.site.listed else [whole], strict=True):
            changes[name] = changes.get(name, 0) + change
    found = {}
    for name, change in changes.items():
        stored = base.get_parameter(name).detach()
        found[name] = stored + kind.back(change, stored)
    return found
