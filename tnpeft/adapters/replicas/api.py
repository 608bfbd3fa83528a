"""Many adapters trained in one pass over one frozen model: their loss, clipping and learning rates, and each alone.

An adapter with ``replicas=K`` is K adapters of one network. A batch is K equal contiguous blocks of rows, block k for
replica k, and every factor carries ``replica`` as its first axis. Summed over the replicas, the means of their own
losses give each the gradient that it would have alone; AdamW works entry by entry; so with :func:`clip` in place of
clipping all at once, and :func:`learning_rates`, K runs are one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import Optimizer

from tnpeft.adapters.placement import extract_replica, match_parameters
from tnpeft.adapters.rollback import or_as_before
from tnpeft.adapters.state import arrays, bank_of, set_factors, stacked
from tnpeft.adapters.storage.contents import PEFT_PREFIX, factor_shapes
from tnpeft.adapters.storage.files import save as write
from tnpeft.adapters.storage.files import written
from tnpeft.layout import Layout, ParameterSpec
from tnpeft.networks import REPLICA, NetworkError

_IGNORED = -100  # the label that transformers leaves out of a loss


def losses(logits: Tensor, labels: Tensor, replicas: int) -> Tensor:
    """The mean next-token cross-entropy of every replica, ``[replicas]``; train on its sum.

    Args:
        logits: of a causal language model, ``[rows, tokens, vocabulary]``.
        labels: the tokens themselves, ``[rows, tokens]``; -100 leaves one out.
        replicas: number of blocks of rows.

    Raises:
        NetworkError: the batch size is not divisible by the number of replicas.

    >>> losses(torch.zeros(4, 3, 8), torch.ones(4, 3, dtype=torch.long), 2).exp()
    tensor([8., 8.])
    """
    if len(labels) % replicas:
        raise NetworkError(
            f"batch size {len(labels)} is not divisible by {replicas} replicas",
            remedy="give each replica equally many rows",
        )
    wanted = labels[:, 1:].reshape(-1)
    found = logits[:, :-1].reshape(len(wanted), -1)
    each = cross_entropy(found, wanted, ignore_index=_IGNORED, reduction="none").reshape(replicas, -1)
    return each.sum(1) / (wanted.reshape(replicas, -1) != _IGNORED).sum(1)


def clip(model: nn.Module, max_norm: float, adapter: str = "default") -> Tensor:
    """Scale the gradient of every replica to at most ``max_norm``; the norms before, ``[replicas]``.

    It is ``torch.nn.utils.clip_grad_norm_`` for each replica on its own.

    Raises:
        NetworkError: the model has no such adapter, or it has no replicas.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"], replicas=2)
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> model.base_model.model[0](torch.ones(2, 4) * torch.tensor([[1.0], [0.0]])).sum().backward()
    >>> clip(model, 1.0) > 1, clip(model, 1.0) > 1 + 1e-6
    (tensor([ True, False]), tensor([False, False]))
    """
    trained = [*_trained(model, adapter).values()]
    grads = [array.grad for array in trained if array.grad is not None]
    if not grads:
        return trained[0].new_zeros(len(trained[0]))
    norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads])
    norm = torch.linalg.vector_norm(norms, dim=0)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(_spread(factor, grad))
    return norm


def learning_rates(
    optimizer: Optimizer, model: nn.Module, rates: Sequence[float], adapter: str = "default"
) -> LearningRates:
    """Let replica k learn at ``rates[k]`` times the optimizer's own rate, schedules and multipliers included.

    After each step what an array of the adapter has moved is scaled, which is exact for every optimizer whose step is
    proportional to its rate: SGD, Adam, AdamW, RMSprop and the like, not LBFGS. Rates of at most 1 lose least to
    rounding: give the optimizer the largest. ``rates`` of the result may be changed between steps.

    Raises:
        NetworkError: the model has no such adapter, or it has not one replica for each rate.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"], replicas=2)
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> optimizer = torch.optim.SGD(tnpeft.parameter_groups(model, lr=1.0))
    >>> rates = learning_rates(optimizer, model, [1.0, 0.5])
    >>> model.base_model.model[0](torch.ones(2, 4)).sum().backward()
    >>> wanted = {n: p.grad for n, p in model.named_parameters() if n.endswith(".B")}
    >>> optimizer.step()
    >>> [bool(torch.allclose(-rate * g[k], tnpeft.factors(model)["B"][k])) for g in wanted.values()
    ...  for k, rate in enumerate(rates.rates)]
    [True, True]
    """
    found = _trained(model, adapter)
    count = next(iter(found)).shape[0]
    if len(rates) != count:
        raise NetworkError(f"{len(rates)} rates for {count} replicas", remedy="give one rate for each replica")
    return LearningRates(optimizer, [*found.values()], rates)


class LearningRates:
    """A hook that :func:`learning_rates` puts on an optimizer; :meth:`remove` takes it off again."""

    def __init__(self, optimizer: Optimizer, arrays: Sequence[Tensor], rates: Sequence[float]) -> None:
        self.rates = [float(rate) for rate in rates]
        self._arrays, self._before = [*arrays], list[Tensor]()
        self._hooks = [
            optimizer.register_step_pre_hook(self._note),
            optimizer.register_step_post_hook(self._scale),
        ]

    def _note(self, *_: Any) -> None:
        self._before = [array.detach().clone() for array in self._arrays]

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        for array, before in zip(self._arrays, self._before, strict=True):
            rates = torch.tensor(self.rates, dtype=array.dtype, device=array.device)
            array.copy_(torch.lerp(before, array, _spread(rates, array)))
        self._before = []

    def remove(self) -> None:
        """Let all replicas learn at the optimizer's own rate again."""
        for hook in self._hooks:
            hook.remove()


