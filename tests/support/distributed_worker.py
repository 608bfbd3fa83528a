"""Two gloo processes: they train a step under DDP, FSDP1 or FSDP2; gradients are compared with one process's.

Usage: distributed_worker.py PORT. Each prints one line per case; a case that differs ends it with an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from adapter_models import NETWORKS, adapted, opt, shake
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from tnpeft.adapters.layer import shared_input
from tnpeft.networks import NetworkError

FAMILIES: dict[str, dict[str, Any]] = {
    "lora": NETWORKS["lora"],
    "cp": NETWORKS["cp"],
    "lorta": {
        "network": "A[out r] B[dim r] H[head r] P[proj r] L[layer r] -> layer proj out (head dim)",
        "ranks": {"r": 3},
    },
    "tenslora": {
        "network": "G[a b c d] U1[inp a] U2[out b] U3[proj c] U4[layer d] -> layer proj out inp",
        "ranks": {"a": 3, "b": 3, "c": 2, "d": 2},
    },
}  # fmt: skip
SHARED = ("lorta", "tenslora")
IDS = torch.arange(2, 30).reshape(4, 7)


def build(key: str, checkpointing: str) -> Any:
    model = adapted("lora", opt(layers=3), **FAMILIES[key]).train()
    shake(model)
    if checkpointing != "none":
        model.enable_input_require_grads()
        reentrant = checkpointing == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


@cache
def reference(key: str) -> dict[str, Tensor]:
    model = build(key, "none")
    loss(model, IDS).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def compare(found: dict[str, Tensor | None], wanted: dict[str, Tensor], what: str) -> None:
    assert set(found) == set(wanted), what
    scale = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        gradient = found[name]
        assert gradient is not None, f"{what}: {name} has no gradient"
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        error = float((full - value).abs().max()) / scale
        assert error < 1e-5, f"{what}: {name} is off by {error:.1e}"


def data_parallel(key: str, checkpointing: str, rank: int) -> str:
    model = DistributedDataParallel(build(key, checkpointing))
    try:
        loss(model, IDS[2 * rank : 2 * rank + 2]).backward()
    except NetworkError as error:
        return "refused" if "use_reentrant" in str(error) else str(error)
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    compare(found, reference(key), f"DDP {key} {checkpointing}")
    return "equal"


def static_graph(key: str, rank: int) -> str:
    model = DistributedDataParallel(build(key, "reentrant"), static_graph=True)
    loss(model, IDS[2 * rank : 2 * rank + 2]).backward()
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    compare(found, reference(key), f"DDP static {key}")
    return "equal"


def sharded(key: str, checkpointing: str, rank: int, each: bool = False) -> str:
    """With ``each`` linear a unit of its own, whose factors are not there while another one's forward runs."""
    model = build(key, checkpointing)
    for layer in model.base_model.model.model.decoder.layers:
        for linear in [module for module in layer.modules() if hasattr(module, "input_groups")] if each else ():
            fully_shard(linear)
        fully_shard(layer)
    fully_shard(model)
    loss(model, IDS[2 * rank : 2 * rank + 2]).backward()
    compare({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, reference(key), f"FSDP2 {key}")
    return "equal"


def sharded_flat(key: str, checkpointing: str, rank: int) -> str:
    """FSDP1, a unit for each layer, whose Parameters are views of one flat array while it runs."""
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={OPTDecoderLayer})
    model = FullyShardedDataParallel(
        build(key, checkpointing), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    try:
        loss(model, IDS[2 * rank : 2 * rank + 2]).backward()
    except NetworkError as error:
        return "refused" if "use_reentrant" in str(error) else str(error)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        compare(found, reference(key), f"FSDP1 {key} {checkpointing}")
    return "equal"


def say(*words: object) -> None:
    """Print a line at once: both processes write to one pipe."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def both_ranks(main: Callable[[int], None]) -> None:
    """Run something as rank 0 here and as rank 1 in a copy of this process: the libraries are imported once."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1], "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    shared_input.MIN_ELEMENTS = 0  # inputs of any size are shared by the linears that read them
    child = os.fork()
    main(int(child == 0))
    failed = bool(child) and os.waitpid(child, 0)[1] != 0
    os._exit(failed)  # gloo's threads may end the process with an abort while Python shuts down


def main(rank: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for key in FAMILIES:
        for checkpointing in ("none", "nonreentrant", "reentrant"):
            say("DDP", key, checkpointing, data_parallel(key, checkpointing, rank))
            say("FSDP1", key, checkpointing, sharded_flat(key, checkpointing, rank))
            say("FSDP2", key, checkpointing, sharded(key, checkpointing, rank))
            say("FSDP2-each", key, checkpointing, sharded(key, checkpointing, rank, each=True))
        say("DDP-static", key, "reentrant", static_graph(key, rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    both_ranks(main)
