"""Clocks, the peak of allocated memory, and the bandwidth of a copy, on a CPU and on CUDA."""

import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

SECONDS = 10.0  # that the rounds of a case may take if their number is not given
FEWEST, MOST = 5, 51  # rounds
FLUSHED = 1 << 29  # bytes written between two CUDA timings: more than any L2 cache, and time to launch what follows
BURST = 50.0  # ms of CUDA timings averaged into one sample
MEASURED = "dms: measured run"

Call = Callable[[], object]


def clock(device: str) -> Callable[[Call], float]:
    """A function that runs a call and returns its milliseconds."""
    return _time_cpu if device == "cpu" else _CudaClock()


def _time_cpu(call: Call) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


class _CudaClock:
    """Mean of several timings by CUDA events, each after a flush of the L2 cache."""

    def __init__(self) -> None:
        self.junk = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call) -> float:
        first = self._times(call, 1)
        more = min(int(BURST / max(first[0], 1e-3)), 10) - 1
        return statistics.fmean(first + self._times(call, max(more, 0)))

    def _times(self, call: Call, count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self.junk.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def interleaved(calls: dict[str, Call], device: str, repeats: int | None, label: str) -> dict[str, list[float]]:
    """Milliseconds of every round of each call; all must have run once before."""
    timer, times = clock(device), {name: [] for name in calls}
    rounds = repeats or FEWEST
    with tqdm(total=rounds * len(calls), desc=label, unit="run", leave=False, file=sys.stderr) as bar:
        done = 0
        while done < rounds:
            for name, call in calls.items():
                times[name].append(timer(call))
                bar.update()
            done += 1
            if done == 1 and repeats is None:
                wanted = math.ceil(1e3 * SECONDS / max(sum(t[0] for t in times.values()), 1e-6))
                rounds = min(max(wanted, FEWEST), MOST)
                bar.total = rounds * len(calls)
    return times


def peak_bytes(call: Call, device: str) -> int:
    """The most memory that one run holds at any time beyond what was there before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        call()  # so that what the measured run releases was allocated under the profiler, which else misses it
        with record_function(MEASURED):
            call()
    held = peak = 0
    for change in _allocations(events):
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the profiler's library from writing on standard error that it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _allocations(events: profile) -> list[int]:
    """Bytes of every allocation in the measured run, negative for a release, in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        events.export_chrome_trace(str(trace))
        found = json.loads(trace.read_text())["traceEvents"]
    start, end = next((e["ts"], e["ts"] + e["dur"]) for e in found if e.get("name") == MEASURED)
    changes = [e for e in found if e.get("name") == "[memory]" and start <= e["ts"] <= end]
    return [e["args"]["Bytes"] for e in sorted(changes, key=lambda e: e["ts"]) if e["args"]["Device Type"] == 0]


def copy_gbps(device: str, size: int) -> float:
    """10^9 bytes a second, read and written, of a copy of a tensor of ``size`` bytes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, FEWEST + 1, "copy")["copy"]
    return 2 * source.nbytes / statistics.median(times[1:]) / 1e6
