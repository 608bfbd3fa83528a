"""One training step of many adapters over one frozen OPT backbone, side by side: time, flops, bytes, kernels.

With ``--bare`` the backbone is nothing but the q, k and v linears of each layer, each layer's sum the input of
the next: there overheads stand out of the noise of a busy machine.

The floor is the frozen backbone with gradients flowing to the embeddings' output. All cases run in turn, a step each,
and a case's overhead is the median of its time over the floor's in the same turn, less one. Writes ``step.json``,
``step.md`` and ``step.svg``.

    python scripts/bench_step.py --layers 2 --samples 9 --clock cpu
    python scripts/bench_step.py --only floor "PEFT LoRA r=8" "lora rank=8" --compile --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import torch
from _bench_models import SHAPES, TARGETS, Bare, Rebuilt, backbone
from torch import Tensor, nn

import tnpeft
from tnpeft.networks import Factorization

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
    ("lotr", {"rank": 8}),
    ("fact_tt", {"rank": 8}),
    ("fact_tk", {"rank": 8}),
    ("metatt_4d", {"ranks": 8}),
    ("metatt_5d", {"ranks": 8}),
    ("loretta", {}),
    ("tt_lora", {}),
    ("tucker", {}),
    ("tensor_train", {}),
    ("tensor_ring", {}),
    ("hierarchical_tucker", {}),
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


def peft_configs() -> dict[str, Any]:
    """PEFT's own methods at stated ranks."""
    import peft

    common = {"target_modules": list(TARGETS)}
    return {
        "PEFT LoRA r=8": peft.LoraConfig(r=8, lora_alpha=16, **common),
        "PEFT LoRA r=64": peft.LoraConfig(r=64, lora_alpha=16, **common),
        "PEFT VeRA r=256": peft.VeraConfig(r=256, **common),
        "PEFT LoKr r=8": peft.LoKrConfig(r=8, decompose_both=False, **common),
        "PEFT LoHa r=8": peft.LoHaConfig(r=8, **common),
        "PEFT RandLoRA r=32": peft.RandLoraConfig(r=32, **common),
    }


def title(name: str, options: Mapping[str, Any]) -> str:
    """A family with its options, as the tables call it."""
    shown = {k: v for k, v in options.items() if v != (None,)}  # a side in one piece
    return " ".join([name, *(v if isinstance(v, str) else f"{k}={_short(v)}" for k, v in shown.items())])


def _short(value: Any) -> str:
    same = isinstance(value, tuple) and len({*value}) == 1
    return str(value[0] if same else value)


def cases(tokens: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What turns a backbone into a case, by the case's name."""
    import peft

    found: dict[str, Callable[[nn.Module], nn.Module]] = {"floor": lambda model: model}
    for name, config in peft_configs().items():
        found[name] = partial(peft.get_peft_model, peft_config=config)
    for name, options in FAMILIES:
        found[title(name, options)] = partial(attach, f=tnpeft.families.get(name)(**options), tokens=tokens)
    for construction in CONSTRUCTIONS:
        f = tnpeft.families.tenslora(construction, ranks=8)
        found[f"rebuilt tensor: {construction}"] = partial(rebuild, f=f, whole=True)
    found["rebuilt site: qkv_depth"] = partial(rebuild, f=tnpeft.families.tenslora(ranks=8), whole=False)
    return found


def attach(model: nn.Module, f: Factorization, tokens: int) -> nn.Module:
    """The model with adapters on its q, k and v."""
    import peft

    config = tnpeft.TensorNetworkConfig(network=f, target_modules=list(TARGETS), tokens=tokens)
    return peft.get_peft_model(model, config)


def rebuild(model: nn.Module, f: Factorization, whole: bool) -> nn.Module:
    """The model with linears that form their update at every call: the site's, or the ``whole`` tensor it is in."""
    stacked = tnpeft.factors(attach(copy.deepcopy(model), f, 1))
    arrays = nn.ParameterDict({name: nn.Parameter(value) for name, value in stacked.items()})
    for number, layer in enumerate(model.decoder.layers):
        for place, name in enumerate(TARGETS):
            base = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, Rebuilt(base, f, arrays, {"layer": number, "proj": place}, whole))
    return model


