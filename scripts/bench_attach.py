"""What it takes before the first step: import, count, plan, attach; and how attaching grows with the number of sites.

Models have random bfloat16 weights of OPT-1.3B's shape (width 2048, 24 layers); from 12 to 384 sites the number of
layers grows, at four projections each. Writes ``attach.json``, ``attach.md`` and ``attach.svg``.

    python scripts/bench_attach.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import peft
import torch
from torch import nn

import tnpeft
from tnpeft.networks import Factorization
from tnpeft.nn.executor import program as execute
from tnpeft.planning import planner, search

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
IMPORTS = {
    "import tnpeft": "import tnpeft",
    "import tnpeft, count": "import tnpeft as t; t.parameters(t.families.cp(rank=21), model='facebook/opt-1.3b')",
    "import tnpeft, peft": "import tnpeft, peft",
    "import peft": "import peft",
}


def families(layers: int) -> dict[str, Factorization]:
    """The families that are attached; every one at the setting of its paper or at rank 8."""
    f = tnpeft.families
    return {
        "lora rank=8": f.lora(rank=8),
        "cp rank=21": f.cp(rank=21),
        "lorta rank=8": f.lorta(rank=8),
        "tenslora qkv_depth ranks=8": f.tenslora("qkv_depth", ranks=(8, 8, 4, min(8, layers))),
        "vera rank=256": f.vera(rank=256),
    }


def model(layers: int) -> nn.Module:
    """An OPT decoder, 2048 wide, in bfloat16 with weights as they come; its feed-forward part is kept small."""
    from transformers import OPTConfig, OPTModel
    from transformers.initialization import no_init_weights

    config = OPTConfig(
        hidden_size=2048,
        ffn_dim=64,
        num_attention_heads=32,
        num_hidden_layers=layers,
        word_embed_proj_dim=2048,
        vocab_size=64,
        dtype="bfloat16",
    )
    with no_init_weights():
        return OPTModel(config).to(torch.bfloat16)


def seconds(run: Callable[[], Any], samples: int, clock: str) -> float:
    """The median of some samples."""
    now, found = _bench.CLOCKS[clock], []
    for _ in range(samples):
        start = now()
        run()
        found.append(now() - start)
    return median(found)


def imported(samples: int) -> dict[str, float]:
    """Wall seconds of fresh interpreters, the interpreter's own start subtracted."""

    def started(code: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True), samples, "wall")

    bare = started("pass")
    return {name: started(code) - bare for name, code in IMPORTS.items()}


def forget() -> None:
    """Drop every plan and program that is kept, so that the next one is searched anew."""
    search._search.cache_clear()
    planner.planned.cache_clear()
    execute._program.cache_clear()


def attached(layers: int, name: str, targets: Sequence[str], samples: int, clock: str) -> dict[str, Any]:
    """Seconds to plan and attach one family to a new model, from an empty cache."""
    f = families(layers)[name]
    now, planning, attaching = _bench.CLOCKS[clock], [], []
    for _ in range(samples):
        base = model(layers)
        config = tnpeft.TensorNetworkConfig(network=f, target_modules=list(targets))
        forget()
        start = now()
        adapted = peft.get_peft_model(base, config)
        attaching.append(now() - start)
        site_layouts = adapted.base_model.model.factor_bank.layouts["default"].site_layouts
        forget()
        start = now()
        for site_layout in site_layouts:
            execute.program(site_layout.network, site_layout.sizes)
        planning.append(now() - start)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {
        "family": name,
        "sites": len(site_layouts),
        "parameters": trainable,
        "attach s": median(attaching),
        "of which planning s": median(planning),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Imports, counts, attaching at OPT-1.3B's 96 sites, and growth."""
    counts = {
        name: seconds(
            lambda f=f: tnpeft.parameters(f, model="facebook/opt-1.3b", targets=list(TARGETS)), options.samples, "cpu"
        )
        for name, f in families(24).items()
    }
    rows = [attached(24, name, TARGETS, options.samples, options.clock) for name in families(24)]
    for row in rows:
        row["count s"] = counts[row["family"]]
    peers = peft.LoraConfig(r=8, target_modules=list(TARGETS))
    theirs = []
    for _ in range(options.samples):
        base, now = model(24), _bench.CLOCKS[options.clock]
        start = now()
        peft.get_peft_model(base, peers)
        theirs.append(now() - start)
    rows.append({"family": "PEFT LoRA r=8", "sites": 96, "attach s": median(theirs)})
    growth = [
        attached(sites // 4, name, TARGETS, options.samples, options.clock)
        for sites in options.sites
        for name in ("lora rank=8", "cp rank=21", "tenslora qkv_depth ranks=8")
    ]
    return {
        "imports": imported(1),
        "attach": rows,
        "growth": growth,
        "machine": _bench.machine(),
        "clock": options.clock,
        "written": time.strftime("%Y-%m-%d"),
    }


def report(data: Mapping[str, Any]) -> str:
    """The measurement as a page."""
    m = data["machine"]
    return (
        "# Before the first step\n\n"
        f"OPT-1.3B's width and depth, {', '.join(TARGETS)}, bfloat16, {m['threads']} thread, {data['clock']} clock, "
        f"load {m['load']} on {m['cores']} cores ({m['processor']}; torch {m['torch']}, peft {m['peft']}). Planning "
        "from an empty cache; both beyond the creation of the model.\n\n"
        + _bench.markdown(data["attach"])
        + "\n## Imports\n\nWall seconds of a fresh interpreter beyond its own start.\n\n"
        + _bench.markdown({"what": name, "s": value} for name, value in data["imports"].items())
        + "\n## Growth with the number of sites\n\n"
        + _bench.markdown(data["growth"])
    )


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Seconds to attach against the number of sites."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.2))
    axes = figure.subplots()
    for name in dict.fromkeys(row["family"] for row in data["growth"]):
        rows = [row for row in data["growth"] if row["family"] == name]
        axes.loglog([row["sites"] for row in rows], [row["attach s"] for row in rows], "o-", label=name)
    first, last = data["growth"][0], data["growth"][-1]
    ends = [first["sites"], last["sites"]]
    axes.loglog(ends, [first["attach s"] * end / ends[0] for end in ends], "k:", label="linear")
    axes.set_xlabel("sites")
    axes.set_ylabel("seconds to attach")
    axes.legend(fontsize=8)
    _bench.save_figure(figure, path)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[12, 24, 48, 96, 192, 384])
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=_bench.CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, default=_bench.TABLES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = measure(options)
    _bench.write(options.out, "attach", data, report(data))
    plot(data, options.out / "attach.svg")
    print(report(data))


if __name__ == "__main__":
    main()
