"""Examples in lots of about equal length: what padding costs, weighed against what a pass costs however small."""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that take as long as what a pass costs however few it has, and the most tokens of a pass. Measured on a CPU,
# where larger ones leave its cache; elsewhere a guess.
_COSTS = {"cpu": (50, 1024)}
_ELSEWHERE = (4096, 65536)

Lot = list[list[int]]  # places of examples, equally many of each run


def lots(lengths: Sequence[Sequence[int]], rows: int = 1, device: str = "cpu") -> list[Lot]:
    """All examples of some runs in the lots that cost least, equally many of each run in a lot.

    Args:
        lengths: tokens of the examples of each run, which has equally many.
        rows: of such a length, that an example takes.
        device: the kind of device that they go through.

    >>> lots([[90, 9, 8], [7, 8, 80]])
    [[[2, 1], [0, 1]], [[0], [2]]]
    """
    fixed, most = _COSTS.get(device, _ELSEWHERE)
    costs, starts = [0], [0]  # of what comes before each place, and where the last lot before it starts
    for stop, top in enumerate((max(its) for its in zip(*map(sorted, lengths), strict=True)), start=1):
        each = len(lengths) * rows * top
        choices = range(max(0, stop - max(1, most // each)), stop)
        cost, start = min((costs[k] + fixed + each * (stop - k), k) for k in choices)
        costs.append(cost)
        starts.append(start)
    orders = [sorted(range(len(its)), key=its.__getitem__) for its in lengths]
    found, stop = list[Lot](), len(starts) - 1
    while stop:
        found.append([order[starts[stop] : stop] for order in orders])
        stop = starts[stop]
    return found[::-1]