def step(model: Callable[..., Any], x: Tensor, weights: Tensor) -> Tensor:
    """The loss of one step, for a model that sees embeddings."""
    loss: Tensor = (model(inputs_embeds=x.detach().requires_grad_(), use_cache=False)[0] * weights).sum()
    return loss


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases metered, then timed in turn."""
    dtype = getattr(torch, options.dtype)
    base = backbone(options.shape, options.layers, options.device, dtype)
    base = Bare(base) if options.bare else base
    x = torch.randn(options.batch, options.length, SHAPES[options.shape][0], device=options.device, dtype=dtype)
    weights = torch.randn_like(x) / x.numel()
    makers = cases(options.batch * options.length)
    unknown = sorted(set(options.only or ()) - set(makers))
    if unknown:
        sys.exit(f"there is no case {unknown[0]!r}; there are {', '.join(makers)}")
    rows, runs = {}, {}
    for name, make in makers.items():
        if options.only and name not in (*options.only, "floor"):
            continue
        model = make(copy.deepcopy(base, {id(p): p for p in base.parameters()})).train()
        forward = partial(step, model, x, weights)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows[name] = {"parameters": trainable, **vars(_bench.meters(model, forward, options.device))}
        run = partial(step, torch.compile(model), x, weights) if options.compile else forward
        runs[name] = partial(lambda run: run().backward(), run)
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    times = _bench.interleaved(runs, options.samples, options.clock, options.device, 3 if options.compile else 1)
    for name, row in rows.items():
        row["milliseconds"] = 1e3 * median(times[name])
        row["overhead"] = _bench.ratio(times[name], times["floor"]) - 1
        row["samples"] = times[name]
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "only")}
    settings["layers"] = len(base.decoder.layers)
    return {"settings": settings, "machine": _bench.machine(options.threads), "cases": rows}


def report(data: Mapping[str, Any]) -> str:
    """The measurement as a page."""
    floor, s = data["cases"]["floor"], data["settings"]
    sites = len(TARGETS) * s["layers"]
    rows = [
        {
            "case": name,
            "parameters": row["parameters"],
            "time over floor": f"{row['overhead']:+.1%}" if name != "floor" else f"{row['milliseconds']:.0f} ms",
            "flops over floor": f"{row['flops'] / floor['flops'] - 1:+.2%}"
            if name != "floor"
            else f"{row['flops']:,}",
            "saved bytes per site": (row["saved"] - floor["saved"]) // sites if name != "floor" else row["saved"],
            "peak over floor, MB": (row["peak"] - floor["peak"] * (name != "floor")) / 1e6,
            "operations": row["kernels"],
        }
        for name, row in data["cases"].items()
    ]
    m = data["machine"]
    return (
        "# One training step over a frozen backbone\n\n"
        f"{'The bare linears of ' * s['bare']}{s['shape']} with {s['layers']} layers, {', '.join(TARGETS)}, "
        f"{s['batch']} x {s['length']} tokens, "
        f"{s['dtype']}, {s['device']}, {'compiled' if s['compile'] else 'eager'}, {m['threads']} threads, "
        f"{s['samples']} interleaved samples by the {s['clock']} clock, load {m['load']} on {m['cores']} cores "
        f"({m['gpu'] or m['processor']}; torch {m['torch']}, peft {m['peft']}). Time: median of the ratios to the "
        "floor's step in the same turn. Flops (torch's counter), bytes kept for backward (distinct storages, no "
        "parameters), peak and operations are exact and not timed; the floor's row holds its own numbers.\n\n"
        + _bench.markdown(rows)
    )


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Overheads in time and in flops, case by case."""
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
    _bench.save_figure(figure, path)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--layers", type=int, help="layers of the backbone, if not the shape's own")
    parser.add_argument("--bare", action="store_true", help="the adapted linears and nothing else")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument(
        "--clock", choices=_bench.CLOCKS, default="wall", help="cpu: time that other work cannot add to"
    )
    parser.add_argument("--only", nargs="+", help="cases to run beside the floor")
    parser.add_argument("--name", default="step", help="name of the files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_bench.TABLES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = measure(options)
    _bench.write(options.out, options.name, data, report(data))
    plot(data, options.out / f"{options.name}.svg")
    print(report(data))


if __name__ == "__main__":
    main()
