"""Cost of preconditioned steps beside a training step: a random-weight OPT, LoRA and lines of the same size."""

from __future__ import annotations

import argparse
import time

import peft
import torch
from transformers import OPTConfig, OPTForCausalLM

import tnpeft


def seconds(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, batch: dict, repeats: int
) -> tuple[float, float]:
    """Return the median seconds of a whole step and of the optimizer's part."""
    whole, own = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        whole.append(time.perf_counter() - start)
        own.append(time.perf_counter() - middle)
    return sorted(whole[1:])[repeats // 2], sorted(own[1:])[repeats // 2]


def main() -> None:
    """Print one row for each family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=args.width,
        ffn_dim=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        vocab_size=1000,
        word_embed_proj_dim=args.width,
    )
    ids = torch.randint(5, 1000, (4, args.tokens // 4))
    print(f"{'family':14} {'step ms':>8} {'AdamW ms':>9} {'+ preconditioned ms':>20} {'+ invariant ms':>15}")
    for name in ("lora", "moslora", "tucker", "tensor_train", "cp", "lotr", "tenslora"):
        cells = []
        for mode in (None, False, True):
            model = peft.get_peft_model(
                OPTForCausalLM(config),
                tnpeft.TensorNetworkConfig(network=name, target_modules=["q_proj", "v_proj"]),
            )
            optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, relative_step=1e-3))
            if mode is not None:
                tnpeft.optim.precondition(optimizer, model, invariant=mode)
            cells.append(seconds(optimizer, model, {"input_ids": ids, "labels": ids}, args.repeats))
        (whole, plain), (_, entry), (_, invariant) = cells
        more = (entry - plain, invariant - plain)
        print(f"{name:14} {1e3 * whole:8.1f} {1e3 * plain:9.2f} {1e3 * more[0]:20.2f} {1e3 * more[1]:15.2f}")


if __name__ == "__main__":
    main()
