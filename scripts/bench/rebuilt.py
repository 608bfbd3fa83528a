"""TensLoRA through its factors, and rebuilt at every call.

What the adapters of {{ sites }} sites ({{ shape }}'s q_proj, k_proj, v_proj) add to forward and backward of the bare
linears ({{ "%.0f" % (1000 * floor.seconds) }} ms), ranks {{ rank }}, {{ tokens }} tokens. Through the factors:
median of the differences to the linears in the same turn; rebuilt: one step in full, with every tensor that a site's
factors belong to formed at each of the sites. What is kept for backward leaves out the factors, what the linears
keep, and their inputs, which both ways keep.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from bench import driver, meters, models
from bench.models import CONSTRUCTIONS, TARGETS

# Released code forms the whole tensor that a site's factors belong to, all layers and projections in it, at every
# call, and takes one slice of it. Some constructions take 8 GB of memory.
OPTIONS = models.options("shape layers", rank=4, tokens=1024, samples=15)
PUBLISHED = {
    "rebuilt": "--samples 9 --clock cpu",
    "rebuilt_short": "--samples 9 --clock cpu --tokens 128",
}


def measure(options: driver.Options) -> dict[str, Any]:
    """Return both ways of every construction, counted and timed."""
    base = models.Bare(models.placed(options)).train()
    forward_of = models.stepper(models.embeddings(base, 1, options.tokens))

    def counted(model: Any) -> dict[str, Any]:
        found = meters.meters(model, forward_of(model))
        return {"flops": found.flops, "saved": found.saved}

    floor = counted(base)
    # Every adapter keeps its linear's input, and no frozen linear does.
    floor["saved"] += 4 * options.layers * options.tokens * base.config.hidden_size
    runs, rows = {"floor": models.backward(forward_of(base))}, {}
    for name in CONSTRUCTIONS:
        title = f"tenslora {name} ranks={options.rank}"
        factors = models.adapted(base, models.config(title, options.tokens)).train()
        rebuilt = models.rebuilt(base, title, whole=True).train()
        row = rows[name] = {"factors": counted(factors), "rebuilt": counted(rebuilt)}
        runs[name] = models.backward(forward_of(factors))
        row["rebuilt"]["seconds"] = driver.once(models.backward(forward_of(rebuilt)), options.clock)[1]
        driver.told(f"{name}: {row}")
    times = driver.interleaved(runs, options)
    floor["seconds"] = median(times["floor"])
    for name, row in rows.items():
        row["factors"]["seconds"] = driver.added(times[name], times["floor"])
        row["rebuilt"]["seconds"] -= floor["seconds"]
        for way in row.values():
            way |= {key: way[key] - floor[key] for key in ("flops", "saved")}
    return {"settings": {"sites": len(TARGETS) * options.layers}, "floor": floor, "constructions": rows}


def tables(data: Any) -> driver.Rows:
    """Yield a row for each construction."""
    for name, row in data["constructions"].items():
        ours, theirs = row["factors"], row["rebuilt"]
        times = {key: f"{theirs[key] / ours[key]:.0f}" for key in ours}
        yield {
            "construction": name,
            "factors, ms": 1e3 * ours["seconds"],
            "rebuilt, ms": 1e3 * theirs["seconds"],
            "times faster": times["seconds"],
            "factors, MB kept": ours["saved"] / 1e6,
            "rebuilt, MB kept": theirs["saved"] / 1e6,
            "times less": times["saved"],
            "times fewer flops": times["flops"],
        }
