"""Our operations against what one would use otherwise, in one process on one device.

Everything is timed in turn (ours, baseline, ours, baseline, ...), so that a disturbance falls on all; medians count.
"""

from collections.abc import Sequence

import torch

from dms_kernels.benchmarks import attention, cache
from dms_kernels.benchmarks.case import Case
from dms_kernels.benchmarks.measure import copy_gbps

KINDS = {"prefill": attention.prefill_cases, "train": attention.train_cases, "decode": cache.decode_cases,
         "cache": cache.append_cases}  # fmt: skip


def cases(kind: str, device: str = "cpu", quick: bool = False) -> list[Case]:
    """All cases of one kind.  Raises ValueError for an unknown kind or device, or one that is not here."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no CUDA card on this machine")
    return KINDS[kind](device, quick)


def run(
    kind: str, device: str = "cpu", names: Sequence[str] | None = None, repeats: int | None = None, quick: bool = False
) -> list[dict]:
    """Measure the cases of one kind (those in ``names``, or all), one dict each (fields: Case.measure).

    ``repeats``: timed rounds, by default as many as fit into some seconds; ``quick``: tiny shapes, to see that
    everything runs.  Raises ValueError for names that do not exist.
    """
    known = cases(kind, device, quick)
    if unknown := set(names or ()) - {case.name for case in known}:
        raise ValueError(f"case {min(unknown)!r}: must be one of {', '.join(case.name for case in known)}")
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats {repeats}: must be >= 1")
    chosen = [case for case in known if not names or case.name in names]
    copied = copy_gbps(device, 1 << 22 if quick else 1 << 28)
    return [case.measure(device, repeats, copied) for case in chosen]
