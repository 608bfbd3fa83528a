"""One training step of many adapters over one frozen OPT backbone, side by side: time, flops, bytes, kernels.

With ``--bare`` the backbone is nothing but the q, k and v linears of each layer, each layer's sum the input of
the next: there overheads stand out of the noise of a busy machine.

The floor is the frozen backbone with gradients flowing to the embeddings' output. All cases run in turn, a step each,
and a case's overhead is the median of its time over the floor's in the same turn, less one.

    python scripts/bench.py step --layers 2 --samples 9 --clock cpu
    python scripts/bench.py step --only "PEFT LoRA r=8" "lora rank=8" --compile --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import tnpeft
from bench import driver, meters, models
from bench.models import SHAPES, TARGETS

TITLE = "One training step over a frozen backbone"
OPTIONS = {
    **models.SHAPE,
    "bare": {"action": "store_true", "help": "the adapted linears and nothing else"},
    "batch": 8,
    "length": 128,
    **driver.DTYPE,
    **driver.DEVICE,
    "compile": False,
    **driver.ONLY,
}
CONSTRUCTIONS = ("att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth")
FAMILIES: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("lora", {"rank": 8}),
    ("lora", {"rank": 64}),
    ("cp", {"rank": 8}),
    ("cp", {"rank": 64}),
    ("lorta", {"rank": 8}),
    ("lorta", {"rank": 64}),
    *(("tenslora", {"construction": name, "ranks": 8}) for name in CONSTRUCTIONS),
    ("tenslora", {"construction": "qkv_depth", "ranks": (64, 64, 3, 2)}),
    ("tera", {"ranks": (8, 8), "out": (None,), "inp": (None,)}),
    ("tera", {"ranks": (64, 64), "out": (None,), "inp": (None,)}),
    *((name, {"rank": 8}) for name in ("lotr", "fact_tt", "fact_tk")),
    *((name, {"ranks": 8}) for name in ("metatt_4d", "metatt_5d")),
    *((name, {}) for name in ("loretta", "tt_lora", "tucker", "tensor_train", "tensor_ring", "hierarchical_tucker")),
    ("block_term", {}),
    ("refta", {"rank": 8}),
    ("lora_xs", {"rank": 8}),
    ("vera", {"rank": 256}),
    ("lokr", {"rank": 8}),
    ("krona", {}),
    ("loha", {"rank": 8}),
    ("randlora", {"rank": 32}),
    ("gralora", {"rank": 8}),
    ("miss", {"rank": 8}),
    ("monarch", {}),
    ("hira", {"rank": 8}),
    ("ia3", {}),
)


def peft_configs(targets: Sequence[str] = TARGETS) -> dict[str, Any]:
    """Return PEFT's own methods at stated ranks."""
    import peft

    common = {"target_modules": list(targets)}
    return {
        "PEFT LoRA r=8": peft.LoraConfig(r=8, lora_alpha=16, **common),
        "PEFT LoRA r=64": peft.LoraConfig(r=64, lora_alpha=16, **common),
        "PEFT VeRA r=256": peft.VeraConfig(r=256, **common),
        "PEFT LoKr r=8": peft.LoKrConfig(r=8, **common),
        "PEFT LoHa r=8": peft.LoHaConfig(r=8, **common),
        "PEFT RandLoRA r=32": peft.RandLoraConfig(r=32, **common),
    }


def title(name: str, options: Mapping[str, Any]) -> str:
    """Return a family with its options, as the tables call it."""
    shown = {k: v for k, v in options.items() if v != (None,)}  # a side in one piece
    return " ".join([name, *(v if isinstance(v, str) else f"{k}={_short(v)}" for k, v in shown.items())])


def _short(value: Any) -> str:
    same = isinstance(value, tuple) and len({*value}) == 1
    return str(value[0] if same else value)


