"""Before the first step.

OPT-1.3B's width and depth, q_proj, k_proj, v_proj, out_proj, in bfloat16. Planning from an empty cache; both beyond
the creation of the model.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import peft
import torch
from torch import nn
from transformers.initialization import no_init_weights

import tnpeft
from bench import driver, models
from bench.driver import once
from tnpeft.nn.executor import program
from tnpeft.planning import planner, search

# From 12 to 384 sites the number of layers grows, at four projections each.
OPTIONS = {"sites": (12, 24, 48, 96, 192, 384), "samples": 3}
PUBLISHED = {"attach": "--clock cpu"}
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
PEFT, TENSLORA = "PEFT LoRA r=8", "tenslora qkv_depth ranks=(8, 8, 4, 3)"
FAMILIES = ("lora rank=8", "cp rank=21", "lorta rank=8", TENSLORA, "vera rank=256")
IMPORTS = {
    "": "pass",
    "import tnpeft": "import tnpeft",
    "import tnpeft, count": "import tnpeft as t; t.parameters(t.families.cp(rank=21), model='facebook/opt-1.3b')",
    "import tnpeft, peft": "import tnpeft, peft",
    "import peft": "import peft",
}


def model(layers: int) -> nn.Module:
    """Return an OPT decoder in bfloat16 with weights as they come; its feed-forward part is kept small."""
    with no_init_weights():
        return models.opt(2048, 32, layers, ffn_dim=64, vocab_size=64, dtype="bfloat16").to(torch.bfloat16)


def attached(options: driver.Options, layers: int, title: str) -> dict[str, Any]:
    """Return seconds to attach one family to a new model, and to plan for its sites, from an empty cache."""
    seconds: dict[str, list[float]] = {}

    def fresh(what: str, call: Callable[..., Any], *given: Any) -> Any:
        for remembered in (search._search, planner.planned, program._program):
            remembered.cache_clear()
        found, took = once(partial(call, *given), options.clock)
        seconds.setdefault(what, []).append(took)
        return found

    for _ in range(options.samples):
        config = models.config(title, targets=TARGETS)
        found = fresh("attach s", peft.get_peft_model, model(layers), config)
        if title != PEFT:
            sites = found.base_model.model.factor_bank.layouts["default"].site_layouts
            fresh(
                "of which planning s", lambda every: [program.program(its.network, its.sizes) for its in every], sites
            )
    row = {"family": title, "sites": len(TARGETS) * layers, "parameters": models.trained(found)}
    return row | {what: median(each) for what, each in seconds.items()}


def measure(options: driver.Options) -> dict[str, Any]:
    """Return imports (less the interpreter's own start), attaching and counting at 96 sites, and growth."""
    runs = {name: partial(subprocess.run, [sys.executable, "-c", text], check=True) for name, text in IMPORTS.items()}
    imports = {name: once(run, "wall")[1] for name, run in runs.items()}
    start = imports.pop("")
    rows = [attached(options, 24, title) for title in (*FAMILIES, PEFT)]
    for row in rows[:-1]:
        f = models.family(row["family"])
        count = partial(tnpeft.parameters, f, model="facebook/opt-1.3b", targets=list(TARGETS))
        row["count s"] = median(once(count, "cpu")[1] for _ in range(options.samples))
    grown = ("lora rank=8", "cp rank=21", TENSLORA)
    growth = [attached(options, sites // len(TARGETS), title) for sites in options.sites for title in grown]
    return {"imports": {name: its - start for name, its in imports.items()}, "attach": rows, "growth": growth}


def tables(data: Any) -> dict[str, driver.Rows]:
    """Return attaching, imports, and growth."""
    imports = [{"what": name, "s": value} for name, value in data["imports"].items()]
    return {
        "": data["attach"],
        "Imports, wall seconds of a fresh interpreter beyond its own start": imports,
        "Growth with the number of sites": data["growth"],
    }
