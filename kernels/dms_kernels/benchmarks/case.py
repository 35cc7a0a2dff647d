"""One benchmark: tensors of a shape, our call, the calls it is compared with."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dms_kernels.benchmarks.measure import Call, interleaved, peak_bytes


@dataclass
class Work:
    """What a case does, ready to run."""

    ours: Call
    baselines: dict[str, Call]
    moved: int  # bytes that the operation must read and write
    flops: int  # of ours: what the visible keys cost
    best_of: dict[str, tuple[str, ...]] = field(default_factory=dict)  # baselines that are the fastest of others
    held: Callable[[], dict[str, int]] | None = None  # bytes that stay in memory, after the runs


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    shape: dict  # batch, heads, group, dim, tokens, window, cr, dtype
    build: Callable[[dict, str], Work]

    def measure(self, device: str, repeats: int | None, copied: float) -> dict:
        """{"name", "kind", "shape", "rounds", "ours_ms", "baseline_ms", "ratio" (baseline over ours), "quartiles_ms",
        "gbps", "copy_gbps", "flops", "peak_bytes"}, with "held_bytes" where something stays in memory, and "notes",
        why a baseline is missing.
        """
        with torch.no_grad():
            work = self.build(self.shape, device)
            work.ours()
            notes = _warm_up(work.baselines)
            calls = {"ours": work.ours, **work.baselines}
            times = interleaved(calls, device, repeats, self.name)
            peak = {name: peak_bytes(call, device) for name, call in calls.items()}
        median = {name: statistics.median(values) for name, values in times.items()}
        for name, others in work.best_of.items():
            fastest = min((other for other in others if other in median), key=median.get, default=None)
            if fastest is not None:
                median[name], times[name], peak[name] = median[fastest], times[fastest], peak[fastest]
        ours = median.pop("ours")
        result = {
            "name": self.name, "kind": self.kind, "shape": self.shape, "rounds": len(times["ours"]), "ours_ms": ours,
            "baseline_ms": median, "ratio": {name: value / ours for name, value in median.items()},
            "quartiles_ms": {name: _quartiles(values) for name, values in times.items()},
            "gbps": work.moved / ours / 1e6, "copy_gbps": copied, "flops": work.flops, "peak_bytes": peak,
            "notes": notes,
        }  # fmt: skip
        return result if work.held is None else {**result, "held_bytes": work.held()}


def _warm_up(baselines: dict[str, Call]) -> dict[str, str]:
    """Run every baseline once; those that cannot run here are removed, and why is returned."""
    notes = {}
    for name, call in list(baselines.items()):
        try:
            call()
        except (ImportError, NotImplementedError, RuntimeError) as error:
            lines = str(error).splitlines() or [""]
            notes[name] = f"left out, {type(error).__name__}: {lines[0][:200]}"
            del baselines[name]
    return notes


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return [values[0]] * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