# ---- one of them


def replica(model: nn.Module, k: int, adapter: str = "default") -> dict[str, Tensor]:
    """The factors of replica k as :func:`tnpeft.factors` gives those of an adapter that was trained alone. Copies.

    Raises:
        NetworkError: the model has no such adapter or replica.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"], replicas=3)
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> {name: tuple(value.shape) for name, value in replica(model, 2).items()}
    {'B': (1, 1, 8, 2), 'A': (1, 1, 2, 4)}
    """
    return stacked(*_own(model, k, adapter, ("trainable", "frozen", "constant"))[1:])


def parameters(model: nn.Module, k: int, adapter: str = "default") -> int:
    """Elements that replica k trains: what an adapter of its ranks would train alone.

    Raises:
        NetworkError: the model has no such adapter or replica.

    >>> import peft, tnpeft
    >>> its = {"network": "lora", "target_modules": ["0"], "replicas": 2, "replica_ranks": [{"r": 1}, {"r": 3}]}
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), tnpeft.TensorNetworkConfig(**its))
    >>> parameters(model, 0), parameters(model, 1)
    (12, 36)
    """
    return _own(model, k, adapter, ())[1].count()


def attach(model: nn.Module, k: int, name: str, adapter: str = "default") -> None:
    """Add a copy of replica k to the model as the ordinary adapter ``name``: to use, merge, export or train on.

    It is inactive until ``model.set_adapter(name)``.

    Raises:
        NetworkError: the model has no such adapter or replica, the name is taken, or frozen factors are not those of
            its seed; the model is as before then.

    >>> import peft, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0"], replicas=3)
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    >>> attach(model, 2, "third")
    >>> model.set_adapter("third")
    >>> type(model.merge_and_unload()[0])
    <class 'torch.nn.modules.linear.Linear'>
    """
    config = _config(model, k, adapter)
    its: Any = model
    if name in its.peft_config:
        raise NetworkError(f"the adapter {name!r} exists already", remedy="choose another name")
    values = replica(model, k, adapter)
    with or_as_before(model):
        if isinstance(model, (PeftModel, BaseTuner)):
            tuner: Any = model.base_model if isinstance(model, PeftModel) else model
            active = [*tuner.active_adapters]
            tuner.peft_config[name] = config
            tuner.inject_adapter(tuner.model, name)
            tuner.set_adapter(active)
        else:  # transformers' add_adapter, or peft.inject_adapter_in_model
            layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            active = [*layers[0].active_adapters]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # so we did
                inject_adapter_in_model(config, model, name)
            for layer in layers:
                layer.set_adapter(active)
        set_factors(model, values, name)


