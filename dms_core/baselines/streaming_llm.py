"""StreamingLLM (Xiao et al. 2024): the first tokens, which attract attention whatever they say, and the most recent.

Slot i for token i < budget, then the recent tokens' slots in turn.  Keys keep the RoPE angle of their position in the
text, as in kvpress; the paper counts positions inside the cache, which matters beyond the trained context only.
A protected prompt is that many first tokens, if they are more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dms_core.baselines.base import Baseline, BaselineLayer


class StreamingLLMLayer(BaselineLayer):
    method: "StreamingLLM"
    evicts_first = True

    @property
    def lasting(self) -> Tensor:
        return torch.minimum(self.live, self._sinks()[:, None])

    def _sinks(self) -> Tensor:
        """First tokens that stay, (B,)."""
        return torch.maximum((self.budget - 1).clamp_max(self.method.sinks), self.pinned)

    def _place(self) -> Tensor:
        sinks = self._sinks()
        turn = sinks + (self.seen - sinks) % (self.budget - sinks)
        return torch.where(self.seen < self.budget, self.seen, turn)[:, None]


@dataclass(frozen=True)
class StreamingLLM(Baseline):
    """``sinks`` first tokens (fewer if the budget is not larger) and the most recent ones, the new token included."""

    sinks: int = 4

    name = "streaming-llm"
    layer = StreamingLLMLayer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"sinks {self.sinks}: must be >= 0")
