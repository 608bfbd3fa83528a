"""What a step costs: goals and measurements.

{{ goals | length }} goals, {{ goals | rejectattr("reached") | list | length }} missed. Times are medians of
interleaved runs on {{ machine.cores }} cores ({{ machine.processor }}; torch {{ machine.torch }}, peft
{{ machine.peft }}) unless a GPU is named, bytes are exact; settings, machine and load are in the table named last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.driver import Options
from bench.growth import COUNTED, FAMILIES, power
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
LORA = "PEFT LoRA r=8"
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


@dataclass(frozen=True)
class Goal:
    """One goal and what was found."""

    what: str
    goal: str
    measured: str
    reached: bool
    source: str
    why: str = ""  # it may be missed


class Results:
    """The benchmarks' result files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def overheads(self, name: str) -> dict[str, float]:
        """Return the overheads of a benchmark's cases, by name."""
        return {case: row["overhead"] for case, row in self[name]["cases"].items()}


def goals(results: Results) -> Iterator[Goal]:
    """Yield every goal in turn."""
    for name, source in (("bare linears", "step_bare"), ("whole layers", "step_lora")):
        over = results.overheads(source)
        ours, theirs = over["lora rank=8"], over[LORA]
        found = f"{ours:+.1%} against {theirs:+.1%}: {ours / theirs:.2f} of it"
        what = f"overhead of LoRA r=8 on q, k and v, {name}"
        yield Goal(what, "at most half of PEFT LoRA's", found, ours <= theirs / 2, source, WHY["whole"])
    over = results.overheads("step_bare")
    for width, names in OF_WIDTH.items():
        what, goal = f"inner width {width}", f"at most PEFT LoRA's overhead at rank {width}"
        yield slowest(f"founding papers' families at {what}", goal, over, names, f"PEFT LoRA r={width}", "step_bare")
    for name, peer in PEERS.items():
        yield slowest(name.partition(" ")[0], "faster than PEFT's own", over, [name], peer, "step_bare")
    yield from kept(results)
    for name in ("rebuilt", "rebuilt_short"):
        yield from against_rebuilding(results, name)
    yield from growing(results)
    yield from before_the_first_step(results)
    what, goal = "token-by-token decoding with LoRA r=8, unmerged", "at most PEFT LoRA's overhead"
    yield slowest(what, goal, results.overheads("decode"), ["lora rank=8"], LORA, "decode")
    yield from replicas(results)
    yield from on_a_gpu(results)


def slowest(
    what: str, goal: str, over: Mapping[str, float], names: Sequence[str], peer: str, source: str, why: str = ""
) -> Goal:
    """Return the goal that the largest overhead of some cases is at most a peer's."""
    worst, several = max(names, key=over.__getitem__), len(names) > 1
    found = f"{f'the slowest, {worst}: ' if several else ''}{over[worst]:+.1%} against {over[peer]:+.1%}"
    counted = f"{what} ({len(names)} of them)" if several else what
    return Goal(counted, goal, found, over[worst] <= over[peer], source, why)


def kept(results: Results) -> Iterator[Goal]:
    """Yield what one linear keeps for backward, against PEFT's own and against a LoRA as wide inside."""
    every = results["saved"]["cases"]
    for linear, tokens in dict.fromkeys((case["linear"], case["tokens"]) for case in every):
        cases = {c["case"]: c for c in every if (c["linear"], c["tokens"]) == (linear, tokens)}
        at, inputs = f"{linear} x {linear}, {tokens} tokens", 4 * linear * tokens
        for beside, common, why in (("", 0, WHY["input"]), (" beside the input", inputs, WHY["loha"])):
            bytes_ = {name: case["saved"] - common for name, case in cases.items()}
            gain = {n: bytes_[PEERS[n]] / max(bytes_[n], 1) for n in PEERS if not n.startswith("vera")}
            least = min(gain, key=gain.__getitem__)
            what, goal = f"bytes kept{beside}, LoKr, LoHa, RandLoRA: {at}", "at most a tenth of PEFT's"
            found = f"the least gain, {least.partition(' ')[0]}: {bytes_[least]:,} against {bytes_[PEERS[least]]:,}"
            yield Goal(what, goal, found, gain[least] >= 10, "saved", why)
        founding = [cases[name] for names in OF_WIDTH.values() for name in names]
        beyond = {c["case"]: c["saved"] - inputs - 4 * tokens * c["width"] - c["factors"] for c in founding}
        most = max(beyond, key=beyond.__getitem__)
        what, goal = "bytes kept, founding papers' families", "at most LoRA's of equal inner width plus the factors"
        yield Goal(f"{what}: {at}", goal, f"the most, {most}: {beyond[most]:+,} to that", beyond[most] <= 0, "saved")


