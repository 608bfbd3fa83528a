"""Goals of what adapters cost, and what the benchmarks measured: paper/tables/speed.md, from their result files.

A goal that has no measurement says so. Run the benchmarks first, on a machine with nothing else to do:

    python scripts/bench.py all
    python scripts/bench.py goals
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.growth import COUNTED, FAMILIES, power
from bench.step import CONSTRUCTIONS

TITLE = "What a step costs: goals and measurements"
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
    "replicas": "Replicas: the arithmetic of the frozen backbone takes nearly all the time of a step of that size, "
    "and one pass saves only what a step costs however small it is.",
}


@dataclass(frozen=True)
class Goal:
    """One goal and what was found."""

    what: str
    goal: str
    measured: str
    reached: bool | None
    source: str
    why: str = ""  # it may be missed


class Results:
    """The benchmarks' result files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def cases(self, name: str) -> Mapping[str, Any]:
        """The cases of a benchmark, by name."""
        found: Mapping[str, Any] = self[name]["cases"]
        return found


def goals(results: Results) -> Iterator[Goal]:
    """Every goal in turn."""
    for name, over in (("bare linears", "step_bare"), ("whole layers", "step_lora")):
        cases = results.cases(over)
        ours, theirs = cases["lora rank=8"]["overhead"], cases["PEFT LoRA r=8"]["overhead"]
        yield Goal(
            f"overhead of LoRA r=8 on q, k and v, {name}",
            "at most half of PEFT LoRA's",
            f"{ours:+.1%} against {theirs:+.1%}: {ours / theirs:.2f} of it",
            ours <= theirs / 2,
            over,
            WHY["whole"],
        )
    over = {name: case["overhead"] for name, case in results.cases("step_bare").items()}
    for width, names in OF_WIDTH.items():
        peer = f"PEFT LoRA r={width}"
        worst = max(names, key=over.__getitem__)
        yield Goal(
            f"founding papers' families at inner width {width} ({len(names)} of them)",
            f"at most PEFT LoRA's overhead at rank {width}",
            f"the slowest, {worst}: {over[worst]:+.1%} against {over[peer]:+.1%}",
            over[worst] <= over[peer],
            "step_bare",
        )
    for name, peer in PEERS.items():
        yield Goal(
            name.partition(" ")[0],
            "faster than PEFT's own",
            f"{over[name]:+.1%} against {over[peer]:+.1%}",
            over[name] <= over[peer],
            "step_bare",
        )
    yield from kept(results)
    for name in ("rebuilt", "rebuilt_short"):
        yield from against_rebuilding(results, name)
    yield from growing(results)
    yield from before_the_first_step(results)
    decode = {name: case["overhead"] for name, case in results.cases("decode").items()}
    yield Goal(
        "token-by-token decoding with LoRA r=8, unmerged",
        "at most PEFT LoRA's overhead",
        f"{decode['lora rank=8']:+.1%} against {decode['PEFT LoRA r=8']:+.1%}",
        decode["lora rank=8"] <= decode["PEFT LoRA r=8"],
        "decode",
    )
    yield from replicas(results)
    for what, goal in (
        ("forward over the frozen model at 1k, 4k, 16k tokens on a GPU", "below +10, +13, +20 %"),
        ("K = 8 replicas on a GPU, models below 200M parameters", "at least 5 times 8 runs in turn"),
    ):
        yield Goal(what, goal, "no GPU was at hand", None, "")


def kept(results: Results) -> Iterator[Goal]:
    """What one linear keeps for backward, against PEFT's own and against a LoRA as wide inside."""
    sizes = dict.fromkeys((case["linear"], case["tokens"]) for case in results["saved"]["cases"])
    for linear, tokens in sizes:
        cases = {c["case"]: c for c in results["saved"]["cases"] if (c["linear"], c["tokens"]) == (linear, tokens)}
        at, inputs = f"{linear} x {linear}, {tokens} tokens", 4 * linear * tokens
        for what, common in (("", 0), (" beside the input", inputs)):
            found = {
                name: (cases[PEERS[name]]["saved"] - common) / max(cases[name]["saved"] - common, 1)
                for name in PEERS
                if not name.startswith("vera")
            }
            least = min(found, key=found.__getitem__)
            yield Goal(
                f"bytes kept{what}, LoKr, LoHa, RandLoRA: {at}",
                "at most a tenth of PEFT's",
                f"the least gain, {least.partition(' ')[0]}: {cases[least]['saved'] - common:,} "
                f"against {cases[PEERS[least]]['saved'] - common:,}",
                found[least] >= 10,
                "saved",
                WHY["input"] if not common else WHY["loha"],
            )
        names = [name for its in OF_WIDTH.values() for name in its]
        beyond = {
            name: cases[name]["saved"] - inputs - 4 * tokens * cases[name]["width"] - cases[name]["factors"]
            for name in names
        }
        most = max(beyond, key=beyond.__getitem__)
        yield Goal(
            f"bytes kept, founding papers' families: {at}",
            "at most LoRA's of equal inner width plus the factors",
            f"the most, {most}: {beyond[most]:+,} to that",
            beyond[most] <= 0,
            "saved",
        )


