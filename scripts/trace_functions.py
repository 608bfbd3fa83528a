"""Which functions of the package a LoRA's fused forward and backward visit, and in how many files.

python scripts/trace_functions.py
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import torch
from torch import nn

import tnpeft

PACKAGE = Path(tnpeft.__file__).parent


def visited(width: int = 64, rank: int = 4, tokens: int = 32) -> list[tuple[str, str]]:
    """Return file and qualified name of each function, in the order of first visits."""
    config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": rank}, target_modules=["0"], tokens=tokens)
    layer: Any = peft.get_peft_model(nn.Sequential(nn.Linear(width, width)), config).base_model.model[0]
    x = torch.randn(tokens, width, requires_grad=True)
    layer(x).sum().backward()  # what is remembered and generated is there afterwards
    found: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        file = Path(frame.f_code.co_filename)
        inner = frame.f_code.co_name in ("<listcomp>", "<genexpr>")
        if event == "call" and file.is_relative_to(PACKAGE) and not inner:
            found[str(file.relative_to(PACKAGE.parent)), frame.f_code.co_qualname] = None

    threading.setprofile(note)  # backward passes may run in threads of their own
    sys.setprofile(note)
    try:
        layer(x).sum().backward()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return [*found]


def main() -> None:
    """Print them."""
    functions = visited()
    for file, name in functions:
        print(f"{file}: {name}")
    print(f"{len(functions)} functions in {len({file for file, _ in functions})} files")


if __name__ == "__main__":
    main()