def against_rebuilding(results: Results, name: str) -> Iterator[Goal]:
    """Yield TensLoRA through its factors against its whole tensor rebuilt on every call."""
    cases, settings = results[name]["constructions"], results[name]["settings"]
    own = [case["factors"]["seconds"] / results[name]["floor"]["seconds"] for case in cases.values()]
    share = f" (the factors take {min(own):.0%} to {max(own):.0%} of the linears' own time)"
    calls, tokens = settings["sites"], settings["tokens"]
    head = f"TensLoRA's seven constructions against rebuilding the tensor on each of {calls} calls, {tokens:,} tokens"
    for what, key, least, note in (("adapter time", "seconds", 50, share), ("saved bytes", "saved", 100, "")):
        times = {which: case["rebuilt"][key] / case["factors"][key] for which, case in cases.items()}
        short = ", ".join(f"{which} {its:.0f}" for which, its in times.items() if its < least)
        found = f"{min(times.values()):.0f} to {max(times.values()):.0f} times{note}"
        found += f"; short of it: {short}" if short else ""
        yield Goal(f"{head}: {what}", f"at least {least} times less", found, not short, name, WHY["rebuilt"])


def growing(results: Results) -> Iterator[Goal]:
    """Yield how the cost of a step's adapters grows."""
    for what, points in results["growth"]["growth"].items():
        rows = [[row for row in points if row["family"] == name] for name in FAMILIES]
        powers = {cost: max(power(its, what, cost) for its in rows) for cost in (*COUNTED, "milliseconds")}
        shown = ", ".join(f"{'bytes kept' if cost == 'saved' else cost} {p:.2f}" for cost, p in powers.items())
        reached = all(round(powers[cost], 2) <= 1 for cost in COUNTED) and powers["milliseconds"] <= 1.15
        head = f"cost of a step's adapters from {what} {points[0][what]:,} to {points[-1][what]:,}"
        goal = f"no more than linear{' (no term in rows times columns)' * (what == 'width')}"
        yield Goal(head, goal, f"largest powers: {shown}", reached, "growth")


def before_the_first_step(results: Results) -> Iterator[Goal]:
    """Yield attaching and planning, and how attaching grows."""
    attach = results["attach"]
    ours = [row for row in attach["attach"] if "of which planning s" in row]  # PEFT plans nothing
    slowest = max(ours, key=lambda row: row["attach s"])
    planning = max(row["of which planning s"] for row in ours)
    what, found = f"attaching to OPT-1.3B's shape, {slowest['sites']} sites", slowest["attach s"]
    measured = f"{found:.2f} s ({slowest['family']})"
    yield Goal(what, "under 1 s beyond module creation", measured, found < 1, "attach")
    yield Goal("of which planning", "under 0.2 s", f"{planning:.3f} s", planning < 0.2, "attach")
    for family in dict.fromkeys(row["family"] for row in attach["growth"]):
        rows = [row for row in attach["growth"] if row["family"] == family]
        few, *_, many = sorted((row["sites"], row["attach s"] / row["sites"]) for row in rows)
        what, each = f"attaching {family} to {few[0]} and to {many[0]} sites", many[1] / few[1]
        yield Goal(what, "linear in sites", f"{each:.2f} times the time per site", each <= 1.5, "attach")


