"""What a step costs: goals and measurements.

{{ goals | length }} goals, {{ goals | rejectattr("reached") | list | length }} missed. Of more than four cases
those are named that miss their bound, else the one nearest to it. Times are medians of interleaved runs on
{{ machine.cores }} cores ({{ machine.processor }}; torch {{ machine.torch }}, peft {{ machine.peft }}) unless a GPU
is named, bytes are exact; settings, machine and load are in the table named last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.driver import Options
from bench.growth import COUNTED, by_family, power
from bench.models import CONSTRUCTIONS

OPTIONS = {"name": "speed"}
EXACT = True
OF_WIDTH = {  # families of the founding papers by the rank of PEFT's LoRA that is as wide inside
    8: ("cp rank=8", "lorta rank=8", "tera ranks=8", *(f"tenslora {name} ranks=8" for name in CONSTRUCTIONS)),
    64: ("cp rank=64", "lorta rank=64", "tera ranks=64", "tenslora qkv_depth ranks=(64, 64, 3, 2)"),
}
PEERS = {
    "vera rank=256": "PEFT VeRA r=256",
    "lokr rank=8": "PEFT LoKr r=8",
    "loha rank=8": "PEFT LoHa r=8",
    "randlora rank=32": "PEFT RandLoRA r=32",
}
FOUNDING, LORA = "founding papers' families", "PEFT LoRA r=8"
PEER = "at most PEFT LoRA's overhead"
ON_GPU = {1024: 0.10, 4096: 0.13, 16384: 0.20}  # the largest overhead of a forward, by tokens
WHY = {
    "whole": "Whole layers: an adapter is a few per cent of such a step, little more than turns of one case scatter; "
    "the bare linears tell the two apart.",
    "input": "Bytes kept, with the input: LoKr, LoHa and RandLoRA keep the linear's input for the gradients of their "
    "factors, as PEFT's do, and at many tokens it is a large part of what PEFT's keep. The rows beside the input "
    "leave it out.",
    "loha": "Bytes kept, beside the input: LoHa is as wide inside as the square of its rank, here 64, and its narrow "
    "results at 1,024 tokens are a ninth of a 768 x 768 update, which is what PEFT keeps of it.",
    "rebuilt": "Against rebuilding, time: a tensor that spans few sites costs little to rebuild beside the dense "
    "products of forward and backward in which it is then used, and the narrow products take the time of reading and "
    "writing the linears' inputs and outputs once more. The more sites a tensor spans, the larger the gain.",
    "launches": "On a GPU: at a few thousand tokens a step of the frozen model waits for the launches of its "
    "operations, and so for each that an adapter adds. CP's four factors were normalised at every site when this was "
    "measured; they are now for all sites at once, with a third of the operations, and that was not measured there.",
    "replicas": "Replicas: the arithmetic of the frozen backbone takes nearly all the time of a step of that size, "
    "and one pass saves only what a step costs however small it is.",
}


Read = Callable[[str], Any]  # a benchmark's results, by the name of their table
Cases = Mapping[str, tuple[float, float]]  # a number of each case, and the bound on it


def goal(
    what: str, aim: str, source: str, cases: Cases, form: str = "{:+.1%}", why: str = "", least: bool = False
) -> dict[str, Any]:
    """Return a goal with what was found; no number may be above its bound, or below if it is the ``least``."""
    beyond = {name: bound - number if least else number - bound for name, (number, bound) in cases.items()}
    told = [name for name, by in beyond.items() if by > 0 or len(cases) < 5] or [max(beyond, key=beyond.__getitem__)]
    numbers, bounds = ([form.format(cases[name][k]) for name in told] for k in (0, 1))
    found = [f"{name}: {number}" if name else number for name, number in zip(told, numbers, strict=True)]
    counted = f"{what} ({len(cases)} cases)" if len(cases) > 1 else what
    its = {"what": counted, "goal": aim, "measured": ", ".join(found), "bound": ", ".join(dict.fromkeys(bounds))}
    return {**its, "reached": max(beyond.values()) <= 0, "from": source, "why": why}


def over_peers(read: Read, source: str, peers: Mapping[str, str], share: float = 1) -> Cases:
    """Return the overheads of cases, each with a share of that of a peer as its bound."""
    rows = read(source)["cases"]
    return {name: (rows[name]["overhead"], share * rows[peer]["overhead"]) for name, peer in peers.items()}


def goals(read: Read) -> Iterator[dict[str, Any]]:
    """Yield every goal in turn."""
    what, lora = "overhead of LoRA r=8 on q, k and v", {"lora rank=8": LORA}
    for where, source in (("bare linears", "step_bare"), ("whole layers", "step_lora")):
        cases = over_peers(read, source, lora, 1 / 2)
        yield goal(f"{what}, {where}", "at most half of PEFT LoRA's", source, cases, why=WHY["whole"])
    for width, names in OF_WIDTH.items():
        cases = over_peers(read, "step_bare", dict.fromkeys(names, f"PEFT LoRA r={width}"))
        yield goal(f"{FOUNDING} at inner width {width}", f"{PEER} at rank {width}", "step_bare", cases)
    for name, peer in PEERS.items():
        cases = over_peers(read, "step_bare", {name: peer})
        yield goal(name.partition(" ")[0], "at most the overhead of PEFT's own", "step_bare", cases)
    yield from kept(read("saved")["cases"])
    for source in ("rebuilt", "rebuilt_short"):
        data = read(source)
        what = "TensLoRA's constructions against rebuilding the tensor on each of {sites} calls, {tokens:,} tokens"
        for cost, key, times in (("adapter time", "seconds", 50), ("saved bytes", "saved", 100)):
            rows, head = data["constructions"].items(), f"{what.format_map(data['settings'])}: {cost}"
            cases = {name: (row["rebuilt"][key] / row["factors"][key], times) for name, row in rows}
            yield goal(head, f"at least {times} times less", source, cases, "{:.0f}", WHY["rebuilt"], least=True)
    for what, points in read("growth")["growth"].items():
        rows = by_family(points).values()
        powers = {cost: max(power(its, what, cost) for its in rows) for cost in (*COUNTED, "milliseconds")}
        cases = {cost: (round(p, 2), 1.15 if cost == "milliseconds" else 1) for cost, p in powers.items()}
        head = f"cost of a step's adapters from {what} {points[0][what]:,} to {points[-1][what]:,}, as a power of it"
        yield goal(head, "no more than linear: no term in rows times columns", "growth", cases, "{:.2f}")
    yield from before_the_first_step(read("attach"))
    yield goal("decoding with LoRA r=8, unmerged, token by token", PEER, "decode", over_peers(read, "decode", lora))
    for case in read("sst2")["cases"]:
        what = "K = 8 replicas on SST-2, {shape}, {layers} layers, {batch} examples a step, {order}".format_map(case)
        cases, aim = {"": (case["gain"]["8"], 1.1)}, "at least 1.1 times 8 runs in turn"
        yield goal(what, aim, "sst2", cases, "{:.3f}", WHY["replicas"], least=True)
    yield from on_a_gpu(read, lora)


def kept(every: Any) -> Iterator[dict[str, Any]]:
    """Yield what one linear keeps for backward, against PEFT's own and against a LoRA as wide inside."""
    peers = {name: peer for name, peer in PEERS.items() if not name.startswith("vera")}
    for linear, tokens in dict.fromkeys((case["linear"], case["tokens"]) for case in every):
        at, inputs = f"{linear} x {linear}, {tokens} tokens", 4 * linear * tokens
        rows = {case["case"]: case for case in every if (case["linear"], case["tokens"]) == (linear, tokens)}
        for beside, less, why in (("", 0, WHY["input"]), (" beside the input", inputs, WHY["loha"])):
            cases = {n: (rows[n]["saved"] - less, (rows[peer]["saved"] - less) / 10) for n, peer in peers.items()}
            what = f"bytes kept{beside}, LoKr, LoHa, RandLoRA: {at}"
            yield goal(what, "at most a tenth of PEFT's", "saved", cases, "{:,.0f}", why)
        founding = [rows[name] for names in OF_WIDTH.values() for name in names]
        cases = {row["case"]: (row["saved"], inputs + 4 * tokens * row["width"] + row["factors"]) for row in founding}
        aim = "at most LoRA's of equal inner width plus the factors"
        yield goal(f"bytes kept, {FOUNDING}: {at}", aim, "saved", cases, "{:,.0f}")


