"""What it takes before the first step: import, count, plan, attach; and how attaching grows with the number of sites.

Models have random bfloat16 weights of OPT-1.3B's shape (width 2048, 24 layers); from 12 to 384 sites the number of
layers grows, at four projections each.

    python scripts/bench.py attach
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import peft
import torch
from torch import nn

import tnpeft
from bench import models
from bench.driver import once
from tnpeft.networks import Factorization
from tnpeft.nn.executor import program
from tnpeft.planning import planner, search

TITLE = "Before the first step"
ABOUT = """OPT-1.3B's width and depth, q_proj, k_proj, v_proj, out_proj, in bfloat16. Planning from an empty cache;
both beyond the creation of the model."""
OPTIONS = {"sites": (12, 24, 48, 96, 192, 384), "samples": 3}
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
IMPORTS = {
    "import tnpeft": "import tnpeft",
    "import tnpeft, count": "import tnpeft as t; t.parameters(t.families.cp(rank=21), model='facebook/opt-1.3b')",
    "import tnpeft, peft": "import tnpeft, peft",
    "import peft": "import peft",
}


def families(layers: int) -> dict[str, Factorization]:
    """Return the families that are attached; every one at the setting of its paper or at rank 8."""
    f = tnpeft.families
    return {
        "lora rank=8": f.lora(rank=8),
        "cp rank=21": f.cp(rank=21),
        "lorta rank=8": f.lorta(rank=8),
        "tenslora qkv_depth ranks=8": f.tenslora("qkv_depth", ranks=(8, 8, 4, min(8, layers))),
        "vera rank=256": f.vera(rank=256),
    }


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


def forget() -> None:
    """Drop every plan and program that is kept, so that the next one is searched for."""
    search._search.cache_clear()
    planner.planned.cache_clear()
    program._program.cache_clear()


def attached(layers: int, name: str, targets: Sequence[str], samples: int, clock: str) -> dict[str, Any]:
    """Return seconds to plan and attach one family to a new model, from an empty cache."""
    planning, attaching = [], []
    for _ in range(samples):
        base = model(layers)
        config = tnpeft.TensorNetworkConfig(network=families(layers)[name], target_modules=list(targets))
        forget()
        found, seconds = once(partial(peft.get_peft_model, base, config), clock)
        attaching.append(seconds)
        site_layouts = found.base_model.model.factor_bank.layouts["default"].site_layouts
        forget()
        plan = lambda all_=site_layouts: [program.program(its.network, its.sizes) for its in all_]  # noqa: E731
        planning.append(once(plan, clock)[1])
    return {
        "family": name,
        "sites": len(site_layouts),
        "parameters": sum(p.numel() for p in found.parameters() if p.requires_grad),
        "attach s": median(attaching),
        "of which planning s": median(planning),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return imports, counts, attaching at OPT-1.3B's 96 sites, and growth."""
    how = options.samples, options.clock
    rows = [attached(24, name, TARGETS, *how) for name in families(24)]
    for row, f in zip(rows, families(24).values(), strict=True):
        count = partial(tnpeft.parameters, f, model="facebook/opt-1.3b", targets=list(TARGETS))
        row["count s"] = median(once(count, "cpu")[1] for _ in range(options.samples))
    config = peft.LoraConfig(r=8, target_modules=list(TARGETS))
    bases = (model(24) for _ in range(options.samples))
    theirs = [once(partial(peft.get_peft_model, base, config), options.clock)[1] for base in bases]
    rows.append({"family": "PEFT LoRA r=8", "sites": 96, "attach s": median(theirs)})
    grown = ("lora rank=8", "cp rank=21", "tenslora qkv_depth ranks=8")
    growth = [attached(sites // 4, name, TARGETS, *how) for sites in options.sites for name in grown]
    return {"imports": imported(), "attach": rows, "growth": growth}


def tables(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return attaching, imports (wall seconds of a fresh interpreter beyond its start), and growth."""
    return {
        "": data["attach"],
        "Imports, wall seconds of a fresh interpreter beyond its own start": [
            {"what": name, "s": value} for name, value in data["imports"].items()
        ],
        "Growth with the number of sites": data["growth"],
    }