def replicas(results: Results) -> Iterator[Goal]:
    """Yield eight adapters in one pass against eight runs in turn, on SST-2's sentences in a study's batches."""
    for case in results["sst2"]["cases"]:
        if case["family"] == "lora r=8" and "8" in case["gain"]:
            what = (
                f"K = 8 replicas on SST-2, {case['shape']}, {case['layers']} layers, {case['batch']} examples a step"
            )
            gain, goal = case["gain"]["8"], "at least 1.1 times 8 runs in turn"
            found = f"{gain:.2f} times; {gain * case['cut']:.2f} times runs whose batches are padded as they come"
            yield Goal(f"{what}, {case['order']}", goal, found, gain >= 1.1, "sst2", WHY["replicas"])


def on_a_gpu(results: Results) -> Iterator[Goal]:
    """Yield what was measured on a GPU, in half precision."""
    source, most = "forward_gpu_narrow", {1024: 0.10, 4096: 0.13, 16384: 0.20}
    ours, theirs, over = [], [], results.overheads(source)
    for tokens in most:
        its = {name: value for name, value in over.items() if name.endswith(f", {tokens} tokens")}
        theirs.append(its[f"{LORA}, {tokens} tokens"])
        ours.append(max(its[name] for name in without_peers(its)))
    what = "forward over the frozen model at 1,024, 4,096, 16,384 tokens on a GPU, the slowest of five families"
    found, peer = (", ".join(f"{value:+.1%}" for value in each) for each in (ours, theirs))
    reached = all(value < bound for value, bound in zip(ours, most.values(), strict=True))
    goal = f"below {', '.join(f'{bound:+.0%}' for bound in most.values())}"
    yield Goal(what, goal, f"{found}; PEFT LoRA's {peer}", reached, source, WHY["launches"])
    source, goal = "step_gpu_narrow", "at most PEFT LoRA's overhead"
    over = results.overheads(source)
    what = "step of LoRA r=8 on q, k and v on a GPU, 4,096 tokens"
    yield slowest(what, goal, over, ["lora rank=8"], LORA, source)
    what = "step of founding papers' families at inner width 8 on a GPU, 4,096 tokens"
    names = [name for name in OF_WIDTH[8] if name in over]
    yield slowest(what, f"{goal} at rank 8", over, names, LORA, source, WHY["launches"])
    over = results.overheads("mixed_gpu")
    shares = [over[name] / over[f"{LORA},{name.rpartition(',')[2]}"] for name in without_peers(over)]
    what = "16 adapters in one batch on a GPU, 1, 16 and 128 tokens a row, three families"
    goal, found = "at most the overhead of PEFT's adapter_names", f"{min(shares):.2f} to {max(shares):.2f} of it"
    yield Goal(what, goal, found, max(shares) <= 1, "mixed_gpu")
    rows = [row for row in results["replicas_gpu"]["cases"] if row["family"] != "none"]
    gain, row = min(((row["gain"]["8"], row) for row in rows), key=lambda each: each[0])
    what, goal = "K = 8 replicas on a GPU, models below 200M parameters", "at least 5 times 8 runs in turn"
    found = f"the least gain, {row['family']}, {row['shape']}: {gain:.2f} times"
    yield Goal(what, goal, found, gain >= 5, "replicas_gpu")


def without_peers(names: Mapping[str, float]) -> list[str]:
    """Return the cases that are ours."""
    return [name for name in names if not name.startswith(("PEFT", "floor"))]


def measure(options: Options) -> dict[str, Any]:
    """Return the goals, judged by the results in the folder of tables."""
    results = Results(options.out)
    found = [asdict(goal) for goal in goals(results)]
    return {"goals": found, "machine": results["step_bare"]["machine"]}


def tables(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for each goal, and why some are missed."""
    rows = [
        {**{key: goal[key] for key in ("what", "goal", "measured")}, "reached": ("**no**", "yes")[goal["reached"]]}
        | {"from": goal["source"]}
        for goal in data["goals"]
    ]
    reasons = dict.fromkeys(goal["why"] for goal in data["goals"] if not goal["reached"] and goal["why"])
    return {"": rows} | ({"Why some are missed": "".join(f"- {why}\n" for why in reasons)} if reasons else {})