def before_the_first_step(data: Any) -> Iterator[dict[str, Any]]:
    """Yield attaching and planning, and how attaching grows."""
    ours = [row for row in data["attach"] if "of which planning s" in row]  # PEFT plans nothing
    for what, key, most in (
        ("attaching, beyond module creation", "attach s", 1),
        ("planning", "of which planning s", 0.2),
    ):
        cases = {row["family"]: (row[key], most) for row in ours}
        yield goal(
            f"{what}, OPT-1.3B's shape, {ours[0]['sites']} sites", f"under {most} s", "attach", cases, "{:.3f} s"
        )
    for family, rows in by_family(data["growth"]).items():
        few, *_, many = sorted((row["sites"], row["attach s"] / row["sites"]) for row in rows)
        what, cases = f"time per site of attaching, {many[0]} sites over {few[0]}", {family: (many[1] / few[1], 1.5)}
        yield goal(what, "linear in sites", "attach", cases, "{:.2f}")


def on_a_gpu(read: Read, lora: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield what was measured on a GPU, in half precision."""
    rows, slowest = read("forward_gpu_narrow")["cases"], {}
    for tokens, most in ON_GPU.items():
        ours = [row["overhead"] for name, row in rows.items() if is_ours(name) and row["tokens"] == tokens]
        slowest[f"{tokens:,} tokens"] = max(ours), most
    what = "forward over the frozen model on a GPU, the slowest of five families"
    yield goal(what, "below a bound by tokens", "forward_gpu_narrow", slowest, why=WHY["launches"])
    source, width = "step_gpu_narrow", dict.fromkeys(OF_WIDTH[8], LORA)
    yield goal("step of LoRA r=8 on q, k and v on a GPU, 4,096 tokens", PEER, source, over_peers(read, source, lora))
    cases = over_peers(read, source, {name: peer for name, peer in width.items() if name in read(source)["cases"]})
    what = f"step of {FOUNDING} at inner width 8 on a GPU, 4,096 tokens"
    yield goal(what, f"{PEER} at rank 8", source, cases, why=WHY["launches"])
    peers = {name: f"{LORA},{name.rpartition(',')[2]}" for name in read("mixed_gpu")["cases"] if is_ours(name)}
    what, aim = "16 adapters in one batch on a GPU", "at most the overhead of PEFT's adapter_names"
    yield goal(what, aim, "mixed_gpu", over_peers(read, "mixed_gpu", peers))
    rows = [row for row in read("replicas_gpu")["cases"] if row["family"] != "none"]
    gains = {"{family}, {rows} x {length} tokens".format_map(row): (row["gain"]["8"], 5) for row in rows}
    what, aim = "K = 8 replicas on a GPU, models below 200M parameters", "at least 5 times 8 runs in turn"
    yield goal(what, aim, "replicas_gpu", gains, "{:.2f}", least=True)


def is_ours(case: str) -> bool:
    """Return True for a case that is neither PEFT's nor the frozen model."""
    return not case.startswith(("PEFT", "floor"))


def measure(options: Options) -> dict[str, Any]:
    """Return the goals, judged by the results in the folder of tables."""

    def read(name: str) -> Any:
        return json.loads((options.out / f"{name}.json").read_text(encoding="utf-8"))

    return {"goals": [*goals(read)], "machine": read("step_bare")["machine"]}


def tables(data: Any) -> dict[str, Any]:
    """Return a row for each goal, and why some are missed."""
    missed = {its["why"]: None for its in data["goals"] if its["why"] and not its["reached"]}
    rows = [{**its, "reached": "yes" if its["reached"] else "**no**"} for its in data["goals"]]
    table = [{key: value for key, value in row.items() if key != "why"} for row in rows]
    return {"": table} | ({"Why some are missed": "".join(f"- {why}\n" for why in missed)} if missed else {})
