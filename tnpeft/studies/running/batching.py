"""Length-bucketed micro-batches: minimise padding plus a fixed cost per forward pass. And the order of examples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tnpeft.studies.protocol import Protocol

# Tokens that take as long as the fixed cost of a forward pass, and the most tokens of one. Measured on a CPU, where
# larger ones leave its cache; elsewhere a guess.
_COSTS = {"cpu": (50, 1024)}
_ELSEWHERE = (4096, 65536)

MicroBatch = list[list[int]]  # places of examples, equally many of each run


def micro_batches(lengths: Sequence[Sequence[int]], rows: int = 1, device: str = "cpu") -> list[MicroBatch]:
    """Return the cheapest micro-batches of all examples of some runs, with equally many of each run in each.

    ``lengths`` are the tokens of each run's examples, each of which makes so many ``rows`` of that length.

    >>> micro_batches([[90, 9, 8], [7, 8, 80]])
    [[[2, 1], [0, 1]], [[0], [2]]]
    """
    fixed, most = _COSTS.get(device, _ELSEWHERE)
    costs, starts = [0], [0]  # of everything before each place, and where the last micro-batch before it starts
    for stop, top in enumerate((max(each) for each in zip(*map(sorted, lengths), strict=True)), start=1):
        tokens = len(lengths) * rows * top
        choices = range(max(0, stop - max(1, most // tokens)), stop)
        cost, start = min((costs[k] + fixed + tokens * (stop - k), k) for k in choices)
        costs.append(cost)
        starts.append(start)
    orders = [sorted(range(len(each)), key=each.__getitem__) for each in lengths]
    found, stop = list[MicroBatch](), len(starts) - 1
    while stop:
        found.append([order[starts[stop] : stop] for order in orders])
        stop = starts[stop]
    return found[::-1]


def batches(lengths: Sequence[int], protocol: Protocol, seed: int, start: int = 0) -> Iterator[list[list[int]]]:
    """Yield the batches of each optimizer step, as places of examples, without end.

    The order depends on the seed and the epoch alone, so that a resumed run goes on in it, at step ``start``.

    >>> steps = batches([2] * 5, Protocol(batch=2, accumulate=2), seed=0)
    >>> [[len(batch) for batch in next(steps)] for _ in range(3)]
    [[2, 2], [1], [2, 2]]
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    step = 0
    for epoch in itertools.count():
        draw = torch.Generator().manual_seed((seed << 20) + epoch)
        if protocol.by_length:
            order = get_length_grouped_indices(list(lengths), protocol.batch, generator=draw)
        else:
            order = torch.randperm(len(lengths), generator=draw).tolist()
        cut = [order[k : k + protocol.batch] for k in range(0, len(order), protocol.batch)]
        for k in range(0, len(cut), protocol.accumulate):
            if step >= start:
                yield cut[k : k + protocol.accumulate]
            step += 1
