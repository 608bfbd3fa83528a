"""Before the first step.

OPT-1.3B's width and depth, q_proj, k_proj, v_proj, out_proj, in bfloat16. Planning from an empty cache; both beyond
the creation of the model.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from statistics import median
from typing import Any

import peft
import torch
from torch import nn

import tnpeft
from bench import driver, models
from bench.driver import once
from tnpeft.nn.executor import program
from tnpeft.planning import planner, search

# Weights are random; from 12 to 384 sites the number of layers grows, at four projections each.
OPTIONS = {"sites": (12, 24, 48, 96, 192, 384), "samples": 3}
PUBLISHED = {"attach": "--clock cpu"}
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
PEFT, TENSLORA = "PEFT LoRA r=8", "tenslora qkv_depth ranks=8"
FAMILIES = ("lora rank=8", "cp rank=21", "lorta rank=8", TENSLORA, "vera rank=256")
IMPORTS = {
    "import tnpeft": "import tnpeft",
    "import tnpeft, count": "import tnpeft as t; t.parameters(t.families.cp(rank=21), model='facebook/opt-1.3b')",
    "import tnpeft, peft": "import tnpeft, peft",
    "import peft": "import peft",
}


def family(title: str, layers: int) -> Any:
    """Return a family; TensLoRA's ranks are no larger than what they run over."""
    return models.family(f"tenslora qkv_depth ranks=(8, 8, 4, {min(8, layers)})" if title == TENSLORA else title)


def model(layers: int) -> nn.Module:
    """Return an OPT decoder in bfloat16 with weights as they come; its feed-forward part is kept small."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return models.opt(2048, 32, layers, ffn_dim=64, vocab_size=64, dtype="bfloat16").to(torch.bfloat16)


def imported() -> dict[str, float]:
    """Return wall seconds of fresh interpreters, the interpreter's own start subtracted."""
    runs = {name: [sys.executable, "-c", code] for name, code in {"": "pass", **IMPORTS}.items()}
    found = {name: once(partial(subprocess.run, run, check=True), "wall")[1] for name, run in runs.items()}
    return {name: value - found[""] for name, value in found.items() if name}


def attached(options: driver.Options, layers: int, title: str) -> dict[str, Any]:
    """Return seconds to attach one family to a new model, and to plan for its sites, from an empty cache."""
    planning, attaching = [], []

    def timed(call: Any, *given: Any) -> tuple[Any, float]:
        for remembered in (search._search, planner.planned, program._program):
            remembered.cache_clear()
        return once(partial(call, *given), options.clock)

    for _ in range(options.samples):
        config = peft.LoraConfig(r=8) if title == PEFT else tnpeft.TensorNetworkConfig(network=family(title, layers))
        config.target_modules = list(TARGETS)
        found, seconds = timed(peft.get_peft_model, model(layers), config)
        attaching.append(seconds)
        if title != PEFT:
            layouts = found.base_model.model.factor_bank.layouts["default"].site_layouts
            planning.append(timed(lambda all_: [program.program(its.network, its.sizes) for its in all_], layouts)[1])
    row = {"family": title, "sites": len(TARGETS) * layers, "parameters": models.trained(found)}
    return {**row, "attach s": median(attaching)} | ({"of which planning s": median(planning)} if planning else {})


def measure(options: driver.Options) -> dict[str, Any]:
    """Return imports, counts, attaching at OPT-1.3B's 96 sites, and growth."""
    rows = [attached(options, 24, title) for title in (*FAMILIES, PEFT)]
    for row in rows[:-1]:
        f = family(row["family"], 24)
        count = partial(tnpeft.parameters, f, model="facebook/opt-1.3b", targets=list(TARGETS))
        row["count s"] = median(once(count, "cpu")[1] for _ in range(options.samples))
    grown = ("lora rank=8", "cp rank=21", TENSLORA)
    growth = [attached(options, sites // len(TARGETS), title) for sites in options.sites for title in grown]
    return {"imports": imported(), "attach": rows, "growth": growth}


def tables(data: Any) -> dict[str, driver.Rows]:
    """Return attaching, imports (wall seconds of a fresh interpreter beyond its start), and growth."""
    return {
        "": data["attach"],
        "Imports, wall seconds of a fresh interpreter beyond its own start": [
            {"what": name, "s": value} for name, value in data["imports"].items()
        ],
        "Growth with the number of sites": data["growth"],
    }
