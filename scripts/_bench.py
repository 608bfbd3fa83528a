"""What the benchmarks share: interleaved times, exact meters of one step, tables and files written as a whole."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tnpeft.studies.files import write_json, write_text

TABLES = Path(__file__).resolve().parent.parent / "paper" / "tables"
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


# ---- times


def interleaved(
    runs: Mapping[str, Callable[[], Any]], samples: int, clock: str, device: str = "cpu", warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of every run, one sample of each in turn, so that a busy machine slows all of them alike."""
    now = CLOCKS[clock]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for sample in range(-warm, samples):
            for name, run in runs.items():
                wait()
                start = now()
                run()
                wait()
                if sample >= 0:
                    times[name].append(now() - start)
    finally:
        gc.enable()
    return times


def ratio(times: Sequence[float], floor: Sequence[float]) -> float:
    """Median of the ratios of neighbouring samples: both met the same load."""
    return median(a / b for a, b in zip(times, floor, strict=True))


# ---- exact meters of one step


@dataclass(frozen=True)
class Meters:
    """One step: flops, bytes kept for backward, most bytes of new tensors alive at once, operations that compute."""

    flops: int
    saved: int
    peak: int
    kernels: int


class _Dispatched(TorchDispatchMode):
    """Counts operations that are no views, and the storages that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.kernels += not func.is_view and func.namespace == "aten" and func._opname not in _FREE
        self.alive |= {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in made if s._cdata not in given}
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


_FREE = {"detach", "promote_types", "empty", "empty_like", "_unsafe_view", "empty_strided", "alias", "lift_fresh"}


def _note(kept: dict[int, Tensor], tensor: Tensor) -> Tensor:
    kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    return tensor


def saved_bytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd keeps in a forward; parameters and buffers are left out."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Tensor] = {}
    with saved_tensors_hooks(lambda t: _note(kept, t), lambda t: t):
        result = forward()
    del result
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def flop_counter() -> FlopCounterMode:
    """Torch's flop counter, which by itself passes over a product accumulated in place."""
    in_place = torch.ops.aten.addmm_, torch.ops.aten.baddbmm_
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(in_place, _accumulated))


def _accumulated(total: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    return 2 * prod(left) * right[-1]


@dataclass(frozen=True)
class Counts:
    """One step of something large: flops, bytes kept for backward."""

    flops: int
    saved: int


def counted(module: nn.Module, forward: Callable[[], Tensor]) -> Counts:
    """The flops and kept bytes of one forward and backward."""
    saved = saved_bytes(module, forward)
    with flop_counter() as counter:
        forward().backward()
    module.zero_grad()
    return Counts(counter.get_total_flops(), saved)


def meters(module: nn.Module, forward: Callable[[], Tensor], device: str = "cpu") -> Meters:
    """What one forward and backward costs, counted and not timed."""
    saved = saved_bytes(module, forward)
    with flop_counter() as counter:
        forward().backward()
    dispatched = _Dispatched()
    with dispatched:
        forward().backward()
    module.zero_grad()
    if device == "cpu":
        return Meters(counter.get_total_flops(), saved, dispatched.peak, dispatched.kernels)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward().backward()
    peak = torch.cuda.max_memory_allocated() - before
    module.zero_grad()
    return Meters(counter.get_total_flops(), saved, peak, _launched(forward))


def _launched(forward: Callable[[], Tensor]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        forward().backward()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


# ---- what comes out


def machine(threads: int | None = None) -> dict[str, Any]:
    """Where and with what it ran."""
    import peft
    import transformers

    return {
        "processor": next(
            (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
            platform.processor(),
        ),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table: text to the left, numbers to the right."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    right = {
        name for name in columns if all(not isinstance(row.get(name, 0), str) or _number(row[name]) for row in rows)
    }
    lines = [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---:' if name in right else '---' for name in columns)} |",
        *(f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _number(text: str) -> bool:
    return text[:1] in "+-0123456789" if text else True


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(folder: Path, name: str, data: Mapping[str, Any], text: str) -> None:
    """``name.json`` and ``name.md`` in the folder, each written as a whole or not at all."""
    write_json(folder / f"{name}.json", json.loads(json.dumps(data)))
    write_text(folder / f"{name}.md", text)


def save_figure(figure: Any, path: Path) -> None:
    """A matplotlib figure as a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    figure.savefig(part, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    os.replace(part, path)