def makers(tokens: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return what turns a backbone into a case, by the case's name."""
    configs = peft_configs()
    configs |= {
        title(name, options): models.network(tnpeft.families.get(name)(**options), tokens)
        for name, options in FAMILIES
    }
    found: dict[str, Callable[[nn.Module], nn.Module]] = {"floor": models.sharing}
    found |= {name: partial(models.adapted, config=config) for name, config in configs.items()}
    for construction in CONSTRUCTIONS:
        f = tnpeft.families.tenslora(construction, ranks=8)
        found[f"rebuilt tensor: {construction}"] = partial(models.rebuilt, f=f, whole=True)
    found["rebuilt site: qkv_depth"] = partial(models.rebuilt, f=tnpeft.families.tenslora(ranks=8), whole=False)
    return found


def cases(options: argparse.Namespace) -> dict[str, driver.Case]:
    """Return all cases, metered."""
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    base = models.backbone(options.shape, options.layers).to(**kind)
    base = models.Bare(base) if options.bare else base
    forward_of = models.stepper((options.batch, options.length), SHAPES[options.shape][0], **kind)
    found = {}
    for name, make in driver.chosen(makers(options.batch * options.length), options.only).items():
        model = make(base).train()
        forward = forward_of(model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts = {"parameters": trainable, **vars(meters.meters(model, forward, options.device))}
        forward = forward_of(torch.compile(model)) if options.compile else forward
        found[name] = driver.Case(models.backward(forward), facts)
        driver.progress(f"{name}: {facts}")
    return found


def about(data: Mapping[str, Any]) -> str:
    """Return what was measured."""
    s = data["settings"]
    return (
        f"{'The bare linears of ' * s['bare']}{s['shape']} with {s['layers']} layers, {', '.join(TARGETS)}, "
        f"{s['batch']} x {s['length']} tokens, {'compiled' if s['compile'] else 'eager'}. Time: median of the ratios "
        "to the floor's step in the same turn. Flops (torch's counter), bytes kept for backward (distinct storages, "
        "no parameters), peak and operations are exact and not timed; the floor's row holds its own numbers."
    )


def tables(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each case."""
    floor, sites = data["cases"]["floor"], len(TARGETS) * data["settings"]["layers"]
    own = {
        "case": "floor",
        "parameters": floor["parameters"],
        "time over floor": f"{floor['milliseconds']:.0f} ms",
        "flops over floor": f"{floor['flops']:,}",
        "saved bytes per site": floor["saved"],
        "peak over floor, MB": floor["peak"] / 1e6,
        "operations": floor["kernels"],
    }
    rows = [
        {
            "case": name,
            "parameters": row["parameters"],
            "time over floor": f"{row['overhead']:+.1%}",
            "flops over floor": f"{row['flops'] / floor['flops'] - 1:+.2%}",
            "saved bytes per site": (row["saved"] - floor["saved"]) // sites,
            "peak over floor, MB": (row["peak"] - floor["peak"]) / 1e6,
            "operations": row["kernels"],
        }
        for name, row in data["cases"].items()
        if name != "floor"
    ]
    return [own, *rows]


def plot(data: Mapping[str, Any]) -> Any:
    """Draw overheads in time and in flops, case by case."""
    from matplotlib.figure import Figure

    rows = {name: row for name, row in data["cases"].items() if name != "floor"}
    floor = data["cases"]["floor"]
    places = range(len(rows))
    figure = Figure(figsize=(7, 0.22 * len(rows) + 1))
    axes = figure.subplots()
    colours = ["#c44e52" if n.startswith("PEFT") else "#999999" if "rebuilt" in n else "#4c72b0" for n in rows]
    axes.barh(places, [100 * row["overhead"] for row in rows.values()], color=colours)
    axes.plot([100 * (row["flops"] / floor["flops"] - 1) for row in rows.values()], places, "k|", label="flops")
    axes.set_yticks(places, [*rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlabel("over the frozen backbone's step, %")
    axes.legend()
    return figure
