"""Which functions of the package a LoRA's fused forward and backward visit, and in how many files.

python scripts/trace_functions.py
"""

from __future__ import annotations

import cProfile
from pathlib import Path
from types import CodeType
from typing import Any

import peft
import torch
from torch import nn

import tnpeft

PACKAGE = Path(tnpeft.__file__).parent


def main() -> None:
    """Print them, file by file."""
    config = tnpeft.TensorNetworkConfig(network="lora", ranks={"r": 4}, target_modules=["0"], tokens=32)
    layer: Any = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), config).base_model.model[0]
    x = torch.randn(32, 64, requires_grad=True)
    layer(x).sum().backward()  # what is remembered and generated is there afterwards
    with cProfile.Profile() as profile:
        layer(x).sum().backward()
    codes = [entry.code for entry in profile.getstats() if isinstance(entry.code, CodeType)]
    own = [code for code in codes if Path(code.co_filename).is_relative_to(PACKAGE)]
    inner = ("<listcomp>", "<genexpr>")
    found = {(code.co_filename, code.co_firstlineno): code.co_qualname for code in own if code.co_name not in inner}
    for (file, _), name in sorted(found.items()):
        print(f"{Path(file).relative_to(PACKAGE.parent)}: {name}")
    print(f"{len(found)} functions in {len({file for file, _ in found})} files")


if __name__ == "__main__":
    main()
