"""Compression ratio and learning rate over a retrofit's steps.

CR(t) = 1 + t / steps_per_unit (paper section 3.2), after ``lead`` steps at CR 1 in which the neuron gate fades its
neuron out (appendix C: 2000 steps, not counted among the retrofit's).  Optional rests interrupt the ramp: at their CR
the target stays for some steps while the learning rate falls to zero, so that a checkpoint taken there has settled;
then the rate comes back and the ramp goes on.  Without rests the rate is constant after its warm-up, as in the paper.
``decay`` parts the two: the rate then falls over the last so many steps, whether the ramp goes on or not, and in no
rest.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dms_core.config import target_fraction


@dataclass(frozen=True)
class Schedule:
    """Steps count from 0; ``rests`` are (CR, steps), ascending."""

    final_cr: float
    steps_per_unit: int
    rests: tuple[tuple[float, int], ...] = ()
    warmup: int = 0  # steps in which the rate comes up, at the start and after it has fallen in a rest
    lead: int = 0  # steps at CR 1 before the ramp
    decay: int | None = None  # last steps in which the rate falls to zero, 0 for none; None: in each rest

    def __post_init__(self) -> None:
        target_fraction(self.final_cr)
        if self.steps_per_unit < 1:
            raise ValueError(f"steps_per_unit {self.steps_per_unit}: must be >= 1")
        crs = [cr for cr, _ in self.rests]
        if crs != sorted(set(crs)) or any(not 1 <= cr <= self.final_cr for cr in crs):
            raise ValueError(f"rests at CR {crs}: must ascend within 1..{self.final_cr:g}")
        if self.lead < 0:
            raise ValueError(f"lead {self.lead}: must be >= 0 steps")
        if self.warmup < 0 or any(steps < 1 for _, steps in self.rests):
            raise ValueError(f"warmup {self.warmup}, rests {self.rests}: must last >= 0 and >= 1 steps")
        if not 0 <= (self.decay or 0) <= self.steps:
            raise ValueError(f"decay {self.decay}: must be within 0..{self.steps} steps")

    def reached(self, cr: float) -> int:
        """The step at which the ramp arrives at ``cr``, before any rest there."""
        rested = sum(steps for at, steps in self.rests if at < cr)
        return self.lead + math.ceil((cr - 1) * self.steps_per_unit) + rested

    def corners(self) -> list[tuple[int, float]]:
        """(step, CR) between which the target is linear."""
        corners = {(0, 1.0), (self.lead, 1.0)}
        for cr, steps in [*self.rests, (self.final_cr, 0)]:
            corners |= {(self.reached(cr), cr), (self.reached(cr) + steps, cr)}
        return sorted(corners)

    @property
    def steps(self) -> int:
        return self.corners()[-1][0]

    def cr(self, step: int) -> float:
        """The target during ``step``."""
        steps, crs = zip(*self.corners(), strict=True)
        return float(np.interp(step, steps, crs))

    def falls(self) -> list[tuple[int, int]]:
        """(first step, steps) in which the rate falls to zero."""
        rests = [(self.reached(cr), steps) for cr, steps in self.rests]
        return rests if self.decay is None else [(self.steps - self.decay, self.decay)]

    def rate(self, step: int) -> float:
        """The learning rate during ``step``, as a share of its peak."""
        since = 0  # where the rate came up last
        for begins, steps in self.falls():
            if begins <= step < begins + steps:
                return 1 - (step - begins) / steps
            since = begins + steps if step >= begins + steps else since
        return min(1.0, (step - since + 1) / self.warmup) if self.warmup else 1.0

    def saves(self) -> dict[int, float]:
        """Steps after which a checkpoint is kept: at each integer CR, after its rest, and at the end."""
        crs = sorted({float(cr) for cr in range(2, math.ceil(self.final_cr))} | {float(self.final_cr)})
        return {self.reached(cr) + dict(self.rests).get(cr, 0): cr for cr in crs}


def checkpoint_dir(out: Path | str, cr: float) -> Path:
    """Where a run in ``out`` keeps the checkpoint of a ratio."""
    return Path(out) / f"cr{cr:g}"
