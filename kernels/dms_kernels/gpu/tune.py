"""Tiles chosen by time on the card: once for a kernel, head dimension, dtype and rough size, then remembered in
XDG_CACHE_HOME/dms_kernels/tiles-CARD.json.  DMS_TILES=table keeps to the table of ``common``."""

import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from dms_kernels.gpu.common import Launch

SHORT = 1024  # tokens below which a launch is not worth a choice
CANDIDATES = {  # tried beside the table's own; one that the card cannot run is left out
    "forward": [(128, 128, 8, 3), (128, 64, 8, 5), (128, 64, 8, 3), (64, 64, 4, 3)],
    "dq": [(128, 64, 8, 5), (128, 64, 8, 3), (64, 64, 8, 3), (64, 32, 4, 3)],
    "dkv": [(64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 4), (64, 64, 8, 2)],
}
_known: dict[tuple[str, str], Launch] = {}  # by file and key: what this process has read or measured


def best(kind: str, q: Tensor, kept: int, table: Launch, run: Callable[[Launch], object]) -> Launch:
    """The launch to use for queries q (B, Hq, T, D) over ``kept`` listed keys a head; ``table``: the default, which is
    kept off CUDA, in fp32 and for few tokens.  ``run`` launches; to do so twice is harmless.

    While a graph is captured nothing can be timed, and no kernel loaded: it is what was chosen before, else ``table``.
    """
    fixed = q.device.type != "cuda" or q.dtype == torch.float32 or q.shape[2] < SHORT
    if fixed or os.environ.get("DMS_TILES") == "table":
        return table
    size = f"queries 2^{math.prod(q.shape[:3]).bit_length()} listed 2^{kept.bit_length()}"
    key = f"triton {triton.__version__} {kind} D{q.shape[3]} {str(q.dtype).removeprefix('torch.')} {size}"
    store = store_of(torch.cuda.get_device_name(q.device))
    if torch.cuda.is_current_stream_capturing():
        return _known.get((str(store), key), table)
    candidates = [table, *(Launch(*tile) for tile in CANDIDATES[kind.removesuffix("_plain")])]
    return choose(store, key, candidates, lambda x: do_bench(lambda: run(x)))


def store_of(card: str) -> Path:
    """The file of a card's choices."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dms_kernels" / f"tiles-{re.sub('[^A-Za-z0-9]+', '-', card).strip('-').lower()}.json"


def choose(store: Path, key: str, candidates: list[Launch], time_of: Callable[[Launch], float]) -> Launch:
    """The fastest by ``time_of``, or what ``store`` says of ``key``; the first, and nothing stored, where none runs."""
    if found := _known.get((str(store), key)):
        return found
    known = _read(store)
    if key not in known:
        times = {launch: _time(launch, time_of) for launch in dict.fromkeys(candidates)}
        known = {**_read(store), key: min(times, key=times.get)}
        if min(times.values()) < math.inf:
            _write(store, known)
    _known[str(store), key] = Launch(*known[key])
    return _known[str(store), key]


def _time(launch: Launch, time_of: Callable[[Launch], float]) -> float:
    try:
        return time_of(launch)
    except Exception:  # too much shared memory, too many registers, a tile that the compiler refuses
        return math.inf


def _read(store: Path) -> dict[str, list[int]]:
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):  # missing, or cut off
        return {}
    return {key: tile for key, tile in known.items() if len(tile) == len(Launch._fields)}


def _write(store: Path, known: dict) -> None:
    """In one step, as other processes read; a cache that cannot be written is not kept."""
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=store.parent, delete=False) as file:
            json.dump(known, file, indent=0, sort_keys=True)
        os.replace(file.name, store)
    except OSError:
        return
