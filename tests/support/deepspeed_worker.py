"""Two processes that take a step under DeepSpeed; the factors are compared with one process's step.

Usage: deepspeed_worker.py PORT. Each prints one line per case; a case that differs ends it with an error.
"""

from __future__ import annotations

import os

import torch
from distributed_worker import FAMILIES, IDS, both_ranks, build, loss, reference, say

from tnpeft.networks import NetworkError

STAGES = (1, 2, 3)


def step(key: str, checkpointing: str, rank: int, stage: int) -> str:
    """A step of length one under a stage of ZeRO, against the gradients of one process."""
    wanted = reference(key)
    model = build(key, checkpointing)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    import deepspeed

    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    try:
        engine.backward(loss(engine, IDS[2 * rank : 2 * rank + 2]))
    except NetworkError as error:
        return "refused" if "use_reentrant" in str(error) else str(error)
    engine.step()
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    with deepspeed.zero.GatheredParameters([*trained.values()], enabled=stage == 3):
        for name, parameter in trained.items():
            error = float((start[name] - parameter - wanted[name]).abs().max()) / scale
            assert error < 1e-5, f"ZeRO {stage} {key} {checkpointing}: {name} is off by {error:.1e}"
    return "equal"


def main(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    for stage in STAGES:
        for key in FAMILIES:
            for checkpointing in ("none", "nonreentrant", "reentrant"):
                say("ZeRO", stage, key, checkpointing, step(key, checkpointing, rank, stage))


if __name__ == "__main__":
    both_ranks(main)