def save(model: nn.Module, k: int, folder: str | Path, adapter: str = "default") -> None:
    """Write replica k as an ordinary adapter: ``peft.PeftModel.from_pretrained`` loads the folder.

    Raises:
        NetworkError: the model has no such adapter or replica.

    >>> import peft, tempfile, tnpeft
    >>> config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 2}, target_modules=["0.0"], replicas=3)
    >>> model = peft.get_peft_model(nn.Sequential(nn.Sequential(nn.Linear(4, 8))), config)
    >>> folder = tempfile.mkdtemp()
    >>> save(model, 2, folder)
    >>> again = peft.PeftModel.from_pretrained(nn.Sequential(nn.Sequential(nn.Linear(4, 8))), folder)
    >>> bool((tnpeft.factors(again)["A"] == replica(model, 2)["A"]).all()), again.peft_config["default"].seed
    (True, 2)
    """
    kinds = ("trainable", "frozen") if _config(model, k, adapter).save_frozen else ("trainable",)
    config, one, values = _own(model, k, adapter, kinds)
    named = zip(factor_shapes(config, one), values.values(), strict=True)
    tensors = {f"{PEFT_PREFIX}{name}": value for name, value in named}
    with written(folder) as new:
        write(tensors, Path(new, SAFETENSORS_WEIGHTS_NAME))
        config.save_pretrained(str(new))


# ---- inside


def _trained(model: nn.Module, adapter: str) -> dict[ParameterSpec, Tensor]:
    bank = bank_of(model, adapter)
    found = arrays(model, bank, adapter, kinds=("trainable",))
    if any(REPLICA not in param.indices for param in found):
        raise NetworkError(f"{adapter!r} is one adapter", remedy="configure it with replicas=")
    return found


def _config(model: nn.Module, k: int, adapter: str) -> Any:
    """The configuration of replica k as an adapter of its own, as if read from a file."""
    bank_of(model, adapter)
    config: Any = getattr(model, "peft_config", {}).get(adapter)
    if config is None:
        raise NetworkError(
            "the model keeps no configuration of its adapters", remedy="attach them with peft.get_peft_model"
        )
    if config.replicas == 1 or isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < config.replicas:
        raise NetworkError(f"unknown replica {k!r}", remedy=f"{adapter!r} has {config.replicas}, from 0 on")
    return config.extract_replica(k)


def _own(
    model: nn.Module, k: int, adapter: str, kinds: tuple[str, ...]
) -> tuple[Any, Layout, dict[ParameterSpec, Tensor]]:
    """Configuration and layout of replica k alone, and its arrays without what pads them to the ranks of others."""
    config, bank = _config(model, k, adapter), bank_of(model, adapter)
    held, one = (
        arrays(model, bank, adapter, kinds=kinds),
        extract_replica(bank.layouts[adapter], config.factorization),
    )
    found = {}
    for many, param in match_parameters(bank.layouts[adapter], one):
        if many in held:
            array = held[many][k] if REPLICA in many.indices else held[many]
            found[param] = array[tuple(map(slice, param.shape))]
    return config, one, found


def _spread(values: Tensor, array: Tensor) -> Tensor:
    return values.to(array.dtype).reshape(-1, *(1,) * (array.dim() - 1))