def against_rebuilding(results: Results, name: str) -> Iterator[Goal]:
    """TensLoRA through its factors against its whole tensor rebuilt on every call."""
    cases, settings = results[name]["constructions"], results[name]["settings"]
    for what, key, goal in (("adapter time", "seconds", 50), ("saved bytes", "saved", 100)):
        found = {name: case["rebuilt"][key] / case["factors"][key] for name, case in cases.items()}
        short = [f"{name} {times:.0f}" for name, times in found.items() if times < goal]
        least, most = min(found.values()), max(found.values())
        own = [case["factors"]["seconds"] / results[name]["floor"]["seconds"] for case in cases.values()]
        why = (
            f" (the factors take {min(own):.0%} to {max(own):.0%} of the linears' own time)"
            if key == "seconds"
            else ""
        )
        yield Goal(
            f"TensLoRA's seven constructions against rebuilding the tensor on each of {settings['sites']} calls, "
            f"{settings['tokens']:,} tokens: {what}",
            f"at least {goal} times less",
            f"{least:.0f} to {most:.0f} times{why}" + (f"; short of it: {', '.join(short)}" if short else ""),
            not short,
            name,
            WHY["rebuilt"],
        )


def growing(results: Results) -> Iterator[Goal]:
    """How the cost of a step's adapters grows."""
    for what, points in results["growth"]["growth"].items():
        powers = {
            cost: max(power([row for row in points if row["family"] == name], what, cost) for name in FAMILIES)
            for cost in (*COUNTED, "milliseconds")
        }
        first, last = points[0][what], points[-1][what]
        yield Goal(
            f"cost of a step's adapters from {what} {first:,} to {last:,}",
            "no more than linear (no term in rows times columns)" if what == "width" else "no more than linear",
            "largest powers: "
            + ", ".join(f"{cost if cost != 'saved' else 'bytes kept'} {p:.2f}" for cost, p in powers.items()),
            all(round(powers[cost], 2) <= 1 for cost in COUNTED) and powers["milliseconds"] <= 1.15,
            "growth",
        )


def before_the_first_step(results: Results) -> Iterator[Goal]:
    """Attaching and planning, and how attaching grows."""
    attach = results["attach"]
    ours = [row for row in attach["attach"] if "of which planning s" in row]  # PEFT plans nothing
    slowest = max(ours, key=lambda row: row["attach s"])
    planning = max(row["of which planning s"] for row in ours)
    yield Goal(
        f"attaching to OPT-1.3B's shape, {slowest['sites']} sites",
        "under 1 s beyond module creation",
        f"{slowest['attach s']:.2f} s ({slowest['family']})",
        slowest["attach s"] < 1,
        "attach",
    )
    yield Goal("of which planning", "under 0.2 s", f"{planning:.3f} s", planning < 0.2, "attach")
    for family in dict.fromkeys(row["family"] for row in attach["growth"]):
        rows = [row for row in attach["growth"] if row["family"] == family]
        few, many = min(rows, key=lambda row: row["sites"]), max(rows, key=lambda row: row["sites"])
        each = many["attach s"] / many["sites"] / (few["attach s"] / few["sites"])
        yield Goal(
            f"attaching {family} to {few['sites']} and to {many['sites']} sites",
            "linear in sites",
            f"{each:.2f} times the time per site",
            each <= 1.5,
            "attach",
        )


def replicas(results: Results) -> Iterator[Goal]:
    """Eight adapters in one pass against eight runs in turn, on SST-2's sentences in a study's batches."""
    for case in results["sst2"]["cases"]:
        if case["family"] == "lora r=8" and "8" in case["gain"]:
            gain = case["gain"]["8"]
            yield Goal(
                f"K = 8 replicas on SST-2, {case['shape']}, {case['layers']} layers, "
                f"{case['batch']} examples a step, {case['order']}",
                "at least 1.1 times 8 runs in turn",
                f"{gain:.2f} times; {gain * case['cut']:.2f} times runs whose batches are padded as they come",
                gain >= 1.1,
                "sst2",
                WHY["replicas"],
            )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the goals, judged by the results in the folder of tables."""
    results = Results(options.out)
    found = [asdict(goal) for goal in goals(results)]
    return {"goals": found, "machine": results["step_bare"]["machine"]}


def about(data: Mapping[str, Any]) -> str:
    """Return how many goals are missed, and where the measurements are from."""
    m, missed = data["machine"], sum(goal["reached"] is False for goal in data["goals"])
    return (
        f"{len(data['goals'])} goals, {missed} missed. Times are medians of interleaved runs on {m['cores']} cores "
        f"({m['processor']}; torch {m['torch']}, peft {m['peft']}), bytes are exact; settings and load are in the "
        "table named last."
    )


def tables(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for each goal, and why some are missed."""
    verdict = {True: "yes", False: "**no**", None: "not measured"}
    rows = [
        {**{key: goal[key] for key in ("what", "goal", "measured")}, "reached": verdict[goal["reached"]]}
        | {"from": goal["source"]}
        for goal in data["goals"]
    ]
    reasons = dict.fromkeys(goal["why"] for goal in data["goals"] if goal["reached"] is False and goal["why"])
    return {"": rows} | ({"Why some are missed": "".join(f"- {why}\n" for why in reasons)} if reasons else {})
